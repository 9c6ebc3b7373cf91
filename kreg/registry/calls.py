"""One call of an op: by which kernel, whether its constraints hold, and what answers when it raises."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from kreg.errors import SelectionError, SpecError
from kreg.registry.constraints import Constraint
from kreg.registry.op import Op
from kreg.registry.spec import KernelSpec

log = logging.getLogger("kreg")

defined: dict[str, Op] = {}
"""Ops that can be called, by name."""

fallbacks: Counter[tuple[str, str]] = Counter()
"""Calls answered by the reference instead of their kernel, by (kernel, reason)."""


@dataclass(frozen=True)
class Kernel:
    """A kernel made callable: its functions, and the constraints to hold at each call."""

    name: str
    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., Mapping[str, torch.Tensor]] | None = None
    checks: tuple[Constraint, ...] = ()

    @staticmethod
    def of(spec: KernelSpec) -> Kernel:
        """A spec's functions, imported.

        Raises:
            SpecError: they cannot be imported.
        """
        return Kernel(spec.name, spec.entry_point(), spec.backward_point())

    @property
    def gradient(self) -> Callable[..., Mapping[str, torch.Tensor]]:
        """Its backward; without one of its own, its forward run again under autograd."""
        return self.backward or recompute(self.forward)


def bind(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in; "kernel" is kept if it was given."""
    return {**op.defaults, **dict(zip(op.arguments, args, strict=False)), **kwargs}


def results(value: Any) -> tuple[torch.Tensor, ...]:
    """What a kernel returned, as a tuple also where the op has a single result."""
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


@cache
def resolve(op_name: str, kernel: str) -> Kernel:
    """The functions behind a kernel name; "" and kernels that cannot be had here give the reference."""
    op = defined[op_name]
    name, checked = kernel.removesuffix("?"), kernel.endswith("?")
    if not name:
        return Kernel("", op.reference)
    from kreg.registry.catalogue import catalogue

    try:
        spec = catalogue().kernel(name)
        found = Kernel.of(spec)
    except (ImportError, SpecError, SelectionError) as error:
        log.warning("kernel %s cannot be had here (%s): the reference computes %s", name, error, op_name)
        fallbacks[name, f"not importable: {error}"] += 1
        return Kernel("", op.reference)
    names = facts_names(op)
    checks = tuple(Constraint.parse(text, names) for text in spec.constraints) if checked else ()
    return replace(found, checks=checks)


def facts_names(op: Op) -> tuple[str, ...]:
    """The names that constraints on this op may use: dimensions, attributes, and has_<optional tensor>."""
    dims = {dim.removeprefix("1|") for names in op.tensors.values() for dim in names.split()}
    return (*sorted(dims), *op.attributes, *(f"has_{name}" for name in op.optional))


def call_facts(op: Op, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `facts_names` in one call."""
    facts = op.dims(arguments) | {name: arguments[name] for name in op.attributes}
    return facts | {f"has_{name}": arguments.get(name) is not None for name in op.optional}


def call(op: Op, kernel: str, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The results of an op by a kernel; by the reference where its constraints do not hold, or it raises.

    Args:
        kernel: as `resolve` takes it.
        arguments: all of them, by name.
    """
    chosen = resolve(op.name, kernel)
    if chosen.checks:
        chosen = _checked(op, chosen, arguments)
    try:
        return results(chosen.forward(**arguments))
    except Exception as error:
        return instead(op, chosen.name, error, arguments)


def instead(op: Op, kernel: str, error: Exception, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The results by the reference, for a kernel that raised; what nobody answers for is raised again."""
    if _judged.on or isinstance(error, torch.OutOfMemoryError):
        raise error
    found = results(op.reference(**arguments))  # where the arguments are at fault, this raises too
    _raised(kernel, "", error)
    return found


def gradients(
    op: Op,
    kernel: str,
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needed: frozenset[str],
    arguments: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """The needed gradients by name, in the dtypes of their tensors.

    Args:
        kernel: as `resolve` takes it.
        grads: with respect to the results, None where none flows in.
        outputs: the results.
        arguments: those of the call.
    """
    chosen = resolve(op.name, kernel)
    if chosen.checks:
        chosen = _checked(op, chosen, arguments)
    try:
        found = chosen.gradient(grads, outputs, needed, **arguments)
    except Exception as error:
        found = gradients_instead(op, chosen.name, error, grads, outputs, needed, arguments)
    wanted = {name: arguments[name] for name in needed}
    return {name: found[name].to(tensor.dtype) for name, tensor in wanted.items() if tensor is not None}


def gradients_instead(
    op: Op,
    kernel: str,
    error: Exception,
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needed: frozenset[str],
    arguments: Mapping[str, Any],
) -> Mapping[str, torch.Tensor]:
    """As `instead`, of the gradients."""
    if _judged.on or isinstance(error, torch.OutOfMemoryError):
        raise error
    found = recompute(op.reference)(grads, outputs, needed, **arguments)
    _raised(kernel, " in its backward", error)
    return found


def _checked(op: Op, kernel: Kernel, arguments: Mapping[str, Any]) -> Kernel:
    facts = call_facts(op, arguments)
    for check in kernel.checks:
        if not check.holds(facts):
            fallbacks[kernel.name, check.explain(facts)] += 1
            return resolve(op.name, "")
    return kernel


def _raised(kernel: str, where: str, error: Exception) -> None:
    """Counts a kernel that raised and was answered for by the reference; said once in the log."""
    reason = f"raised{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if (kernel, reason) not in fallbacks:
        log.warning("kernel %s %s. The reference computes the call", kernel or "(reference)", reason)
    fallbacks[kernel, reason] += 1


def recompute(forward: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., dict[str, torch.Tensor]]:
    """The gradient of a kernel that has no backward of its own: run it again, under autograd."""

    def backward(
        grads: tuple[torch.Tensor | None, ...],
        outputs: tuple[torch.Tensor, ...],
        needs: frozenset[str],
        **arguments: Any,
    ) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            leaves = {name: arguments[name].detach().requires_grad_() for name in sorted(needs)}
            found = results(forward(**(arguments | leaves)))
            pairs = [(r, g) for r, g in zip(found, grads, strict=True) if g is not None and r.requires_grad]
            if not pairs:
                return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
            gradients = torch.autograd.grad(
                [r for r, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
            )
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), gradients, strict=True)
        }

    return backward


class _Judged(threading.local):
    on = False


_judged = _Judged()


@contextlib.contextmanager
def judged() -> Iterator[None]:
    """While kernels are judged: one that raises is not answered for by the reference.

    A backward pass stays in this thread, where that is known; on a device autograd has threads of its own.
    """
    before, _judged.on = _judged.on, True
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _judged.on = before
