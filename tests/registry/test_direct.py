"""An op called past the dispatcher gives what the operator gives: results, gradients, and none where none may be."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kreg.registry.calls import fallbacks
from kreg.registry.direct import direct
from kreg.registry.library import overload
from kreg.registry.ops import ATTENTION

CONSTANTS = {"scale": 0.3, "causal": True, "kernel": "kreg.tiled_attention"}


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 4, 6, 8), "k": (1, 2, 6, 8), "v": (1, 2, 6, 8), "bias": (1, 4, 6, 6)}
    return {n: torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for n, s in shapes.items()}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("names", [("q", "k", "v"), ("q", "k", "v", "bias")])
def test_results_and_gradients_are_the_operators(names, alone):
    given = tensors()
    inputs = [given[name] for name in names]
    found = direct(ATTENTION, names, CONSTANTS, alone=alone)(*inputs)
    out = found if alone else found[0]
    want, _ = overload(ATTENTION)(*inputs, **CONSTANTS)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    grad = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad(o, inputs, grad) for o in (out, want))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_gradients_are_those_that_are_needed():
    given = tensors()
    run = direct(ATTENTION, ("q", "k", "v"), CONSTANTS, alone=True)
    for needed in ("q", "k", "v"):
        inputs = [given[name].detach().requires_grad_(name == needed) for name in ("q", "k", "v")]
        run(*inputs).sum().backward()
        assert [x.grad is not None for x in inputs] == [name == needed for name in ("q", "k", "v")]


def test_an_attribute_that_each_call_gives_comes_after_the_tensors():
    given, attributes = tensors(), {"scale": 0.3, "causal": True, "kernel": ""}
    inputs = [given[name] for name in ("q", "k", "v")]
    run = direct(ATTENTION, ("q", "k", "v", "window"), attributes, alone=True)
    for window in (1, 3):
        want = overload(ATTENTION)(*inputs, **attributes, window=window)[0]
        torch.testing.assert_close(run(*inputs, window), want, rtol=0, atol=0)


def test_a_second_derivative_is_an_error():
    given = tensors()
    q = given["q"]
    out = direct(ATTENTION, ("q", "k", "v"), CONSTANTS, alone=True)(q, given["k"], given["v"])
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("alone", [True, False])
def test_modes_see_the_operator(alone):
    given = tensors()
    inputs = [given[name].detach() for name in ("q", "k", "v")]
    run = direct(ATTENTION, ("q", "k", "v"), CONSTANTS, alone=alone)
    with _Seen() as seen:
        found = run(*inputs)
    assert "kreg::attention" in seen.names
    torch.testing.assert_close(found if alone else found[0], run(*inputs) if alone else run(*inputs)[0])


def test_a_kernel_that_raises_is_answered_for_by_the_reference():
    given = tensors()
    inputs = [given[name] for name in ("q", "k", "v")]
    before = fallbacks.total()
    run = direct(ATTENTION, ("q", "k", "v"), CONSTANTS | {"kernel": "torch_npu.fusion_attention"}, alone=True)
    want = overload(ATTENTION)(*inputs, scale=0.3, causal=True)[0]
    torch.testing.assert_close(run(*inputs), want)
    assert fallbacks.total() > before
