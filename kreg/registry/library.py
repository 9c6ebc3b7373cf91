"""Ops as ``torch.library`` operators: what makes them trace, export, save, load and differentiate.

``torch.ops.kreg.<op>(..., kernel=name)`` computes the op with the named kernel; with ``kernel=""`` by the
reference. A name that ends in ``?`` asks for the kernel's constraints to be checked at the call, and for the
reference where they do not hold. The name is part of the graph, so a saved program says what it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kreg.errors import SpecError
from kreg.registry.calls import bind, call, defined, gradients, results
from kreg.registry.op import Op

_library = torch.library.Library("kreg", "DEF")


def define(op: Op) -> None:
    """Register ``op`` as ``torch.ops.kreg.<name>``, with its fake rule and gradient.

    Raises:
        SpecError: the schema is malformed, or another op has the name.
    """
    known = defined.get(op.name)
    if known is op:
        return
    if known is not None:
        raise SpecError(f"op {op.name!r} is defined already: {known.summary!r}; choose another name")
    _ = op.parsed
    _library.define(f"{op.name}{_with_kernel(op.schema)}")
    _library.define(f"{op.name}_backward{_backward_schema(op)}")
    qualified = f"kreg::{op.name}"

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _packed(op, _called(op, bind(op, args, kwargs)))

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
    defined[op.name] = op


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
        return defined.get(target._schema.name.removeprefix("kreg::"))
    return None


def _called(op: Op, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return call(op, arguments.pop("kernel", ""), arguments)


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
    """`gradients` as the operator's schema has it: empty where no gradient is needed."""
    arguments = dict(zip(op.tensors, tensors, strict=True)) | attributes
    needed = frozenset(name for name, need in zip(op.tensors, needs, strict=True) if need)
    found = gradients(op, kernel, tuple(grads), tuple(outputs), needed, arguments)
    return [found[name].contiguous() if name in found else outputs[0].new_empty(0) for name in op.tensors]


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

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = dict(zip(positional, ctx.needs_input_grad, strict=False))
        needs = [name in op.differentiable and bool(wanted.get(name)) for name in op.tensors]
        if not any(needs) or all(g is None for g in grads):
            return (None,) * len(positional)
        saved, count = ctx.saved_tensors, len(op.tensors)  # read once: a checkpoint computes them anew at each reading
        slots = operator(
            list(grads), list(saved[:count]), list(saved[count:]), needs, **ctx.attributes, kernel=ctx.kernel
        )
        found = {name: slot for name, slot, need in zip(op.tensors, slots, needs, strict=True) if need}
        return tuple(found.get(name) for name in positional)

    return backward


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
