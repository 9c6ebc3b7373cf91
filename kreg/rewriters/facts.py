"""What planning has to know, read off the op nodes of a raised graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from kreg.registry.calls import bind, call_facts
from kreg.registry.constraints import SymbolicSize
from kreg.registry.library import op_of
from kreg.registry.op import Op
from kreg.registry.plan import SiteFacts
from kreg.rewriters.raising import SITE


def op_nodes(graph: Graph) -> Iterator[tuple[Node, Op]]:
    """The op nodes of a graph, in order."""
    for node in graph.nodes:
        op = op_of(node.target)
        if op is not None:
            yield node, op


def site_id(node: Node) -> str:
    """The id of the site an op node stands for; its own name in a program that was loaded."""
    return str(node.meta.get(SITE, node.name))


def facts_of(node: Node, op: Op) -> SiteFacts:
    """Dimensions, attributes, dtype of an op node, symbolic sizes with their proven ranges."""
    arguments = bind(op, node.args, node.kwargs)
    values = {name: _value(argument) for name, argument in arguments.items()}
    dims = op.dims(values)
    first = next(iter(op.tensors))
    known = {name: described(value) for name, value in call_facts(op, values).items()}
    return SiteFacts(
        id=site_id(node),
        op=op.name,
        dims={name: described(size) for name, size in dims.items()},
        attributes={name: value for name, value in known.items() if name not in dims},
        dtype=values[first].dtype,
        trainable=bool(node.meta.get("trains", False)),
    )


def described(value: Any) -> Any:
    """A symbolic size with its range; anything else as it is."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    if expression.is_Integer:
        return int(expression)
    bounds = value.node.shape_env.bound_sympy(expression)
    lower = int(bounds.lower) if bounds.lower.is_Integer else 0
    upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**62 else None
    return SymbolicSize(str(expression), max(lower, 0), upper, value.node.hint)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument
