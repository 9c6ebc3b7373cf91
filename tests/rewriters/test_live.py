"""Live models: the model's own call runs the rewritten graph where it can, and the model stays what it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kreg
from kreg.rewriters.live import attached
from tests.models import CSA, VOCAB, deepseek_v4, llama

LENGTH = 48


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (batch, length), generator=generator)


def original(model: nn.Module, **inputs: Any) -> Any:
    """What the model answers without kreg: its layers' own code, under no compiled call."""
    calls = {module: vars(module).pop("_compiled_call_impl", None) for module in model.modules()}
    try:
        return model(**inputs)
    finally:
        for module, call in calls.items():
            if call is not None:
                module._compiled_call_impl = call


@pytest.fixture(scope="module")
def rewritten() -> Iterator[nn.Module]:
    torch._dynamo.reset()
    model = deepseek_v4([CSA])
    kreg.rewrite(model, device="cpu", example_inputs={"input_ids": tokens(2, LENGTH), "use_cache": False})
    yield model
    torch._dynamo.reset()


def test_every_site_is_replaced_and_verified_in_both_directions(rewritten: nn.Module) -> None:
    report = kreg.report(rewritten)
    assert report.frontend == "dynamo"
    assert report.summary == {
        "lightning_indexer": {"found": 1, "replaced": 1},
        "sparse_attention": {"found": 1, "replaced": 1},
        "grouped_matmul": {"found": 2, "replaced": 2},
    }
    (attention,) = (site for site in report.sites if site.op == "sparse_attention")
    assert attention.verify is not None and attention.verify.passed
    assert attention.verify.max_grad_error is not None
    assert attention.module == "model.layers.0.self_attn"


def test_a_covered_call_runs_the_rewritten_graph_and_equals_the_original(rewritten: nn.Module) -> None:
    before = kreg.report(rewritten).calls
    ids = tokens(3, LENGTH + 16, seed=1)
    got = rewritten(ids, use_cache=False).logits
    assert kreg.report(rewritten).calls.rewritten == before.rewritten + 1
    want = original(rewritten, input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_gradients_of_every_parameter_equal_the_original_ones(rewritten: nn.Module) -> None:
    ids = tokens(2, LENGTH, seed=2)

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor | None]:
        rewritten.zero_grad()
        logits.square().mean().backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in rewritten.named_parameters()}

    before = kreg.report(rewritten).calls
    got = gradients(rewritten(input_ids=ids, use_cache=False).logits)
    assert kreg.report(rewritten).calls.rewritten == before.rewritten + 1
    want = gradients(original(rewritten, input_ids=ids, use_cache=False).logits)
    rewritten.zero_grad()
    assert got.keys() == want.keys()
    for name, expected in want.items():
        found = got[name]
        if expected is None:
            assert found is None or not found.any(), name
        else:
            assert found is not None, name
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_attention_whose_weights_are_asked_for_is_kept_and_the_report_says_why(rewritten: nn.Module) -> None:
    ids = tokens(2, LENGTH, seed=3)
    got = rewritten(input_ids=ids, use_cache=False, output_attentions=True)
    want = original(rewritten, input_ids=ids, use_cache=False, output_attentions=True)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.attentions[0], want.attentions[0])
    misses = [miss for miss in kreg.report(rewritten).near_misses if miss.op == "attention"]
    assert any("weights are used more than once" in miss.reason for miss in misses)


def test_decoding_with_a_cache_runs_the_original_code_and_captures_nothing(rewritten: nn.Module) -> None:
    ids = tokens(2, LENGTH, seed=4)
    with torch.no_grad():
        filled = original(rewritten, input_ids=ids, use_cache=True)
        again = copy.deepcopy(filled.past_key_values)
        graphs = len(attached(rewritten).account.variants)
        before = kreg.report(rewritten).calls
        step = tokens(2, 1, seed=5)
        got = rewritten(input_ids=step, past_key_values=filled.past_key_values).logits
        want = original(rewritten, input_ids=step, past_key_values=again).logits
    after = kreg.report(rewritten).calls
    assert (after.rewritten, after.original) == (before.rewritten, before.original + 1)
    assert len(attached(rewritten).account.variants) == graphs
    assert torch.equal(got, want)


