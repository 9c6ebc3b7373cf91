"""``kreg bench --device cuda``: every kernel of the attention ops, right first, then beside what else computes them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from kreg.bench import gpu_baselines as baselines
from kreg.bench import gpu_eager
from kreg.bench.gpu_case import Case
from kreg.bench.gpu_cases import arguments, work
from kreg.bench.gpu_check import Check, check
from kreg.bench.gpu_timing import Ceilings, Timer, ceilings, graphed
from kreg.bench.measure import peak_bytes
from kreg.registry.calls import Kernel, bind, call_facts, facts_names, results
from kreg.registry.catalogue import catalogue
from kreg.registry.constraints import Constraint
from kreg.registry.environment import Environment, availability
from kreg.registry.spec import KernelSpec

Progress = Callable[[str], None]
Call = Callable[[], object]
BASELINES = ("eager", "flex", "inductor")
EAGER: dict[str, Callable[[Case, dict[str, Any], bool], baselines.Forward]] = {
    "sparse_attention": baselines.eager,
    "lightning_indexer": baselines.eager,
    "attention": gpu_eager.attention,
    "sparse_mqa_sink": gpu_eager.sparse_mqa_sink,
    "indexer_topk": gpu_eager.indexer_topk,
}
NO_FLEX = {
    "attention": "FlexAttention is one of the kernels, torch.flex",
    "sparse_mqa_sink": "FlexAttention does not gather",
    "lightning_indexer": "FlexAttention has no top-k",
    "indexer_topk": "FlexAttention has no top-k",
}
LATE = ("inductor",)
"""Baselines that take what time is left when all others are measured."""
NEEDS = {"flex": 30.0, "torch.flex": 30.0, "inductor": 60.0}
"""Seconds that have to be left for a variant to be begun: it is compiled first, and a compiler is not interrupted."""
LONGEST_CALL = 5.0
"""Seconds beyond which a call is not repeated."""


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        variant: a kernel's name, or one of `BASELINES`.
        seconds: the median; None where it was not measured, and ``skipped`` says why.
        calls: how many the median is of.
        roofline: seconds that the work takes at least, by the measured ceilings.
        bound: what bounds it there, "matmul" or "copy".
        peak: bytes that one call holds above its arguments.
        launched: "by the host", or "as a CUDA graph", which decoding steps are where they can be captured.
    """

    case: Case
    variant: str
    seconds: float | None
    calls: int = 0
    roofline: float = 0.0
    bound: str = ""
    operations: float = 0.0
    moved: float = 0.0
    peak: int | None = None
    launched: str = ""
    skipped: str = ""

    @property
    def reached(self) -> float | None:
        """The part of the roofline that it reaches."""
        return None if self.seconds is None else self.roofline / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"case": self.case.label, "reached": self.reached}


