"""The judge: a program is rewritten without verification and held against itself, forward and backward.

What is right is what the module computes, run in float64 with the same numbers. A rewritten program may err by a
small multiple of what the module itself errs by in its own dtype, and by a floor. NaN and infinities must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kreg.api import settings_for
from kreg.errors import CaptureError
from kreg.rewriters import program as programs
from kreg.rewriters.capture import export_model
from kreg.rewriters.pipeline import Clock, rewrite_graph
from kreg.rewriters.report import Report
from tests.fuzz import attention, indexer
from tests.fuzz.forms import Attention, Program
from tests.fuzz.twists import growth_of, step_of

MULTIPLE = 8.0
"""How often the error of the module a rewritten one may make: both are sums in an order of their own."""

FLOORS = {torch.float64: 256, torch.float32: 128, torch.bfloat16: 4}
"""Errors that are none, in units of the dtype's epsilon and of the largest element (of size 1 at least)."""

LARGE = 8.0
"""Factor on inputs of the call with large numbers. An error in a logit is a relative error of a weight, and logits
grow by its square, or faster where a twist multiplies by the inputs again: so does the floor."""

REFUSALS = (RuntimeError, IndexError, ValueError, AssertionError)
"""What a module raises on inputs that it does not take, and a captured program where a guard fails."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        kind: "rewritten", "untouched", "wrong"; "invalid" where the module itself does not run, "uncaptured" where
            torch.export refuses it.
        raised: ops of the sites that were replaced.
        reasons: of near misses, and of sites that were kept.
        detail: what is wrong.
    """

    kind: str
    raised: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Call:
    """One set of inputs."""

    name: str
    inputs: Inputs
    backward: bool = True
    magnitude: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What a call gave: results, and inputs as they were left; gradients of inputs and parameters, None where zero."""

    results: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] | None


def module_of(program: Program) -> nn.Module:
    """The module that computes a program, with the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = attention.FuzzedAttention if isinstance(program, Attention) else indexer.FuzzedIndexer
        return made(program).to(getattr(torch, program.dtype))  # type: ignore[arg-type]


def inputs_of(program: Program, seed: int) -> Inputs:
    """Random inputs."""
    made = attention.inputs_of if isinstance(program, Attention) else indexer.inputs_of
    return made(program, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def calls_of(program: Program) -> Iterator[Call]:
    """The captured inputs first, then others of the same shapes, then of other shapes."""
    yield Call("captured", inputs_of(program, 0))
    yield Call("captured, without gradients", inputs_of(program, 0), backward=False)
    yield Call("fresh", inputs_of(program, 1))
    if program.dtype != "bfloat16":
        large = {n: t * LARGE if t.is_floating_point() else t for n, t in inputs_of(program, 2).items()}
        yield Call("large", large, magnitude=LARGE)
    if isinstance(program, Attention):
        yield from _emptied(program)
    if program.dynamic:
        other = dataclasses.replace(program, batch=program.batch + 1, queries=program.queries + 4)
        if isinstance(other, Attention) and other.keys:
            other = dataclasses.replace(other, keys=other.keys + 2)
        yield Call("other sizes", inputs_of(other, 4))


def _emptied(program: Attention) -> Iterator[Call]:
    inputs = inputs_of(program, 3)
    if inputs.keys() & {*attention.CONDITIONS, "bias"}:
        yield Call("emptied", attention.emptied(inputs, -math.inf))
    if "bias" in inputs:
        yield Call("emptied by finfo.min", attention.emptied(inputs, torch.finfo(inputs["bias"].dtype).min))


Run = Callable[[Inputs], Tensor | tuple[Tensor, ...]]


def answer(run: Run, parameters: Mapping[str, Tensor], call: Call) -> Answer:
    """Runs a call; the inputs are copies, which may be mutated."""
    leaves = {n: t.detach().clone() for n, t in call.inputs.items()}
    given = leaves
    if call.backward:
        leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in leaves.items()}
        given = {n: t.clone() for n, t in leaves.items()}
    torch.manual_seed(5)
    with torch.set_grad_enabled(call.backward):
        out = run(given)
    outputs = (*(out if isinstance(out, tuple) else (out,)), *given.values())
    gradients = None
    if call.backward:
        wanted = [t for t in (*leaves.values(), *parameters.values()) if t.requires_grad]
        generator = torch.Generator().manual_seed(6)
        total = torch.zeros((), dtype=torch.float64)
        for o in outputs:
            cotangent = torch.randn(o.shape, generator=generator, dtype=torch.float64)
            if o.is_floating_point() and o.requires_grad:
                total = total + (o.double() * cotangent).sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else ()
    return Answer(tuple(o.detach().clone() for o in outputs), gradients)


