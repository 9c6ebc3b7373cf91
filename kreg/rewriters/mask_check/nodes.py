"""The captured nodes that compute a mask, in order, and what each needs to be run."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from kreg.rewriters.graph import STORED, aten, is_tensor, sized
from kreg.rewriters.mask_check.outcome import NotRun
from kreg.rewriters.mask_check.sizes import numbers
from kreg.rewriters.site import Operand

NODES = 600
"""A mask that more nodes compute depends on more than masks, positions and documents."""


def in_order(wanted: Sequence[Node], stops: Container[Node]) -> list[Node]:
    """What is needed to compute some nodes, sources first.

    Raises:
        NotRun: too much.
    """
    order: dict[Node, None] = {}
    entered: set[Node] = set()
    pending = list(reversed(wanted))
    while pending:
        node = pending[-1]
        if node in entered or node in stops:
            order[pending.pop()] = None  # a second time changes nothing
            continue
        entered.add(node)
        if len(entered) > NODES:
            raise NotRun(f"the mask is computed by more than {NODES} nodes")
        pending.extend(source for source in reversed(sources(node)) if source not in order)
    return list(order)


LIKE = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 0,
    aten.full_like.default: 0,
    aten.empty_like.default: 0,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 0,
    aten.new_full.default: 0,
    aten.new_empty.default: 0,
    aten.expand_as.default: 1,
    aten.view_as.default: 1,
    aten.type_as.default: 1,
    aten.to.other: 1,
}
"""Operators with an argument of which the shape or the dtype is taken, not the value; and which one."""


def sources(node: Node) -> list[Node]:
    """The nodes whose values a node is computed from; sizes are known without their tensors."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return []
    if node.target not in LIKE:
        return node.all_input_nodes
    like = node.args[LIKE[node.target]]
    rest = [argument for argument in tree_leaves((node.args, node.kwargs)) if argument is not like]
    return list(dict.fromkeys(argument for argument in rest if isinstance(argument, Node)))


def hollow(node: Node, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """A stand-in for a value of which only shape and dtype are asked."""
    value = node.meta["val"]
    return torch.zeros((), dtype=value.dtype).expand(numbers(value.shape, sizes))


def values_of(operand: Operand) -> Iterator[Node]:
    """The nodes whose values an operand is made of; of the others it takes the sizes."""
    yield operand.node
    for part in tree_leaves([args for _, args in operand.calls]):
        if isinstance(part, Operand):
            yield from values_of(part)


def is_drawn(module: GraphModule, node: Node) -> bool:
    """Whether a node is an input without a known value."""
    if STORED in node.meta or not is_tensor(node):
        return False
    return node.op == "placeholder" or (node.op == "get_attr" and attribute(module, node) is None)


def attribute(module: GraphModule, node: Node) -> Any:
    """A tensor of the graph's module; None where it is fake, and stands for any."""
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    is_real = isinstance(value, torch.Tensor) and not value.is_meta and not hasattr(value, "fake_mode")
    return value if is_real else None


def form(node: Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{list(map(sized, value.shape))}" if isinstance(value, torch.Tensor) else str(value)


def blank(node: Node, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(numbers(value.shape, sizes), dtype=value.dtype, device="meta")
