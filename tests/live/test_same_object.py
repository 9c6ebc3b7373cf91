"""A rewritten model is the object it was: to the user, to PyTorch, to transformers; and `restore` leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kreg
from kreg.rewriters.live import attached
from tests.live.models import qwen3
from tests.live.training import answered, batches, replaced, train

LENGTH = 32
(BATCH,) = batches(1, 2, LENGTH)
IDS = BATCH["input_ids"]


def small(**options: Any) -> nn.Module:
    """One layer, in evaluation."""
    return qwen3(num_hidden_layers=1, use_cache=False, **options).eval()


def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Whatever each module holds, and its class."""
    return {path: {**vars(module), "class": type(module)} for path, module in model.named_modules()}


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    torch._dynamo.reset()
    yield kreg.rewrite(small(), example_inputs={"input_ids": IDS}, verify=False)
    torch._dynamo.reset()


def test_rewrite_returns_the_object_with_its_class_names_and_state(model: nn.Module) -> None:
    fresh = small()
    assert kreg.rewrite(fresh, example_inputs=None) is fresh
    plain = small()
    assert type(model) is type(plain)
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [name for name, _ in getattr(model, names)()] == [name for name, _ in getattr(plain, names)()]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any("forward" in vars(m) for m in model.modules())
    assert type(model).forward is type(plain).forward


def test_the_weights_are_pickled_and_loaded_on_either_side(model: nn.Module) -> None:
    plain = small(seed=1)
    plain.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    torch.testing.assert_close(logits(plain), logits(model), rtol=2e-5, atol=2e-5)
    stream = io.BytesIO()
    torch.save(small(seed=2).state_dict(), stream)
    stream.seek(0)
    before = model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    try:
        model.load_state_dict(torch.load(stream))
        with answered(model, 1):
            torch.testing.assert_close(logits(model), logits(small(seed=2)), rtol=2e-5, atol=2e-5)
    finally:
        model.load_state_dict(before)


def test_transformers_saves_and_loads_it(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert "_compiled_call_impl" not in {name for name, v in vars(loaded).items() if v is not None}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="was not rewritten"):
        kreg.report(loaded)


def test_a_whole_model_is_pickled_as_before(model: nn.Module) -> None:
    """As ``torch.save(model)`` does; what comes out is the plain model, to be rewritten where it is."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=2e-5, atol=2e-5)


def test_hooks_of_the_model_and_of_its_layers_run_once_each_call_and_may_change_what_passes(model: nn.Module) -> None:
    seen: list[str] = []
    layer = model.get_submodule("model.layers.0")
    inner = model.get_submodule("model.layers.0.self_attn.q_proj")
    plain = logits(model)

    def note(name: str) -> Any:
        return lambda *_: seen.append(name)

    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    handles = [
        model.register_forward_pre_hook(note("model before")),
        model.register_forward_hook(note("model after")),
        layer.register_forward_pre_hook(note("layer before")),
        layer.register_forward_hook(note("layer after")),
        inner.register_forward_hook(note("projection after")),
    ]
    try:
        torch.testing.assert_close(logits(model), plain, rtol=2e-5, atol=2e-5)
        assert seen == ["model before", "layer before", "projection after", "layer after", "model after"]
        handles.append(layer.register_forward_hook(doubled))
        unmodified = small()
        unmodified.get_submodule("model.layers.0").register_forward_hook(doubled)
        changed = logits(unmodified)
        assert not torch.allclose(changed, plain)
        torch.testing.assert_close(logits(model), changed, rtol=2e-5, atol=2e-5)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(logits(model), plain, rtol=2e-5, atol=2e-5)


def test_backward_hooks_and_hooks_of_parameters_see_the_gradients(model: nn.Module) -> None:
    def seen(m: nn.Module) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        layer = m.get_submodule("model.layers.0")
        weight = m.get_parameter("model.layers.0.self_attn.q_proj.weight")
        handles = [
            layer.register_full_backward_hook(lambda _, inputs, outputs: found.update(layer=outputs[0])),
            weight.register_hook(lambda grad: found.update(weight=grad)),
            weight.register_post_accumulate_grad_hook(lambda p: found.update(accumulated=p.grad.clone())),
        ]
        m(**BATCH).loss.backward()
        for handle in handles:
            handle.remove()
        m.zero_grad()
        return found

    got, want = seen(model), seen(small())
    assert got.keys() == want.keys() == {"layer", "weight", "accumulated"}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_a_deep_copy_is_a_model_of_its_own(model: nn.Module) -> None:
    want = logits(model)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), want, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not logits(copied).any(), "the copy answered with the weights of the model that it was copied from"
    torch.testing.assert_close(logits(model), want)
    train(copied, batches(2, 2, LENGTH))
    torch.testing.assert_close(logits(model), want)


def test_rewriting_twice_is_rewriting_once() -> None:
    model = small()
    before = attributes(model)
    for _ in range(2):
        assert kreg.rewrite(model, example_inputs={"input_ids": IDS}, verify=False) is model
        assert replaced(model) == {"attention": 1}
        with answered(model, 1):
            logits(model)
    assert attributes(kreg.restore(model)) == before


def test_restore_after_training_leaves_the_trained_weights_and_no_trace() -> None:
    model = small()
    before = attributes(model)
    kreg.rewrite(model, example_inputs=BATCH, verify=False)
    with answered(model, 3):
        train(model.train(), batches(3, 2, LENGTH))
    want = logits(model.eval())
    assert kreg.restore(model) is model
    after = attributes(model)
    assert after.keys() == before.keys()
    for path, values in after.items():
        assert values.keys() == before[path].keys(), path
    assert not any(m._compiled_call_impl for m in model.modules())
    torch.testing.assert_close(logits(model), want, rtol=2e-5, atol=2e-5)
    train(model.train(), batches(1, 2, LENGTH))
    with pytest.raises(ValueError, match="was not rewritten"):
        kreg.report(model)


def test_restore_brings_back_a_compiled_call_that_was_there() -> None:
    model = small()
    layer = model.get_submodule("model.layers.0")
    layer.compile(backend="eager")
    before = layer._compiled_call_impl
    kreg.rewrite(model, example_inputs={"input_ids": IDS}, verify=False)
    kreg.restore(model)
    assert layer._compiled_call_impl is before


def test_without_inputs_or_a_config_nothing_is_traced_before_the_first_call() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    x = torch.randn(2, 8, 16)
    want = model(x)
    kreg.rewrite(model, verify=False)
    assert not torch._dynamo.utils.counters["stats"]
    assert kreg.report(model).sites == ()
    torch.testing.assert_close(model(x), want, rtol=2e-5, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert replaced(model) == {"attention": 2}


def test_with_a_config_or_inputs_the_report_is_printed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    kreg.rewrite(small(), example_inputs={"input_ids": IDS}, verify=False)
    assert re.search(r"Qwen3ForCausalLM on cpu: 1 of 1 site replaced", capsys.readouterr().out)


def test_other_models_of_the_class_and_the_class_itself_are_not_touched() -> None:
    other = small()
    before, flags = attributes(other), global_flags()
    classes = {type(m): dict(vars(type(m))) for m in other.modules()}
    model = kreg.rewrite(small(), example_inputs={"input_ids": IDS}, verify=False)
    logits(model)
    assert attributes(other) == before
    assert all(vars(kind) == values for kind, values in classes.items())
    assert global_flags() == flags
    with pytest.raises(ValueError, match="was not rewritten"):
        kreg.report(other)


def global_flags() -> tuple[Any, ...]:
    """What a rewrite might forget to put back."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().tolist(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch._dynamo.config.specialize_float,
        torch._dynamo.config.recompile_limit,
        nn.Module.__call__,
    )


