"""What an attention can be recognised by: a softmax between two matrix products, or PyTorch's fused operator."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch.fx import Node

from kreg.rewriters.graph import aten, users
from kreg.rewriters.lift_ops import CONTRACTIONS, LAYERS, LAYOUT, POINTWISE, softmax_of

SDPA = aten.scaled_dot_product_attention.default
DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default})
SPLITS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int})
"""What gives several tensors, each a part of one."""

PASSING = frozenset({*LAYOUT, *POINTWISE, *SPLITS, *DROPOUTS})
"""What attention weights may go through on the way to the values."""

UNCHANGED = frozenset({*LAYOUT, *DROPOUTS})
"""What leaves weights what they are."""

BETWEEN = frozenset({*CONTRACTIONS, aten.baddbmm.default})
"""Products of queries with keys."""

LEARNT = frozenset(LAYERS)
"""Products with a parameter: of learnt queries. A dynamic convolution has such logits; it is no attention, and told."""

DEPTH = 12
"""Steps between the softmax and either product, at most."""


def is_attention(node: Node) -> bool:
    """The anchor of every attention rule."""
    if is_sdpa(node):
        return True
    found = softmax_of(node)
    if found is None:
        return False
    if has_keys(node):
        return _to_product(node, PASSING, DEPTH)
    return _to_product(node, UNCHANGED, DEPTH) and _from(LEARNT, found[0], DEPTH)


def has_keys(softmax: Node) -> bool:
    """Whether the logits come from a product other than a layer's with its weight."""
    return _from(BETWEEN, logits_of(softmax)[0], DEPTH)


def is_sdpa(node: Node) -> bool:
    """Whether a node is PyTorch's fused attention."""
    return node.target is SDPA


def logits_of(softmax: Node) -> tuple[Node, int]:
    """What a softmax is of, and along which dimension."""
    found = softmax_of(softmax)
    assert found is not None
    return found


def is_stable(softmax: Node) -> bool:
    """Whether logits of any size give a softmax: written out, only after the largest one is subtracted."""
    if softmax.target is not aten.div.Tensor:
        return True
    source, dim = logits_of(softmax)
    if source.target is not aten.sub.Tensor or not isinstance(source.args[1], Node):
        return False
    top = source.args[1]
    while top.target in (aten.detach.default, operator.getitem):
        top = top.all_input_nodes[0]
    dims = top.args[1] if len(top.args) > 1 else None
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    largest = top.target in (aten.amax.default, aten.max.dim) and top.args[0] is source.args[0]
    return largest and [d % len(source.meta["val"].shape) for d in dims if isinstance(d, int)] == [dim]


def _from(products: Collection[Any], node: Node, depth: int) -> bool:
    if node.op != "call_function" or depth == 0:
        return False
    if node.target in products:
        return True
    if node.target not in LAYOUT and node.target not in POINTWISE:
        return False
    return any(_from(products, i, depth - 1) for i in node.all_input_nodes)


def _to_product(node: Node, through: Collection[Any], depth: int) -> bool:
    if depth == 0:
        return False
    for user in users(node):
        if user.target in CONTRACTIONS or (user.target in through and _to_product(user, through, depth - 1)):
            return True
    return False
