"""PyTorch's ``scaled_dot_product_attention``, read as what it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import argument, dtype_of, shape_of
from kreg.rewriters.lift import Index, Lifter, broadcast
from kreg.rewriters.notation import Expr, Var
from kreg.rewriters.scores import INFINITE, MaskTerm, Product, Scores, take_apart
from kreg.rewriters.site import Refused


@dataclass(frozen=True)
class Fused:
    """The parts of one call."""

    v: n.Load
    key: Var
    scores: Scores
    factor: float


def read_sdpa(lifter: Lifter, node: Node, index: Index) -> Fused:
    """Reads ``scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)``.

    A query without keys gives 0 there (``torch._safe_softmax``), which a mask of -inf or False can lead to.

    Raises:
        Refused: dropout is on, or sizes that it depends on are symbolic.
    """
    q, k, v = node.args[:3]
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise Refused(f"dropout is on for the attention weights (p={argument(node, 4, 'dropout_p')})", node)
    width = shape_of(q)[-1]
    scale = argument(node, 6, "scale")
    if not isinstance(width, int) or isinstance(scale, Node):
        raise Refused("the scale depends on a symbolic size or on data", node)
    *lead, query, channel = index
    key, inner = Var("t", shape_of(k)[-2]), Var("d", width)
    if key.size == 1:
        raise Refused("there is a single key: its weight is no choice among keys", node)
    groups = 1
    if argument(node, 7, "enable_gqa", False):
        heads, kv_heads = shape_of(q)[-3], shape_of(k)[-3]
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or shape_of(v)[-3] != kv_heads:
            raise Refused("the groups of heads are not of one fixed size", node)
        groups = heads // kv_heads

    def at(source: Node, *last: Expr, shared: bool = False) -> Expr:
        outer = list(lead)
        if shared and groups > 1:
            outer[-1] = n.floordiv(outer[-1], n.Const(groups))
        return lifter.operand(source, broadcast((*outer, *last), source))

    factors = at(q, query, inner), at(k, key, inner, shared=True), at(v, key, channel, shared=True)
    loads = [n.scaled(f) for f in factors]
    if not all(isinstance(e, n.Load) for _, e in loads):
        raise Refused("the operands have a form that is not read", node)
    (a, q_load), (b, k_load), (factor, v_load) = loads
    assert isinstance(q_load, n.Load) and isinstance(k_load, n.Load) and isinstance(v_load, n.Load)
    product = Product(q_load, k_load, (inner,), 1.0)
    number = (width**-0.5 if scale is None else float(scale)) * a * b
    scores = _masked(lifter, node, (*lead, query, key), Scores(product, number, 0.0, (), (), ()))
    return Fused(v_load, key, scores, factor)


def whole_sdpa(lifter: Lifter, node: Node, index: Index, scores: Scores) -> Scores:
    """The scores with a mask that is added left as the tensor it is."""
    plain = replace(scores, masks=(), biases=(), shift=())
    return _masked(lifter, node, (*index[:-1], Var("t", shape_of(node.args[1])[-2])), plain, whole=True)  # type: ignore[arg-type]


def _masked(lifter: Lifter, node: Node, index: Index, scores: Scores, whole: bool = False) -> Scores:
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    if causal:
        keep = n.le0(n.sub(index[-1], index[-2]))  # from the top left, whatever the lengths
        return replace(scores, masks=(MaskTerm(keep, keep, INFINITE, added=False, depth=0),))
    if mask is None:
        return scores
    element = lifter.element(mask, broadcast(index, mask))
    if dtype_of(mask) is torch.bool:
        keep = n.truth(element)
        terms = () if keep == n.TRUE else (MaskTerm(keep, keep, INFINITE, added=False, depth=0),)
        return replace(scores, masks=terms)
    return take_apart(lifter, element, index[-1], dtype_of(node), node, added_to=scores, whole=whole)