def test_the_object_keeps_its_class_names_state_and_copies(rewritten: nn.Module) -> None:
    fresh = deepseek_v4([CSA])
    assert type(rewritten) is type(fresh)
    assert [name for name, _ in rewritten.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    assert rewritten.state_dict().keys() == fresh.state_dict().keys()
    assert "forward" not in vars(rewritten)
    ids = tokens(1, LENGTH, seed=6)
    want = original(rewritten, input_ids=ids, use_cache=False).logits
    assert torch.equal(copy.deepcopy(rewritten)(input_ids=ids, use_cache=False).logits, want)
    stream = io.BytesIO()
    torch.save(rewritten.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream))
    assert torch.equal(fresh(input_ids=ids, use_cache=False).logits, want)


def test_hooks_run_as_before(rewritten: nn.Module) -> None:
    seen: list[tuple[Any, ...]] = []
    handle = rewritten.register_forward_hook(lambda module, args, output: seen.append(args))
    try:
        ids = tokens(2, LENGTH, seed=7)
        rewritten(ids, use_cache=False)
        assert len(seen) == 1 and torch.equal(seen[0][0], ids)
    finally:
        handle.remove()


def test_restore_undoes_a_rewrite_and_a_second_rewrite_is_one_rewrite() -> None:
    model = llama()
    inputs = {"input_ids": tokens(2, 16), "use_cache": False}
    want = model(**inputs).logits
    before = dict(vars(model))
    kreg.rewrite(model, example_inputs=inputs)
    first = model._compiled_call_impl
    kreg.rewrite(model, example_inputs=inputs)
    assert model._compiled_call_impl is not first
    assert kreg.report(model).summary == {"attention": {"found": 2, "replaced": 2}}
    assert kreg.restore(model) is model
    assert vars(model).keys() == before.keys()
    assert model._compiled_call_impl is None
    assert torch.equal(model(**inputs).logits, want)
    with pytest.raises(ValueError, match="was not rewritten"):
        kreg.report(model)


def test_inputs_are_derived_from_a_config_and_the_ordinary_call_is_rewritten() -> None:
    model = llama()
    model.config.use_cache = True
    kreg.rewrite(model, verify=False)
    ids = tokens(2, 24, seed=8)
    got = model(ids)
    assert kreg.report(model).calls.rewritten == 1
    want = original(model, input_ids=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=2e-5, atol=2e-5)
    keys = [layer.keys for layer in got.past_key_values.layers]
    for a, layer in zip(keys, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(a, layer.keys, rtol=2e-5, atol=2e-5)


def test_a_model_that_does_not_run_is_left_as_it_was_and_the_module_is_named() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such thing")

    model = nn.Sequential(nn.Linear(4, 4), Inner())
    with pytest.raises(kreg.CaptureError, match="no such thing") as failure:
        kreg.rewrite(model, example_inputs=(torch.randn(2, 4),))
    assert "module '1'" in str(failure.value)
    assert model._compiled_call_impl is None


def test_a_model_without_a_config_is_captured_by_its_first_call() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 8, 16)
    want, _ = model(x, x, x, need_weights=False)
    kreg.rewrite(model)
    assert kreg.report(model).sites == ()
    got, _ = model(x, x, x, need_weights=False)
    assert kreg.report(model).summary == {"attention": {"found": 1, "replaced": 1}}
    torch.testing.assert_close(got, want)


def test_torch_compile_takes_kreg_as_a_backend_by_name() -> None:
    torch._dynamo.reset()
    model = llama()
    ids = tokens(2, 16)
    compiled = torch.compile(model, backend="kreg", options={"verify": False})
    got = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, model(input_ids=ids, use_cache=False).logits, rtol=2e-5, atol=2e-5)
    with pytest.raises(Exception, match="has no option 'devise'"):
        torch._dynamo.reset()
        torch.compile(model, backend="kreg", options={"devise": "cpu"})(input_ids=ids, use_cache=False)
