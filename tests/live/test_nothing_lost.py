"""Whatever goes wrong, the call is answered as the unmodified model answers it, and the report says why."""

from __future__ import annotations

import copy
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import kreg
from kreg.registry.ops.attention import ATTENTION
from kreg.rewriters.live import calls as live
from kreg.rewriters.live import variants
from kreg.rewriters.rules import RULES
from tests.live.models import qwen3
from tests.live.training import batches, gradients

LENGTH = 32
(BATCH,) = batches(1, 2, LENGTH)
KERNEL = "test.fragile"


class Fragile:
    """A user's kernel: the reference, and it raises where it is told to."""

    forward_raises: type[Exception] | None = None
    backward_raises: type[Exception] | None = None


@kreg.kernel(
    op="attention",
    name=KERNEL,
    summary="raises when asked to",
    backward=lambda grads, outputs, needs, **arguments: fragile_backward(grads, needs, arguments),
    devices=["cpu"],
    dtypes=["float32"],
    constraints=["keys % 16 == 0"],
    trains=True,
    cost={"efficiency": 1e-6},  # chosen where it is asked for, and nowhere else
)
def fragile(**arguments: Any) -> tuple[torch.Tensor, ...]:
    if Fragile.forward_raises:
        raise Fragile.forward_raises("the forward kernel has lost its way")
    return ATTENTION.reference(**arguments)


