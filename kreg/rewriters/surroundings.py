"""What stands around a near miss: from the products that scores come from down to the one that values go into."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

from kreg.rewriters.anchors import SDPA
from kreg.rewriters.graph import aten, is_tensor, sized, source_line, users
from kreg.rewriters.lift_ops import CONTRACTIONS
from kreg.rewriters.report import NearbyNode
from kreg.rewriters.report.lines import line_of
from kreg.rewriters.site import NearMiss

PRODUCTS = CONTRACTIONS | {aten.baddbmm.default, aten.linear.default, SDPA}
FARTHEST = 12
"""Steps to a product, at most."""

NEAR = 3
"""Steps that are shown where there is no product so near."""

FEW = 2
"""Products that are shown on either side: scores may be a sum of two."""

Step = Callable[[Node], Iterable[Node]]


def surroundings(miss: NearMiss) -> tuple[NearbyNode, ...]:
    """The nodes around a near miss and the tensors they read, in the graph's order."""
    failed = miss.node or miss.anchor
    shown = {miss.anchor, *_way(miss.anchor, _sources), *_way(miss.anchor, users)}
    if failed not in shown:
        shown |= _path(failed, shown)
    read = {source for node in shown - _ends(shown, miss.anchor) for source in _sources(node)} - shown
    return tuple(_described(node, node is miss.anchor, node is failed, node in read) for node in sorted(shown | read))


def _sources(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if is_tensor(source)]


def _ends(shown: set[Node], anchor: Node) -> set[Node]:
    """What stands at the upper end without being a product: its sources would begin another region."""
    return {node for node in shown if node < anchor and node.target not in PRODUCTS and not shown & {*_sources(node)}}


def _way(start: Node, step: Step) -> set[Node]:
    """The nodes between a node and the nearest products on one side, and those products; else those near by."""
    came: dict[Node, Node] = {}
    near: set[Node] = set()
    products: list[Node] = []
    level = [start]
    for distance in range(FARTHEST):
        following: list[Node] = []
        for node in level:
            for other in step(node):
                if other in came or other is start or other.op == "output":
                    continue
                came[other] = node
                (products if other.target in PRODUCTS else following).append(other)
        if distance < NEAR:
            near |= {*following}
        if len(products) >= FEW:
            break
        level = following
    return {node for product in products[:FEW] for node in _back(product, came)} or near


def _back(node: Node, came: dict[Node, Node]) -> Iterable[Node]:
    """A node, and those on the way that led to it."""
    while node in came:
        yield node
        node = came[node]


def _path(failed: Node, shown: set[Node]) -> set[Node]:
    """A shortest way between a node and those that are shown, above them or below; the node alone where none is."""
    for starts, ends in ((shown, {failed}), ({failed}, shown)):
        came: dict[Node, Node] = {}
        level = [*starts]
        for _ in range(FARTHEST):
            steps = {source: node for node in level for source in _sources(node) if source not in came}
            came |= {source: node for source, node in steps.items() if source not in starts}
            found = next((source for source in steps if source in ends), None)
            if found is not None:
                return {failed, *_back(found, came)}
            level = [source for source in steps if source not in starts]
    return {failed}


def _described(node: Node, anchor: bool, failed: bool, read: bool) -> NearbyNode:
    call = line_of(node.format_node() or "") if node.op == "call_function" else None
    return NearbyNode(
        name=node.name,
        call=f"{call.target}{call.arguments}" if call is not None else node.op.replace("placeholder", "input"),
        value=_value(node.meta.get("val")),
        source="" if read else source_line(node),
        anchor=anchor,
        failed=failed,
        read=read,
    )


def _value(value: object) -> str:
    """``float32[2, 4, 24, 24]`` for a tensor; a symbolic size as its expression."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(sized(size)) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_value, value))})"
    return str(value)
