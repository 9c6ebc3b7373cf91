"""Ops as ``torch.library`` operators: what makes them trace, export, save, load and differentiate.

``torch.ops.kreg.<op>(..., kernel=name)`` computes the op with the named kernel; with ``kernel=""`` by the
reference. A name that ends in ``?`` asks for the kernel's constraints to be checked at the call, and for the
reference where they do not hold. The name is part of the graph, so a saved program says what it runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from kreg.errors import SelectionError, SpecError
from kreg.registry.constraints import Constraint
from kreg.registry.op import Op
from kreg.registry.spec import KernelSpec

log = logging.getLogger("kreg")

_library = torch.library.Library("kreg", "DEF")
_defined: dict[str, Op] = {}

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
        return self.backward or _recompute(self.forward)


def define(op: Op) -> None:
    """Register ``op`` as ``torch.ops.kreg.<name>``, with its fake rule and gradient.

    Raises:
        SpecError: the schema is malformed, or another op has the name.
    """
    known = _defined.get(op.name)
    if known is op:
        return
    if known is not None:
        raise SpecError(f"op {op.name!r} is defined already: {known.summary!r}; choose another name")
    _ = op.parsed
    _library.define(f"{op.name}{_with_kernel(op.schema)}")
    _library.define(f"{op.name}_backward{_backward_schema(op)}")
    qualified = f"kreg::{op.name}"

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _packed(op, _call(op, bind(op, args, kwargs)))

    def backward(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return _call_backward(op, *args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("kernel", None)
        return _packed(op, results(op.fake(*args, **kwargs)))

    def fake_backward(
        grads: list[Any], tensors: list[Any], outputs: list[Any], needs: list[bool], **rest: Any
    ) -> list[torch.Tensor]:
        return [_gradient_slot(outputs[0], t, need) for t, need in zip(tensors, needs, strict=True)]

    _library.impl(op.name, forward, "CompositeExplicitAutograd")
    _library.impl(f"{op.name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_fake(f"{qualified}_backward", fake_backward, lib=_library)
    if op.differentiable:
        torch.library.register_autograd(qualified, _gradient(op), setup_context=_save(op), lib=_library)
    _defined[op.name] = op


def bind(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in; "kernel" is kept if it was given."""
    return {**op.defaults, **dict(zip(op.arguments, args, strict=False)), **kwargs}


def results(value: Any) -> tuple[torch.Tensor, ...]:
    """What a kernel returned, as a tuple also where the op has a single result."""
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _packed(op: Op, value: tuple[torch.Tensor, ...]) -> Any:
    """Results as torch wants them: a single one bare."""
    return value[0] if op.outputs == 1 else value


def overload(op: Op) -> torch._ops.OpOverload:
    """The operator to put into a graph."""
    define(op)
    found: torch._ops.OpOverload = getattr(torch.ops.kreg, op.name).default
    return found


def op_of(target: object) -> Op | None:
    """The op that a graph node's target calls, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "kreg":
        return _defined.get(target._schema.name.removeprefix("kreg::"))
    return None


@cache
def resolve(op_name: str, kernel: str) -> Kernel:
    """The functions behind a kernel name; "" and kernels that cannot be had here give the reference."""
    op = _defined[op_name]
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


def _call(op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    kernel = resolve(op.name, arguments.pop("kernel", ""))
    if kernel.checks:
        kernel = _checked(op, kernel, arguments)
    try:
        return results(kernel.forward(**arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if _judged.on:
            raise
        found = results(op.reference(**arguments))  # where the arguments are at fault, this raises too
        _raised(kernel.name, "", error)
        return found


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


def _raised(kernel: str, where: str, error: Exception) -> None:
    """Counts a kernel that raised and was answered for by the reference; said once in the log."""
    reason = f"raised{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if (kernel, reason) not in fallbacks:
        log.warning("kernel %s %s. The reference computes the call", kernel or "(reference)", reason)
    fallbacks[kernel, reason] += 1


def _checked(op: Op, kernel: Kernel, arguments: Mapping[str, Any]) -> Kernel:
    facts = call_facts(op, arguments)
    for check in kernel.checks:
        if not check.holds(facts):
            fallbacks[kernel.name, check.explain(facts)] += 1
            return resolve(op.name, "")
    return kernel


def _call_backward(
    op: Op,
    grads: list[torch.Tensor | None],
    tensors: list[torch.Tensor | None],
    outputs: list[torch.Tensor],
    needs: list[bool],
    *,
    kernel: str,
    **attributes: Any,
) -> list[torch.Tensor]:
    """`_gradients_of` as the operator's schema has it: empty where no gradient is needed."""
    found = _gradients_of(op, grads, tensors, outputs, needs, kernel=kernel, **attributes)
    pairs = zip(op.tensors, tensors, strict=True)
    return [
        outputs[0].new_empty(0) if tensor is None or name not in found else found[name].contiguous()
        for name, tensor in pairs
    ]


