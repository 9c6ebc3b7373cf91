"""What is known of a term that is added to scores: whether it may mask, and whether it is made of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node
from torch.utils._pytree import tree_leaves

from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.anchors import BETWEEN
from kreg.rewriters.graph import PARAMETER, STORED, aten, dtype_of, is_tensor
from kreg.rewriters.notation import Expr
from kreg.rewriters.scores import Bias, MaskTerm, is_top, summands
from kreg.rewriters.site import Refused
from kreg.rewriters.softmax import Attention, tensors

SUMMED = frozenset(
    {
        *(aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default, aten.bmm.default),
        *(aten.einsum.default, aten.baddbmm.default, aten.layer_norm.default, aten.rms_norm.default),
    }
)
"""Operators whose results, where gradients flow through them, are activations: of these no element is huge by itself,
unless the model's are."""


def is_moderate(bias: Bias, beside: Any = None) -> bool:
    """Whether a bias is made of trained parameters, integers and small constants, so that it is no mask itself.

    Args:
        beside: an operator whose results are taken for ordinary numbers too.
    """
    parts = list(bias.expression.walk())
    small = all(abs(part.value) < -masks.NEGLIGIBLE for part in parts if isinstance(part, n.Const))
    read = [part.node for part in parts if isinstance(part, n.Load)]
    return small and all(node.target is beside or _is_small(node) for node in read)


def _is_small(node: Node) -> bool:
    """Whether a tensor's elements are ordinary numbers: nothing huge or unlearned goes into them."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or not is_tensor(current) or not dtype_of(current).is_floating_point:
            continue
        seen.add(current)
        trains = current.meta.get("trains", False)
        if trains and (current.meta.get(PARAMETER, False) or current.target in SUMMED):
            continue
        if STORED in current.meta and bool((current.meta[STORED].abs() < -masks.NEGLIGIBLE).all()):
            continue
        constants = [a for a in tree_leaves([current.args, current.kwargs]) if isinstance(a, (int, float))]
        if current.op != "call_function" or any(abs(c) >= -masks.NEGLIGIBLE for c in constants):
            return False
        pending.extend(current.all_input_nodes)
    return True


def refuse_undefined_shift(found: Attention, shift: Sequence[Expr], biases: Sequence[Bias]) -> None:
    """What all logits are shifted by is the largest of them, or finite, where a bias may be infinite.

    Raises:
        Refused: it is not.
    """
    if not all(map(is_top, shift)) and not all(is_moderate(b) for b in biases):
        reason = "all logits are shifted by an amount that a bias may make infinite or undefined"
        raise Refused(reason, found.anchor)


def refuse_masked_scores(found: Attention, terms: Sequence[MaskTerm], biases: Sequence[Bias]) -> None:
    """A bias that is made of masked scores may take away what the mask added; not to the last bit before it is added.

    Raises:
        Refused: there is such a bias.
    """
    added = [replace(b, expression=part) for b in biases for part in summands(b.expression)]
    if not added or len(terms) + len(added) < 2:
        return
    q, k = {found.q.node}, {e.node for e in tensors(found.scores.product.keys)}
    stem = _stem(found, q, k)

    def is_made(e: Expr) -> bool:
        read = {part.node for part in e.walk() if isinstance(part, n.Load)}
        return bool(read & stem or (isinstance(e, n.Reduce) and e.kind == "sum" and read & q and read & k))

    made = [b for b in added if any(map(is_made, b.expression.walk()))]
    if made and (terms or not all(is_moderate(b) for b in added if b not in made)):
        raise Refused("a term that is added to the scores is made of them, and of what masks them", found.anchor)


def _stem(found: Attention, q: set[Node], k: set[Node]) -> set[Node]:
    """The nodes that are computed from the product of queries and keys."""
    of_q, of_k, stem = {*q}, {*k}, set[Node]()
    for node in sorted(found.region | q | k):
        sources = node.all_input_nodes
        reads_q, reads_k = [s in of_q for s in sources], [s in of_k for s in sources]
        if any(s in stem for s in sources) or (
            node.target in BETWEEN and len(sources) > 1 and any(reads_q) and any(reads_k)
        ):
            stem.add(node)
        if any(reads_q):
            of_q.add(node)
        if any(reads_k):
            of_k.add(node)
    return stem
