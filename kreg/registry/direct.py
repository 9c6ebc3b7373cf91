"""An op's call past the dispatcher, with its gradient: little more than its kernel.

What is the same at every call is put together once. Fake tensors, subclasses, dispatch modes and the profiler get the
operator itself.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kreg.registry.calls import call, gradients, gradients_instead, instead, resolve
from kreg.registry.library import overload
from kreg.registry.op import Op

PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Bound:
    """An op and a kernel with what is the same at every call.

    Args:
        kernel: as `resolve` takes it.
        names: of the arguments that a call gives: tensors first.
        fixed: all other arguments, with their defaults.
        alone: only the first result is asked for.
    """

    def __init__(self, op: Op, kernel: str, names: Sequence[str], fixed: Mapping[str, Any], alone: bool) -> None:
        self.op, self.alone, self.fixed = op, alone, dict(fixed)
        self.names = tuple(names)
        self.tensors = tuple(name for name in names if name in op.tensors)
        self.count = len(self.tensors)
        self.differentiable = tuple(name in op.differentiable for name in self.tensors)
        self.constant = op.parsed.returns[0].name in op.no_gradient
        self.needed: dict[tuple[bool, ...], frozenset[str]] = {}
        chosen = resolve(op.name, kernel)
        self.kernel = chosen.name
        self.forward: Callable[..., Any] = _shortened(chosen.forward, fixed)
        self.backward: Callable[..., Mapping[str, torch.Tensor]] = _shortened(chosen.gradient, fixed)
        if chosen.checks:  # which may hold in one call and not in the next
            self.forward = lambda **given: call(op, kernel, self.fixed | given)
            self.backward = lambda grads, outputs, wanted, **given: gradients(
                op, kernel, grads, outputs, wanted, self.fixed | given
            )

    def __call__(self, values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The op's results."""
        given = dict(zip(self.names, values, strict=True))
        try:
            found = self.forward(**given)
            return (found,) if isinstance(found, torch.Tensor) else tuple(found)
        except Exception as error:
            return instead(self.op, self.kernel, error, self.fixed | given)

    def gradients(
        self,
        needs: tuple[bool, ...],
        grads: tuple[torch.Tensor | None, ...],
        outputs: tuple[torch.Tensor, ...],
        values: Sequence[Any],
    ) -> list[torch.Tensor | None]:
        """Those of the tensors of a call, in their order; None where none is needed, or none flows in."""
        wanted = self.needed.get(needs)
        if wanted is None:
            pairs = zip(self.tensors, needs, self.differentiable, strict=True)
            wanted = self.needed[needs] = frozenset(name for name, need, can in pairs if need and can)
        if not wanted or (grads[0] is None and not any(grad is not None for grad in grads)):
            return [None] * self.count
        given = dict(zip(self.names, values, strict=True))
        try:
            found = self.backward(grads, outputs, wanted, **given)
        except Exception as error:
            arguments = self.fixed | given
            found = gradients_instead(self.op, self.kernel, error, grads, outputs, wanted, arguments)
        return [
            (found[name] if found[name].dtype is given[name].dtype else found[name].to(given[name].dtype))
            if name in wanted
            else None
            for name in self.tensors
        ]


def _shortened(function: Callable[..., Any], fixed: Mapping[str, Any]) -> Callable[..., Any]:
    """A kernel's function with the arguments that are the same at every call, but for its own defaults."""
    known: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(ValueError):  # not written in Python
        known = inspect.signature(function).parameters
    same = {n for n, value in fixed.items() if n in known and _is_same(known[n].default, value)}
    return partial(function, **{name: value for name, value in fixed.items() if name not in same})


def _is_same(default: object, value: object) -> bool:
    return default is value or (type(default) is type(value) and default == value)


def direct(op: Op, names: Sequence[str], constants: Mapping[str, Any], *, alone: bool = False) -> Callable[..., Any]:
    """``torch.ops.kreg.<name>`` without the dispatcher, for plain tensors.

    Args:
        names: of the arguments that the calls give, in their order: tensors first.
        constants: the other arguments, ``kernel`` among them; defaults may be left out.
        alone: the calls give the first result, and no more.
    """
    operator = overload(op)
    fixed = {name: value for name, value in (dict(op.defaults) | dict(constants)).items() if name != "kernel"}
    for name in names:
        fixed.pop(name, None)
    first = alone and op.outputs > 1
    bound = _Bound(op, constants.get("kernel", ""), names, fixed, alone or op.outputs == 1)
    count = bound.count

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
                    return _Direct.apply(bound, *values)  # type: ignore[no-untyped-call]
        found = bound(values)
        return found[0] if bound.alone else found

    run.__name__ = f"kreg_{op.name}"
    return run


class _Direct(torch.autograd.Function):
    """An op's call and its gradient."""

    @staticmethod
    def forward(ctx: Any, bound: _Bound, *values: Any) -> Any:
        found = bound(values)
        count = bound.count
        ctx.bound, ctx.others = bound, values[count:]
        ctx.save_for_backward(*values[:count], *found)
        ctx.set_materialize_grads(False)
        if not bound.alone:
            ctx.mark_non_differentiable(*bound.op.constant_results(found))
            return found
        if bound.constant or not found[0].is_floating_point():
            ctx.mark_non_differentiable(found[0])
        return found[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return _once(ctx, *grads) if torch.is_grad_enabled() else _backward(ctx, *grads)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    bound: _Bound = ctx.bound
    count, others = bound.count, ctx.others
    saved = ctx.saved_tensors  # read once: a checkpoint computes them anew at each reading
    outputs = saved[count:]
    grads = grads + (None,) * (len(outputs) - len(grads))
    found = bound.gradients(ctx.needs_input_grad[1 : 1 + count], grads, outputs, saved[:count] + others)
    return (None, *found, *[None] * len(others))


_once = once_differentiable(_backward)
"""Its own gradient is an error, not a silent zero."""
