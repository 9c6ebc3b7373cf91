"""Memory that is free to reuse: where no gradient is recorded, a sum can be written over an operand nobody reads again.

On a CPU a large result costs more in fresh pages than in arithmetic, so this matters for what the ops leave over.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from kreg.rewriters.graph import aten, is_tensor

IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})

FRESH = frozenset(
    {
        *IN_PLACE,
        *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default),
        *(aten.pow.Tensor_Scalar, aten.square.default, aten.sum.dim_IntList, aten.mean.dim, aten.cat.default),
        *(aten.rsqrt.default, aten.sigmoid.default, aten.softmax.int, aten.silu.default, aten.clamp.default),
    }
)
"""Operators whose result shares memory with nothing."""


def reuse(module: GraphModule) -> None:
    """Makes pointwise operators of a graph write in place where that cannot be seen.

    The operand is a fresh result of the output's shape and dtype, no gradient flows through it, this is its last
    use, and its earlier uses keep no view of it.
    """
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        if node.target not in IN_PLACE or node.meta.get("trains", True):
            continue
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if node.target not in COMMUTATIVE or node.kwargs:
            operands = operands[:1] if node.args and operands and node.args[0] is operands[0] else []
        target = next((a for a in operands if _is_free(a, node, position)), None)
        if target is not None:
            others = [a for a in node.args[:2] if a is not target]
            node.args = (target, *others)
            node.target = IN_PLACE[node.target]
    module.recompile()


def _is_free(operand: Node, node: Node, position: dict[Node, int]) -> bool:
    if operand.target not in FRESH or operand.meta.get("trains", True):
        return False
    if not is_tensor(operand) or not is_tensor(node):
        return False
    a, b = operand.meta["val"], node.meta["val"]
    if a.shape != b.shape or a.dtype != b.dtype or list(node.args[:2]).count(operand) != 1:
        return False
    earlier = [user for user in operand.users if user is not node]
    return all(position[user] < position[node] and user.target in FRESH for user in earlier)