def test_train_and_eval_switch_dropout_as_before(model: nn.Module) -> None:
    dropping = small(attention_dropout=0.5, attn_implementation="eager")
    want = logits(dropping)
    kreg.rewrite(dropping, example_inputs={"input_ids": IDS}, verify=False)
    dropping.train()
    first, second = logits(dropping), logits(dropping)
    assert not torch.equal(first, second), "dropout does nothing"
    dropping.eval()
    torch.testing.assert_close(logits(dropping), want, rtol=2e-5, atol=2e-5)
    assert all(not m.training for m in dropping.modules())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to float64", "to meta and back"])
def test_a_cast_or_moved_model_answers_in_its_new_dtype(cast: str) -> None:
    model = kreg.rewrite(small(), example_inputs={"input_ids": IDS}, verify=False)
    plain = small()
    for m in (model, plain):
        if cast == "to float64":
            m.to(torch.float64)
        elif cast == "to meta and back":
            m.to("meta").to_empty(device="cpu").load_state_dict(small().state_dict())
            for name, buffer in small().named_buffers():  # not in the state
                m.get_buffer(name).copy_(buffer)
        else:
            getattr(m, cast)()
    got, want = logits(model), logits(plain)
    assert got.dtype == want.dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(got.dtype, 2e-5)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert kreg.report(model).calls.rewritten >= 1 or cast == "to float64"


def test_new_layers_and_frozen_parameters_are_seen(model: nn.Module) -> None:
    """The model stays open to change: what is put in place of a module after the rewrite is what runs."""
    changed = copy.deepcopy(small())
    kreg.rewrite(changed, example_inputs={"input_ids": IDS}, verify=False)
    plain = small()
    for m in (changed, plain):
        torch.manual_seed(3)
        m.get_submodule("model.layers.0.self_attn").q_proj = nn.Linear(64, 64, bias=False)
        m.get_submodule("model.layers.0.mlp").requires_grad_(False)
    torch.testing.assert_close(logits(changed), logits(plain), rtol=2e-5, atol=2e-5)
    changed(**BATCH).loss.backward()
    assert changed.get_parameter("model.layers.0.mlp.up_proj.weight").grad is None
    assert changed.get_parameter("model.layers.0.self_attn.q_proj.weight").grad is not None


def test_the_account_is_of_this_model_alone(model: nn.Module) -> None:
    assert attached(model).account.model == "Qwen3ForCausalLM"
    other = kreg.rewrite(small(), example_inputs={"input_ids": IDS}, verify=False)
    with answered(model, 0), answered(other, 1):
        logits(other)