def _gradients_of(
    op: Op,
    grads: Sequence[torch.Tensor | None],
    tensors: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor],
    needs: Sequence[bool],
    *,
    kernel: str,
    **attributes: Any,
) -> dict[str, torch.Tensor]:
    """The needed gradients by name, in the dtypes of their tensors."""
    arguments = dict(zip(op.tensors, tensors, strict=True)) | attributes
    needed = frozenset(name for name, need in zip(op.tensors, needs, strict=True) if need)
    chosen = resolve(op.name, kernel)
    if chosen.checks:
        chosen = _checked(op, chosen, arguments)
    try:
        found = chosen.gradient(tuple(grads), tuple(outputs), needed, **arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if _judged.on:
            raise
        found = _recompute(op.reference)(tuple(grads), tuple(outputs), needed, **arguments)
        _raised(chosen.name, " in its backward", error)
    return {name: found[name].to(arguments[name].dtype) for name in needed if arguments[name] is not None}


def _recompute(forward: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., dict[str, torch.Tensor]]:
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


def _save(op: Op) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        arguments = bind(op, inputs, keyword_only_inputs)
        tensors = [arguments.get(name) for name in op.tensors]
        ctx.save_for_backward(*tensors, *results(output))
        ctx.attributes = {name: arguments[name] for name in op.attributes}
        ctx.kernel = arguments.get("kernel", "")
        ctx.mark_non_differentiable(*op.constant_results(results(output)))
        ctx.set_materialize_grads(False)

    return setup_context


def _gradient(op: Op) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    operator = getattr(torch.ops.kreg, f"{op.name}_backward").default
    positional = [a.name for a in op.parsed.arguments if not a.kwarg_only]

    def run(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return dict(zip(op.tensors, operator(*args, **kwargs), strict=True))

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = dict(zip(positional, ctx.needs_input_grad, strict=False))
        found = _gradients(op, run, ctx, grads, [bool(wanted.get(name)) for name in op.tensors])
        return tuple(found.get(name) for name in positional)

    return backward


def _gradients(
    op: Op,
    run: Callable[..., dict[str, torch.Tensor]],
    ctx: Any,
    grads: tuple[torch.Tensor | None, ...],
    wanted: Sequence[bool],
) -> dict[str, torch.Tensor]:
    """Gradients of the wanted tensors by name; none where none flows in."""
    needs = [name in op.differentiable and want for name, want in zip(op.tensors, wanted, strict=True)]
    if not any(needs) or all(g is None for g in grads):
        return {}
    saved, count = ctx.saved_tensors, len(op.tensors)  # read once: a checkpoint computes them anew at each reading
    found = run(list(grads), list(saved[:count]), list(saved[count:]), needs, **ctx.attributes, kernel=ctx.kernel)
    return {name: found[name] for name, need in zip(op.tensors, needs, strict=True) if need}


def direct(op: Op, constants: Mapping[str, Any]) -> Callable[..., Any]:
    """``torch.ops.kreg.<name>`` without the dispatcher, for plain tensors: a call costs little more than its kernel.

    Fake tensors, subclasses, dispatch modes and the profiler get the operator itself.

    Args:
        constants: keyword arguments that are the same at each call, ``kernel`` among them.
    """
    operator, single = overload(op), op.outputs == 1
    names = op.arguments
    name = constants.get("kernel", "")
    fixed = {**op.defaults, **constants, "kernel": name}

    def call(*args: Any, **kwargs: Any) -> Any:
        if (
            type(args[0]) not in _PLAIN
            or torch._C._len_torch_dispatch_stack()
            or torch._C._autograd._profiler_enabled()
        ):
            return operator(*args, **constants, **kwargs)
        arguments = {**fixed, **dict(zip(names, args, strict=False)), **kwargs}
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            del arguments["kernel"]
            values = [arguments.pop(tensor, None) for tensor in op.tensors]
            found = _Direct.apply(op, name, arguments, *values)  # type: ignore[no-untyped-call]
        else:
            found = _call(op, arguments)
        return found[0] if single else found

    call.__name__ = f"kreg_{op.name}"
    return call


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Direct(torch.autograd.Function):
    """An op's call and its gradient."""

    @staticmethod
    def forward(ctx: Any, op: Op, kernel: str, attributes: dict[str, Any], *values: Any) -> tuple[torch.Tensor, ...]:
        found = _call(op, dict(zip(op.tensors, values, strict=True)) | attributes | {"kernel": kernel})
        ctx.op, ctx.kernel, ctx.attributes = op, kernel, attributes
        ctx.save_for_backward(*values, *found)
        ctx.mark_non_differentiable(*op.constant_results(found))
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        op: Op = ctx.op
        found = _gradients(op, partial(_gradients_of, op), ctx, grads, ctx.needs_input_grad[3:])
        return (None, None, None, *(found.get(name) for name in op.tensors))


def _gradient_slot(like: torch.Tensor, tensor: torch.Tensor | None, needed: bool) -> torch.Tensor:
    if not needed or tensor is None:
        return like.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _with_kernel(schema: str) -> str:
    head, arrow, results = schema.rpartition("->")
    body = head.rstrip().removesuffix(")").rstrip().removesuffix(",")
    star = "" if "*," in body else " *,"
    return f'{body},{star} str kernel="") {arrow}{results}'


_SCHEMA_TYPES = {
    "int": "SymInt",  # sizes may be symbolic, whatever the forward schema says
    "float": "float",
    "bool": "bool",
    "str": "str",
    "List[int]": "SymInt[]",
    "List[float]": "float[]",
    "List[bool]": "bool[]",
}


def _backward_schema(op: Op) -> str:
    kinds = {a.name: a.type.annotation_str for a in op.parsed.arguments}
    unknown = [name for name in op.attributes if kinds[name] not in _SCHEMA_TYPES]
    if unknown:
        raise SpecError(
            f"op {op.name!r}: attribute {unknown[0]!r} has type {kinds[unknown[0]]}; "
            f"attributes may be {', '.join(_SCHEMA_TYPES)}, and tensors must be listed in `tensors`"
        )
    attributes = "".join(f"{_SCHEMA_TYPES[kinds[name]]} {name}, " for name in op.attributes)
    return (
        f"(Tensor?[] grads, Tensor?[] tensors, Tensor[] outputs, bool[] needs, *, {attributes}str kernel) -> Tensor[]"
    )
