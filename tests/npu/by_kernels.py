"""A dispatch mode under which kreg's ops run their kernels on fake tensors, so that torch_npu checks every call.

On fake tensors an op answers by its own shape rule, and the kernel is never called. Here it is: its operators of
torch_npu get fake tensors, so that the dispatcher checks their schemas and torch_npu's rules their shapes and dtypes;
then its results are held against the op's rule, which the graph was captured with.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kreg.registry import library
from kreg.registry.calls import bind, defined, fallbacks, judged
from kreg.registry.op import Op


@dataclass
class Calls:
    """What ran: kernels by (op, kernel, "forward" or "backward"), and torch_npu's operators by name."""

    kernels: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)

    def of(self, direction: str) -> Counter[str]:
        """Calls by kernel, in one direction."""
        found: Counter[str] = Counter()
        for (_, kernel, way), count in self.kernels.items():
            if way == direction:
                found[kernel] += count
        return found


@contextlib.contextmanager
def by_kernels() -> Iterator[Calls]:
    """Runs what is inside with kernels; one that raises is not answered for by the reference, nor one left out."""
    before = fallbacks.total()
    calls = Calls()
    with judged(), _ByKernels(calls):
        yield calls
    assert fallbacks.total() == before, dict(fallbacks)


class _ByKernels(TorchDispatchMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "npu":
            self.calls.operators[func._schema.name.removeprefix("npu::")] += 1
        if func.namespace != "kreg":
            return func(*args, **kwargs)
        name, backward = func._schema.name.removeprefix("kreg::"), False
        if name not in defined:
            name, backward = name.removesuffix("_backward"), True
        op, kernel = defined[name], kwargs["kernel"] if backward else kwargs.get("kernel", "")
        want = func(*args, **kwargs)
        # a mode stands below autograd; an op's kernel does not, and one without a backward is differentiated
        with torch.overrides.enable_reentrant_dispatch(), self:
            got = library._call_backward(op, *args, **kwargs) if backward else self._forward(op, args, kwargs)
        self.calls.kernels[name, kernel.removesuffix("?"), "backward" if backward else "forward"] += 1
        _same(op, kernel, got, want)
        return got

    @staticmethod
    def _forward(op: Op, args: Any, kwargs: Any) -> Any:
        found = library._called(op, bind(op, args, kwargs))
        return found[0] if op.outputs == 1 else found


def _same(op: Op, kernel: str, got: Any, want: Any) -> None:
    """Results as the graph was captured with: also their strides, which a view behind them may rely on."""
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    for number, (mine, rule) in enumerate(pairs):
        described = [(tuple(t.shape), t.dtype, t.device, _strides(t)) for t in (mine, rule)]
        assert described[0] == described[1], f"{op.name} by {kernel or 'its reference'}: result {number}: {described}"


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of dimensions that have more than one place."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1) if tensor.numel() else ()
