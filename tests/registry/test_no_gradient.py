"""Results that are constants to autograd: a gradient of one that is asked for is an error, not a silent zero."""

from __future__ import annotations

import pytest
import torch

from kreg.registry.catalogue import catalogue
from kreg.registry.direct import direct
from kreg.registry.library import overload
from kreg.registry.ops import ATTENTION, SELECTED_ATTENTION, SPARSE_ATTENTION

CASES = [
    (op, kernel)
    for op in (ATTENTION, SELECTED_ATTENTION, SPARSE_ATTENTION)
    for kernel in ("", *(spec.name for spec in catalogue().kernels_for(op.name) if "cpu" in spec.devices))
    if kernel != "torch.sdpa"  # which gives no lse at all
]


def called_directly(op):
    def run(*positional, **rest):
        given = {**dict(zip(op.arguments, positional, strict=False)), **rest}
        tensors = {name: given.pop(name) for name in op.tensors if given.get(name) is not None}
        return direct(op, tuple(tensors), {name: given[name] for name in given if name not in op.tensors})(
            *tensors.values()
        )

    return run


@pytest.mark.parametrize("made", [overload, called_directly], ids=["operator", "direct"])
@pytest.mark.parametrize(("op", "kernel"), CASES, ids=[f"{op.name}-{kernel or 'reference'}" for op, kernel in CASES])
def test_lse_passes_no_gradient_on(op, kernel, made):
    sample = list(op.samples(torch.float64, torch.Generator().manual_seed(0)))[1]
    given = {
        name: value.clone().requires_grad_() if name in op.differentiable and isinstance(value, torch.Tensor) else value
        for name, value in sample.items()
    }
    positional = [a.name for a in op.parsed.arguments if not a.kwarg_only]
    rest = {name: value for name, value in given.items() if name not in positional}
    out, lse = made(op)(*[given.get(name) for name in positional], **rest, kernel=kernel)
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()
    assert given["q"].grad is not None and bool(given["q"].grad.any())
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()