def fragile_backward(grads: Any, needs: frozenset[str], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    if Fragile.backward_raises:
        raise Fragile.backward_raises("the backward kernel has lost its way")
    with torch.enable_grad():
        leaves = {name: arguments[name].detach().requires_grad_() for name in sorted(needs)}
        output, _ = ATTENTION.reference(**(arguments | leaves))
        found = torch.autograd.grad(output, list(leaves.values()), grads[0])
    return dict(zip(leaves, found, strict=True))


@pytest.fixture(autouse=True)
def _sound() -> Iterator[None]:
    Fragile.forward_raises = Fragile.backward_raises = None
    yield
    Fragile.forward_raises = Fragile.backward_raises = None
    assert _get_current_dispatch_mode() is None, "a mode was left active"


@pytest.fixture
def original() -> nn.Module:
    return qwen3(num_hidden_layers=2, use_cache=False)


def rewritten(original: nn.Module, **options: Any) -> nn.Module:
    return kreg.rewrite(copy.deepcopy(original), **({"example_inputs": BATCH, "verify": False} | options))


def assert_answers(model: nn.Module, original: nn.Module, batch: dict[str, Any] = BATCH) -> None:
    """Loss and gradients as the unmodified model has them; what a rewrite is for."""
    torch.testing.assert_close(model(**batch).loss, original(**batch).loss, rtol=1e-5, atol=1e-5)
    got, want = gradients(model, [batch]), gradients(original, [batch])
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def fallbacks(model: nn.Module) -> dict[str, int]:
    return dict(kreg.report(model).calls.fallbacks)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def with_fragile() -> Iterator[nn.Module]:
    """A model whose attention runs the user's kernel."""
    torch._dynamo.reset()
    model = rewritten(qwen3(num_hidden_layers=2, use_cache=False), enable=[KERNEL])
    assert {site.kernel for site in kreg.report(model).sites if site.op == "attention"} == {KERNEL}
    yield model
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_kernel_that_raises_is_answered_for_logged_once_and_counted(
    with_fragile: nn.Module, original: nn.Module, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = fallbacks(with_fragile)
    setattr(Fragile, f"{where}_raises", RuntimeError)
    with caplog.at_level(logging.WARNING, "kreg"):
        assert_answers(with_fragile, original)
        assert_answers(with_fragile, original)
    said = [message for message in warnings_of(caplog) if f"the {where} kernel has lost its way" in message]
    assert len(said) == 1 and KERNEL in said[0]
    reasons = {reason: n for reason, n in fallbacks(with_fragile).items() if reason not in before}
    assert any(KERNEL in reason and f"the {where} kernel has lost its way" in reason for reason in reasons)
    setattr(Fragile, f"{where}_raises", None)
    counted = fallbacks(with_fragile)
    assert_answers(with_fragile, original)
    assert fallbacks(with_fragile) == counted, "a sound kernel is not counted"


def test_out_of_memory_is_the_users_to_handle(with_fragile: nn.Module, original: nn.Module) -> None:
    Fragile.forward_raises = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        with_fragile(**BATCH)
    Fragile.forward_raises = None
    assert_answers(with_fragile, original)


def test_a_shape_that_the_plan_does_not_cover_is_answered_by_the_reference_and_counted(
    with_fragile: nn.Module, original: nn.Module
) -> None:
    (odd,) = batches(1, 2, LENGTH - 5)
    before = fallbacks(with_fragile)
    assert_answers(with_fragile, original, odd)
    after = fallbacks(with_fragile)
    assert sum(after.values()) > sum(before.values()), "27 keys are no multiple of 16"
    assert any("keys % 16 == 0" in reason for reason in after)


def test_calls_beyond_the_limit_of_graphs_run_the_original_code(
    original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(live, "GRAPHS", -1)
    model = rewritten(original)
    assert_answers(model, original)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(model(**BATCH).loss, original(**BATCH).loss, rtol=1e-5, atol=1e-5)
    other = BATCH | {"attention_mask": torch.ones_like(BATCH["input_ids"]).index_fill(1, torch.tensor([0]), 0)}
    assert_answers(model, original, other)
    calls = kreg.report(model).calls
    assert calls.original > 0
    assert calls.rewritten + calls.original == 6


def breaking_rule() -> kreg.Rule:
    """A user's rule that breaks in a way that its author did not think of."""

    def find(context: Any, anchor: Any) -> Any:
        raise ZeroDivisionError("a rule's own mistake")

    return kreg.Rule(op=ATTENTION, is_anchor=lambda node: node.op == "call_function", find=find)


def test_a_rule_that_breaks_takes_nothing_with_it(original: nn.Module) -> None:
    kreg.register(breaking_rule())
    try:
        model = rewritten(original)
    finally:
        RULES.pop(0)
    assert any("a rule's own mistake" in miss.reason for miss in kreg.report(model).near_misses)
    assert_answers(model, original)


@pytest.mark.parametrize("stage", ["functionalize", "continue_past", "rewrite_graph", "settle", "reuse"])
@pytest.mark.parametrize("when", ["in rewrite", "in the first call"])
def test_an_exception_in_capture_leaves_the_original_code_to_answer(
    original: nn.Module, stage: str, when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every stage of making a graph is made to fail; nothing but the failure is not real."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError(f"{stage} was made to fail")

    eager = copy.deepcopy(original)
    for m in (original, eager):
        m.set_attn_implementation("eager")  # masks are made outside the layers, and continue_past has work to do
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "kreg"):
        if when == "in rewrite":
            monkeypatch.setattr(variants, stage, fails)
            model = rewritten(original)
        else:
            model = kreg.rewrite(nn.Sequential(copy.deepcopy(original)), verify=False)[0]
            monkeypatch.setattr(variants, stage, fails)
        assert_answers(model, eager)
        assert_answers(model, eager)
    said = [message for message in warnings_of(caplog) if f"{stage} was made to fail" in message]
    assert said and len(said) == len(set(said))
    if when == "in rewrite":
        assert any(f"{stage} was made to fail" in reason for reason in fallbacks(model))
        calls = kreg.report(model).calls
        # a mask whose makers are unknown is an input like any other: the graph that rests on nothing answers
        assert (calls.rewritten, calls.original) == ((4, 0) if stage == "continue_past" else (0, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_changed_default_dtype_changes_nothing(original: nn.Module, dtype: torch.dtype) -> None:
    model = rewritten(original)
    torch.set_default_dtype(dtype)
    try:
        assert_answers(model, original)
        other = rewritten(original, verify=True)
        assert_answers(other, original)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(site.status == "replaced" for site in kreg.report(other).sites), "verified under that dtype too"
    assert_answers(model, original)


def test_a_changed_default_device_changes_nothing(original: nn.Module) -> None:
    model = rewritten(original)
    with torch.device("cpu"):
        assert_answers(model, original)
    torch.set_default_device("meta")
    try:
        want = outcome(lambda: original(**BATCH).loss)
        got = outcome(lambda: model(**BATCH).loss)
        other = outcome(lambda: rewritten(original, verify=True)(**BATCH).loss)
    finally:
        torch.set_default_device(None)
    assert type(got) is type(want) and type(other) is type(want)
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other, want, rtol=1e-5, atol=1e-5)
    assert_answers(model, original)


def outcome(run: Callable[[], Any]) -> Any:
    """What a call gives, or the exception that it ends in."""
    try:
        return run()
    except Exception as error:
        return error


@pytest.mark.parametrize("captured", [True, False], ids=["captured before", "captured by both"])
def test_threads_that_call_one_model_get_their_own_answers(original: nn.Module, captured: bool) -> None:
    torch._dynamo.reset()
    model = rewritten(original) if captured else rewritten_uncaptured(original)
    data = batches(4, 2, LENGTH)
    want = [original(**batch).loss.detach() for batch in data]
    found: dict[tuple[int, int], Any] = {}
    start = threading.Barrier(len(data))

    def work(i: int) -> None:
        start.wait()
        for turn in range(3):
            with torch.set_grad_enabled(i % 2 == 0):
                found[i, turn] = outcome(lambda: model(**data[i]).loss.detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (i, _), loss in found.items():
        assert isinstance(loss, torch.Tensor), loss
        torch.testing.assert_close(loss, want[i], rtol=1e-5, atol=1e-5)
    assert len(found) == 12
    calls = kreg.report(model).calls
    assert calls.rewritten + calls.original == 12
    assert calls.rewritten > 0
    assert_answers(model, original)


def rewritten_uncaptured(original: nn.Module) -> nn.Module:
    """A model that its first call captures: it has no config to derive inputs from while it is rewritten."""
    model = copy.deepcopy(original)
    config, model.config = model.config, None
    kreg.rewrite(model, verify=False)
    model.config = config
    assert kreg.report(model).sites == ()
    return model


STAGES = {
    "the model's own code": (nn.Embedding, "forward"),
    "functionalize": (variants, "functionalize"),
    "rewrite": (variants, "rewrite_graph"),
    "run": (torch.fx.GraphModule, "recompile"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("when", ["in rewrite", "in the first call"])
def test_a_keyboard_interrupt_leaves_the_model_whole(
    original: nn.Module, stage: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    model = copy.deepcopy(original) if when == "in rewrite" else rewritten_uncaptured(original)
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], interrupted)
        with pytest.raises(KeyboardInterrupt):
            if when == "in rewrite":
                kreg.rewrite(model, example_inputs=BATCH, verify=False)
            else:
                model(**BATCH)
    assert _get_current_dispatch_mode() is None
    assert {path: dict(vars(m)) for path, m in model.named_modules()} == before
    assert_answers(model, original)
    if when == "in rewrite":
        kreg.rewrite(model, example_inputs=BATCH, verify=False)
    assert_answers(model, original)
    assert kreg.report(model).summary["attention"] == {"found": 2, "replaced": 2}
    assert kreg.report(model).calls.rewritten > 0


@pytest.mark.parametrize("seconds", [0.3, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.05, 0.1, 0.6, 1.0))])
def test_a_real_interrupt_at_any_time_leaves_the_model_whole(original: nn.Module, seconds: float) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(original)

    def ring(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        kreg.rewrite(model, example_inputs=BATCH, verify=False)
        model(**BATCH)
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert_answers(model, original)
    kreg.rewrite(model, example_inputs=BATCH, verify=False)
    assert_answers(model, original)
    assert kreg.report(model).calls.rewritten > 0
