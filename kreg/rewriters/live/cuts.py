"""A graph of Dynamo's cut where it leaves this process: sharded tensors (``DTensor``) and collectives stay outside.

Under tensor parallelism a layer's projections work on sharded weights and its attention, between them, on plain
tensors of this rank. The stretches of plain operators between the cuts are graphs like any other. What talks to other
ranks runs as it was, in its order, and once: a part that fails is answered by its own original code, and no other rank
waits for a collective that comes twice.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module
from torch.utils import _pytree as pytree

COLLECTIVES = frozenset({"_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "symm_mem"})
"""Namespaces of operators that talk to other ranks."""


def local_parts(module: GraphModule) -> tuple[GraphModule, list[Node]] | None:
    """The graph as a line of calls of its parts, and the calls in which everything is this process's own.

    The order of operators is kept. None if everything in the graph is this process's own.
    """
    outside = {node for node in module.graph.nodes if node.op.startswith("call_") and _leaves_the_process(node)}
    if not outside:
        return None
    _unpack_at_once(module)
    stretch: dict[Node, int] = {}
    local: set[str] = set()
    count, side = 0, None
    for node in module.graph.nodes:
        if not node.op.startswith("call_"):
            continue
        here = node in outside or (_unpacks(node) and node.args[0] in outside)
        if here is not side:
            count, side = count + 1, here
        stretch[node] = count
        if not here:
            local.add(f"submod_{count}")
    line = split_module(
        module,
        module,
        lambda node: stretch[node],
        keep_original_order=True,
        keep_original_node_name=True,
        tuple_return=True,
    )
    return line, [node for node in line.graph.nodes if node.op == "call_module" and node.target in local]


def _unpack_at_once(module: GraphModule) -> None:
    """Takes tuples apart where they are made, so that only tensors and numbers go from part to part."""
    for node in reversed(list(module.graph.nodes)):
        if _unpacks(node):
            node.args[0].append(node)


def _unpacks(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and isinstance(source.meta.get("example_value"), (tuple, list))


def _leaves_the_process(node: Node) -> bool:
    values = [n.meta.get("example_value") for n in (node, *node.all_input_nodes)]
    if any(_is_sharded(value) for value in pytree.tree_leaves(values)):
        return True
    return _is_collective(node.target) or any(_is_collective(n.target) for n in _called(node))


def _is_sharded(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported, no tensor is sharded
    return module is not None and isinstance(value, module.DTensor)


def _is_collective(target: Any) -> bool:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        return name.partition("::")[0] in COLLECTIVES
    return str(getattr(target, "__module__", None) or "").startswith("torch.distributed")


def _called(node: Node) -> Iterator[Node]:
    """The nodes of the graphs that a higher-order operator is given."""
    owner = node.graph.owning_module
    for source in node.all_input_nodes:
        if source.op != "get_attr" or owner is None:
            continue
        inner: Any = operator.attrgetter(str(source.target))(owner)
        for part in inner.modules() if isinstance(inner, GraphModule) else ():
            if isinstance(part, GraphModule):
                yield from part.graph.nodes
