"""Whether a kernel computes its op, on random inputs, before anything of it is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kreg.bench.gpu_case import GROUPED, SMALL_HEADS, Case
from kreg.bench.gpu_cases import arguments
from kreg.registry.calls import Kernel, bind, call_facts, facts_names, results
from kreg.registry.constraints import Constraint
from kreg.registry.op import Op, largest_difference
from kreg.registry.spec import KernelSpec

FULL_SIZE = {
    "sparse_attention": [Case("sparse_attention", layer, "forward", 1, 640) for layer in ("sliding", "selected")]
    + [
        Case("sparse_attention", "compressed", "forward", 1, 640),
        Case("sparse_attention", "selected", "decode", 2, 4096),
    ],
    "lightning_indexer": [
        Case("lightning_indexer", "selected", "forward", 1, 4096),
        Case("lightning_indexer", "selected", "decode", 2, 65536),
    ],
    "attention": [
        Case("attention", "causal", "forward", 1, 640, GROUPED),
        Case("attention", "window", "forward", 1, 640, replace(GROUPED, window=200)),
        Case("attention", "sinks", "forward", 1, 640, SMALL_HEADS),
    ],
    "sparse_mqa_sink": [Case("sparse_mqa_sink", "selected", "decode", 8, 4096)],
    "indexer_topk": [Case("indexer_topk", "selected", "decode", 2, 65536)],
}
"""Calls at a real model's widths, few enough for a reference in float64."""


@dataclass(frozen=True)
class Check:
    """A kernel against its op's reference in float64.

    Attributes:
        calls: how many were compared.
        error: the largest error of a result, as a part of what is accepted; ``gradient_error`` likewise.
        failed: which call was wrong, or raised; "": none.
    """

    kernel: str
    calls: int
    error: float
    gradient_error: float
    failed: str = ""

    @property
    def passed(self) -> bool:
        """Whether all were within tolerance."""
        return not self.failed and self.calls > 0


def check(spec: KernelSpec, op: Op, dtype: torch.dtype, device: str, full_size: bool | None = None) -> Check:
    """Compare on the op's own samples, and (on a GPU) at a real model's sizes, gradients included."""
    kernel = Kernel.of(spec)
    constraints = [Constraint.parse(text, facts_names(op)) for text in spec.constraints]
    calls, worst, worst_gradient = 0, 0.0, 0.0
    for label, sample in _samples(op, dtype, device, device == "cuda" if full_size is None else full_size):
        given = bind(op, (), dict.fromkeys(op.optional) | sample)
        facts = call_facts(op, given)
        if not all(c.holds(facts) for c in constraints):
            continue
        calls += 1
        try:
            error, gradient = _errors(op, kernel, given, dtype, spec.trains)
        except Exception as problem:
            reason = f"{label} raised {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            return Check(spec.name, calls, worst, worst_gradient, reason)
        worst, worst_gradient = max(worst, error), max(worst_gradient, gradient)
        if not (error <= 1 and gradient <= 1):
            what = f"{label}: {error:.2g} of the accepted error in its result, {gradient:.2g} in its gradients"
            return Check(spec.name, calls, worst, worst_gradient, what)
    failed = "" if calls else "it takes none of the op's samples"
    return Check(spec.name, calls, worst, worst_gradient, failed)


def _samples(op: Op, dtype: torch.dtype, device: str, full_size: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, sample in enumerate(op.samples(dtype, torch.Generator().manual_seed(0))):
        moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in sample.items()}
        yield f"sample {number}", moved
    for case in FULL_SIZE.get(op.name, []) if full_size else []:
        yield case.label, arguments(case, dtype, device, seed=1)


def _errors(op: Op, kernel: Kernel, given: dict[str, Any], dtype: torch.dtype, trains: bool) -> tuple[float, float]:
    """Largest error of results and of gradients, each as a part of what is accepted."""
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in given.items()}
    needs = [name for name in op.differentiable if given.get(name) is not None]
    leaves = {name: wide[name].detach().requires_grad_() for name in needs}
    got = results(kernel.forward(**given))
    want = results(op.reference(**(wide | leaves)))
    error = _part(op, dtype, op.error(given, got, want), want[0])
    slot = next((i for i, result in enumerate(want) if result.requires_grad and got[i].numel()), None)
    # An indexer's own order of equal scores decides where its gradient goes: judged where it is a score's.
    if not trains or slot is None or op.error is not largest_difference:
        return error, 0.0
    grad = torch.randn(want[slot].shape, dtype=torch.float64, device=want[slot].device)
    wanted = torch.autograd.grad(want[slot], list(leaves.values()), grad, allow_unused=True)
    grads = tuple(grad.to(result.dtype) if i == slot else None for i, result in enumerate(got))
    found = kernel.gradient(grads, got, frozenset(needs), **given)
    worst = 0.0
    for name, exact in zip(needs, wanted, strict=True):
        exact = torch.zeros_like(leaves[name]) if exact is None else exact
        worst = max(worst, _part(op, dtype, largest_difference(given, (found[name],), (exact,)), exact))
    return error, worst


def _part(op: Op, dtype: torch.dtype, error: float, want: torch.Tensor) -> float:
    """An error as a part of what the op's tolerance accepts."""
    tolerance = op.tolerances[dtype]
    scale = float(want.detach().double().nan_to_num(posinf=0, neginf=0).abs().max()) if want.numel() else 0.0
    return error / (tolerance.atol + tolerance.rtol * (scale if op.error is largest_difference else 1.0))