def difference(
    name: str, got: Tensor | None, own: Tensor | None, truth: Tensor | None, floor: float, only_finite: bool
) -> str:
    """What is wrong with a tensor, held against the module's own and the true one; "" for nothing."""
    if own is None and got is None:
        return ""
    if own is None or got is None or truth is None:
        other = next(t for t in (own, got, truth) if t is not None)
        own, got, truth = (torch.zeros_like(other) if t is None else t for t in (own, got, truth))
    if got.shape != own.shape or got.dtype != own.dtype:
        return f"{name}: {got.dtype} {tuple(got.shape)} instead of {own.dtype} {tuple(own.shape)}"
    if not own.is_floating_point():
        return "" if torch.equal(got, own) else f"{name}: integers or booleans differ"
    got, own, truth = got.double(), own.double(), truth.double()
    for what, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        if not only_finite and not torch.equal(test(got), test(own)):
            return f"{name}: {int(test(got).sum())} elements are {what} instead of {int(test(own).sum())}"
    finite = torch.isfinite(own) & torch.isfinite(truth) & torch.isfinite(got)
    if not finite.any():
        return ""
    got, own, truth = got[finite], own[finite], truth[finite]
    allowed = MULTIPLE * float((own - truth).abs().max()) + floor * max(1.0, float(truth.abs().max()))
    error = float((got - truth).abs().max())
    return "" if error <= allowed else f"{name}: error {error:.2g}, allowed {allowed:.2g}"


def disagreement(new: Answer, own: Answer, truth: Answer, program: Program, call: Call) -> str:
    """The first thing that differs, or "".

    Where the module's own results hold NaN, so do its gradients, in as many places as the loss was spread to: they
    are compared where they are finite. So they are where NaN was taken out of the results, and is in the gradients
    alone; but then there has to be NaN in the new ones too.
    """
    dtype = getattr(torch, program.dtype)
    floor = FLOORS[dtype] * torch.finfo(dtype).eps * call.magnitude ** (2 + growth_of(program))
    poisoned = any(bool(torch.isnan(r).any()) for r in own.results if r.is_floating_point())
    if len(new.results) != len(own.results):
        return f"{len(new.results)} results instead of {len(own.results)}"
    for i, three in enumerate(zip(new.results, own.results, truth.results, strict=True)):
        found = difference(f"result {i}", *three, max(floor, step_of(program, ("out",))), only_finite=False)
        if found:
            return f"{call.name}: {found}"
    if own.gradients is None or new.gradients is None or truth.gradients is None:
        return ""  # autograd refused to go back where something was written
    if bool(own.gradients) != bool(new.gradients):
        return f"{call.name}: gradients flow in one of the two only"
    broken = [any(g is not None and bool(torch.isnan(g).any()) for g in a.gradients or ()) for a in (new, own)]
    if not poisoned and broken[0] != broken[1]:
        return f"{call.name}: there is NaN in the gradients of one of the two only"
    poisoned = poisoned or broken[1]
    for i, three in enumerate(zip(new.gradients, own.gradients, truth.gradients, strict=True)):
        found = difference(f"gradient {i}", *three, max(floor, step_of(program)), only_finite=poisoned)
        if found:
            return f"{call.name}: {found}"
    return ""