@dataclass
class Run:
    """A benchmark as it goes: rows come one by one.

    Attributes:
        device: torch's name; ``timer`` measures on it.
        dtype: of queries and keys.
        limit: seconds for everything; what does not fit any more is skipped, and says so.
    """

    device: str
    dtype: torch.dtype
    timer: Timer
    limit: float
    progress: Progress = lambda step: None
    checks: list[Check] = field(default_factory=list)
    ceilings: Ceilings | None = None

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.limit - (time.monotonic() - self._began)

    def rows(self, cases: Sequence[Case], *, ceiling_size: int = 8192, moved: int = 2**31) -> Iterator[Row]:
        """Correctness, ceilings, every kernel's cases, and then the baselines', as far as the time goes.

        The sparse ops come first: of dense attention no kernel is kreg's own.
        """
        kernels = {op: self._kernels(op) for op in dict.fromkeys(case.op for case in cases)}
        right: dict[str, list[KernelSpec]] = {}
        for op, specs in kernels.items():
            for spec in specs:
                self.progress(f"checking {spec.name}")
                found = check(spec, catalogue().op(op), self.dtype, self.device)
                self.checks.append(found)
                if found.passed:
                    right.setdefault(op, []).append(spec)
        self.progress("measuring a matrix product and a copy")
        self.ceilings = ceilings(self.dtype, self.device, self.timer, ceiling_size, moved)
        for some in ([c for c in cases if c.op != "attention"], [c for c in cases if c.op == "attention"]):
            for case in some:
                for spec in right.get(case.op, []):
                    if case.step != "backward" or spec.trains:
                        yield self._row(case, spec.name, partial(_kernel_call, spec, case))
            yield from self._baselines(some, [name for name in BASELINES if name not in LATE])
        yield from self._baselines(cases, [name for name in BASELINES if name in LATE])

    def _baselines(self, cases: Sequence[Case], names: Sequence[str]) -> Iterator[Row]:
        for name in names:
            for case in cases:
                yield self._row(case, name, partial(_baseline_call, name, case))

    def _kernels(self, op: str) -> list[KernelSpec]:
        here = Environment.detect(self.device)
        name = str(self.dtype).removeprefix("torch.")
        return [s for s in catalogue().kernels_for(op) if not availability(s, here) and name in s.dtypes]

    def _row(self, case: Case, variant: str, made: Callable[[dict[str, Any]], Call]) -> Row:
        if self.left <= NEEDS.get(variant, 0.0):
            return Row(case, variant, None, skipped="no time is left")
        self.progress(f"{case.label}: {variant}")
        try:
            return self._measured(case, variant, made)
        except baselines.Skip as reason:
            return Row(case, variant, None, skipped=str(reason))
        except torch.OutOfMemoryError:
            return Row(case, variant, None, skipped="out of memory")
        except Exception as error:  # a compiler's, a launch's: the other rows are still worth having
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return Row(case, variant, None, skipped=text)
        finally:
            self._release()

    def _measured(self, case: Case, variant: str, made: Callable[[dict[str, Any]], Call]) -> Row:
        assert self.ceilings is not None
        call = made(arguments(case, self.dtype, self.device))
        start = time.monotonic()
        peak = peak_bytes(call, self.device)  # the first call: it compiles what has to be compiled
        if self.device == "cuda":
            torch.cuda.synchronize()
        first = time.monotonic() - start
        if first > LONGEST_CALL and self.left < 4 * first:
            raise baselines.Skip(f"its first call took {first:.0f} s, and {max(0.0, self.left):.0f} s are left")
        launched = "by the host"
        if case.decodes and self.device == "cuda":
            try:
                call, launched = graphed(call), "as a CUDA graph"
            except RuntimeError:
                torch.cuda.synchronize()
        seconds, calls = self.timer.median(call, budget=0.3)
        operations, moved = work(case, self.dtype.itemsize)
        least, bound = self.ceilings.seconds(operations, moved), self.ceilings.bound(operations, moved)
        return Row(case, variant, seconds, calls, least, bound, operations, moved, peak, launched)

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _kernel_call(spec: KernelSpec, case: Case, given: dict[str, Any]) -> Call:
    op = catalogue().op(case.op)
    given = bind(op, (), given)
    facts = call_facts(op, given)
    for text in spec.constraints:
        constraint = Constraint.parse(text, facts_names(op))
        if not constraint.holds(facts):
            raise baselines.Skip(constraint.explain(facts))
    kernel = Kernel.of(spec)
    if case.step != "backward":
        return lambda: kernel.forward(**given)
    outputs = results(kernel.forward(**given))
    grads = (torch.randn_like(outputs[0]), *(None for _ in outputs[1:]))
    needs = frozenset(name for name in op.differentiable if given.get(name) is not None)
    run = kernel.gradient
    return lambda: run(grads, outputs, needs, **given)


def _baseline_call(name: str, case: Case, given: dict[str, Any]) -> Call:
    if name == "flex" and case.op in NO_FLEX:
        raise baselines.Skip(NO_FLEX[case.op])
    if case.step == "backward":
        for key in catalogue().op(case.op).differentiable:
            if given.get(key) is not None:
                given[key].requires_grad_()
    forward = baselines.flex(case, given) if name == "flex" else EAGER[case.op](case, given, name == "inductor")
    if case.step != "backward":

        def without_gradient() -> object:
            with torch.no_grad():
                return forward()

        return without_gradient
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out = forward()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)
