"""Op nodes that a graph holds already: a portable program is lowered by the same line as a model.

What such a node computes is known by its name; its reference is the old code that a kernel is held against.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from kreg.registry.calls import bind
from kreg.registry.library import op_of
from kreg.rewriters.graph import NOTE
from kreg.rewriters.site import Mask, Operand, Output, Site


def given(node: Node) -> Site | None:
    """The site that an op node without a kernel is; None for any other node."""
    op = op_of(node.target)
    if op is None:
        return None
    arguments = bind(op, node.args, node.kwargs)
    if arguments.pop("kernel", ""):
        return None
    operands = {name: Operand(arguments[name]) for name in op.tensors if isinstance(arguments.get(name), Node)}
    attributes = {name: arguments[name] for name in op.attributes}
    if op.outputs == 1:
        outputs: tuple[Output, ...] = (Output(node, 0),)
    else:
        items = [user for user in node.users if user.target is operator.getitem]
        outputs = tuple(Output(item, item.args[1]) for item in items if item.users)  # type: ignore[arg-type]
    return Site(op, node, operands, attributes, outputs, _mask(node))


def _mask(node: Node) -> Mask | None:
    """What was proven when the op was raised, as the program remembers it."""
    entry: dict[str, Any] = (node.meta.get("custom") or {}).get(NOTE, {})
    facts = dict(entry.get("mask") or {})
    return Mask(facts.pop("kind"), facts) if facts else None
