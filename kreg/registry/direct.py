"""An op's call past the dispatcher, with its gradient: little more than its kernel.

What is the same at every call is put together once. Fake tensors, subclasses, dispatch modes and the profiler get the
operator itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kreg.registry.calls import call, gradients
from kreg.registry.library import overload
from kreg.registry.op import Op

PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class _Bound:
    """An op with what is the same at every call.

    Attributes:
        tensors: names of the tensors that a call gives.
        others: names of the other arguments that it gives, after them.
        fixed: all other arguments, with their defaults.
        alone: only the first result is asked for.
    """

    op: Op
    kernel: str
    tensors: tuple[str, ...]
    others: tuple[str, ...]
    fixed: Mapping[str, Any]
    alone: bool
    needed: dict[tuple[bool, ...], frozenset[str]] = field(default_factory=dict)

    def arguments(self, tensors: Sequence[torch.Tensor], others: Sequence[Any]) -> dict[str, Any]:
        """All arguments of a call, by name."""
        found = {**self.fixed}
        found.update(zip(self.tensors, tensors, strict=True))
        found.update(zip(self.others, others, strict=True))
        return found

    def wanted(self, needs: tuple[bool, ...]) -> frozenset[str]:
        """Names of the tensors whose gradients are needed."""
        if needs not in self.needed:
            pairs = zip(self.tensors, needs, strict=True)
            self.needed[needs] = frozenset(name for name, need in pairs if need and name in self.op.differentiable)
        return self.needed[needs]


def direct(op: Op, names: Sequence[str], constants: Mapping[str, Any], *, alone: bool = False) -> Callable[..., Any]:
    """``torch.ops.kreg.<name>`` without the dispatcher, for plain tensors.

    Args:
        names: of the arguments that the calls give, in their order: tensors first.
        constants: the other arguments, ``kernel`` among them; defaults may be left out.
        alone: the calls give the first result, and no more.
    """
    operator = overload(op)
    tensors = tuple(name for name in names if name in op.tensors)
    others, count = tuple(names[len(tensors) :]), len(tensors)
    fixed = {name: value for name, value in (dict(op.defaults) | dict(constants)).items() if name != "kernel"}
    bound = _Bound(op, constants.get("kernel", ""), tensors, others, fixed, alone or op.outputs == 1)
    first = alone and op.outputs > 1

    def run(*values: Any) -> Any:
        if (
            type(values[0]) not in PLAIN
            or torch._C._len_torch_dispatch_stack()
            or torch._C._autograd._profiler_enabled()
        ):
            found = operator(**dict(zip(names, values, strict=True)), **constants)
            return found[0] if first else found
        if torch.is_grad_enabled():
            for value in values[:count]:
                if value.requires_grad:
                    return _Direct.apply(bound, values[count:], *values[:count])  # type: ignore[no-untyped-call]
        found = call(op, bound.kernel, bound.arguments(values[:count], values[count:]))
        return found[0] if bound.alone else found

    run.__name__ = f"kreg_{op.name}"
    return run


class _Direct(torch.autograd.Function):
    """An op's call and its gradient."""

    @staticmethod
    def forward(ctx: Any, bound: _Bound, others: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
        found = call(bound.op, bound.kernel, bound.arguments(tensors, others))
        ctx.bound, ctx.others = bound, others
        ctx.save_for_backward(*tensors, *found)
        ctx.set_materialize_grads(False)
        constant = bound.op.constant_results(found)
        if not bound.alone:
            ctx.mark_non_differentiable(*constant)
            return found
        ctx.mark_non_differentiable(*[result for result in constant if result is found[0]])
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return _once(ctx, *grads) if torch.is_grad_enabled() else _backward(ctx, *grads)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    bound: _Bound = ctx.bound
    needed = bound.wanted(ctx.needs_input_grad[2:])
    if not needed or all(grad is None for grad in grads):
        return (None,) * (2 + len(bound.tensors))
    saved, count = ctx.saved_tensors, len(bound.tensors)  # read once: a checkpoint computes them anew at each reading
    outputs = saved[count:]
    grads = grads + (None,) * (len(outputs) - len(grads))
    arguments = bound.arguments(saved[:count], ctx.others)
    found = gradients(bound.op, bound.kernel, grads, outputs, needed, arguments)
    return (None, None, *[found.get(name) for name in bound.tensors])


_once = once_differentiable(_backward)
"""Its own gradient is an error, not a silent zero."""