def judge(program: Program, verify: bool = False) -> Verdict:
    """Rewrites a program and says what became of it; rules must be right without ``verify``."""
    module = module_of(program)
    calls = list(calls_of(program))
    if not _runs(module, calls[0]):
        return Verdict("invalid")
    example = {n: t.requires_grad_(program.trained and t.is_floating_point()) for n, t in calls[0].inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = export_model(module, (example,), "auto" if program.dynamic else None)
        except CaptureError as error:
            return Verdict("uncaptured", detail=str(error))
        try:
            captured = programs.functional(exported)
            done = rewrite_graph(
                captured.module,
                settings_for("cpu", module, verify=verify),
                model=type(module).__name__,
                frontend="export",
                clock=Clock(),
            )
            rewritten = programs.finished(captured, done.module, done.report).module()
        except CaptureError as error:  # with a cause it is a failure of kreg's own
            return Verdict("wrong" if error.__cause__ else "uncaptured", detail=_one_line(error))
        except Exception as error:
            return Verdict("wrong", detail=f"the rewrite failed: {_one_line(error)}")
    raised = tuple(site.op for site in done.report.sites if site.status == "replaced")
    reasons = _reasons(done.report)
    before = cache(exported.module)
    detail = _broken_reasons(reasons) or _wrong(program, module, before, rewritten, calls)
    if detail and not _broken_reasons(reasons) and _wrong(program, module, before, before(), calls):
        return Verdict(
            "uncaptured", raised, reasons, f"the program before the rewrite differs from the module: {detail}"
        )
    if detail:
        return Verdict("wrong", raised, reasons, detail)
    return Verdict("rewritten" if raised else "untouched", raised, reasons)


def _runs(module: nn.Module, call: Call) -> bool:
    try:
        answer(module, {}, dataclasses.replace(call, backward=False))
    except REFUSALS:
        return False
    return True


def _reasons(report: Report) -> tuple[str, ...]:
    kept = (f"{site.op}: {site.reason}" for site in report.sites if site.status == "kept")
    return (*(f"{miss.op}: {miss.reason}" for miss in report.near_misses), *kept)


def _broken_reasons(reasons: tuple[str, ...]) -> str:
    bad = [r for r in reasons if "rule itself failed" in r or len(r.split()) < 5]
    return f"no reason: {bad[0]}" if bad else ""


def _wrong(
    program: Program, module: nn.Module, before: Callable[[], nn.Module], rewritten: nn.Module, calls: list[Call]
) -> str:
    exact = copy.deepcopy(module).double()
    stochastic = any("dropped out" in twist for twist in program.twists)
    for call in calls:
        own = _own_answer(module, call)
        if own is None or (call.name == "other sizes" and not _runs(before(), call)):
            continue
        if own.gradients is None and call.backward:
            call = dataclasses.replace(call, backward=False)
        wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in call.inputs.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's gradients are not exact in rows that are masked whole
            truth = own if stochastic else _own_answer(exact, _with(call, wide))
        assert truth is not None, "it ran in its own dtype"
        try:
            new = answer(rewritten, dict(rewritten.named_parameters()), call)
        except Exception as error:
            return f"{call.name}: {_one_line(error)}"
        found = disagreement(new, own, truth, program, call)
        if found:
            return found
    return ""


def _with(call: Call, inputs: Inputs) -> Call:
    return dataclasses.replace(call, inputs=inputs)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _own_answer(module: nn.Module, call: Call) -> Answer | None:
    """Eager's answer: without gradients where autograd refuses mutations, None where the sizes do not fit."""
    for backward in dict.fromkeys((call.backward, False)):
        try:
            return answer(module, dict(module.named_parameters()), dataclasses.replace(call, backward=backward))
        except REFUSALS:
            continue
    return None
