"""How `block_indexer` is recognised: a top-k over blocks, scored by the largest product of a query with their keys."""

from __future__ import annotations

import math

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import BLOCK_INDEXER
from kreg.rewriters import notation as n
from kreg.rewriters.arrange import arrange
from kreg.rewriters.graph import argument, aten, is_tensor, shape_of, unpacked
from kreg.rewriters.lift import Index, Lifter, variables
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.picks import leads_only_to, marked, reaches, shows_sets_only
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.scores import product_of
from kreg.rewriters.site import Mask, Output, Refused, Site

OP: Op = BLOCK_INDEXER
INFINITE = math.inf


def is_anchor(node: Node) -> bool:
    """A top-k of a largest value: of four dimensions, over the last."""
    if node.target is not aten.topk.default or not is_tensor(node.args[0]):
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return len(shape_of(source)) == 4 and reaches(source, aten.amax.default, 6)


def find(context: Context, anchor: Node) -> Site:
    """The indexer around a top-k."""
    source, topk = anchor.args[:2]
    assert isinstance(source, Node)
    if argument(anchor, 2, "dim", -1) not in (-1, 3) or not argument(anchor, 3, "largest", True):
        raise Refused("the top-k is not the largest along the blocks", anchor)
    batch, head, query, own = index = variables(source, "bisj")
    if own.size == 1:
        raise Refused("there is a single block: nothing to select", anchor)
    nearest, scores = _forced(context.lifter.element(source, index))
    if not isinstance(scores, n.Reduce) or scores.kind != "max" or not isinstance(scores.variable.size, int):
        raise Refused("the blocks' scores are not their largest", anchor)
    place, block = scores.variable, scores.variable.size
    key = n.add(n.mul(n.Const(block), own), place)
    keep, products = _kept(scores.body)
    found = product_of(products, key, anchor)
    if found.factor <= 0 or len(found.channels) != 1 or head not in found.q.variables or head in found.k.variables:
        raise Refused("the scores are not products of queries by head with shared keys", anchor)
    keys = _keys(found.k, key, anchor)
    offset = _offset(keep, key, query, keys, anchor)
    local = 0 if nearest is None else _local(nearest, query, offset, block, own, anchor)
    at = n.Var("t", keys)
    k = n.Load(found.k.node, tuple(at if i == key else i for i in found.k.index), False)
    (channel,) = found.channels
    operands = {
        "q": arrange(found.q.node, found.q.index, ((batch,), (head,), (query,), (channel,)), "indexer's queries"),
        "k": arrange(k.node, k.index, ((batch,), (at,), (channel,)), "indexer's keys"),
    }
    attributes = {"topk": topk, "block": block, "local": local, "offset": offset}
    output = _selection(context.lifter, anchor, index)
    facts = {"block": block} | ({"local": local} if local else {})
    return Site(OP, anchor, operands, attributes, (Output(output, 0),), Mask("causal", facts))


def _forced(e: Expr) -> tuple[Expr | None, Expr]:
    """The condition under which a block is selected whatever it scores, and the score."""
    match e:
        case n.Apply("where", (c, n.Const(value), scores)) if value == INFINITE:
            return c, scores
        case n.Apply("where", (c, scores, n.Const(value))) if value == INFINITE:
            return n.not_(c), scores
    return None, e


def _kept(e: Expr) -> tuple[Expr, Expr]:
    """The condition under which a key counts, and its score."""
    keep: Expr = n.TRUE
    while True:
        match e:
            case n.Apply("where", (c, x, n.Const(value))) if value == -INFINITE:
                keep, e = n.and_(keep, c), x
            case n.Apply("where", (c, n.Const(value), x)) if value == -INFINITE:
                keep, e = n.and_(keep, n.not_(c)), x
            case _:
                return keep, e


def _keys(k: n.Load, key: Expr, anchor: Node) -> n.Sized:
    """How many keys there are."""
    sizes = [extent for i, extent in zip(k.index, shape_of(k.node), strict=True) if i == key]
    if len(sizes) != 1 or any(key.variables & i.variables for i in k.index if i != key):
        raise Refused("the blocks are not of consecutive keys", anchor)
    return sizes[0]


def _offset(keep: Expr, key: Expr, query: n.Var, keys: n.Sized, anchor: Node) -> int:
    """The offset of the queries' positions; what else the condition says must follow from there being no such key."""
    behind = n.le0(n.add(n.sub(key, n.size(keys)), n.ONE))
    rest = [c for c in n.conjuncts(keep) if c != behind]
    match rest:
        case [n.Apply("le0", (difference,))]:
            offset = n.sub(n.sub(key, query), difference)
            if isinstance(offset, n.Const):
                return int(offset.value)
    raise Refused("the scores' mask is not causal", anchor)


def _local(nearest: Expr, query: n.Var, offset: int, block: int, own: n.Var, anchor: Node) -> int:
    """How many blocks, up to the query's own, are always selected; before the first one there is none but it."""
    position = n.floordiv(n.add(query, n.Const(offset)), n.Const(block))
    back: Expr = n.ZERO
    count = 1
    condition = nearest
    if isinstance(nearest, n.Reduce) and nearest.kind == "any" and isinstance(nearest.variable.size, int):
        back, count, condition = nearest.variable, nearest.variable.size, nearest.body
    at = n.sub(position, back)
    if condition != n.eq0(n.sub(n.larger(at, n.ZERO), own)):
        raise Refused(
            "blocks are selected whatever they score that are not the query's own and those before it", anchor
        )
    return count


def _selection(lifter: Lifter, anchor: Node, index: Index) -> Node:
    """The node in which blocks without a key that counts have become -1."""
    best, picked = unpacked(anchor, 0), unpacked(anchor, 1)
    if picked is None:
        raise Refused("the selected places are not used", anchor)
    at = (*index[:-1], n.Var("m", shape_of(picked)[-1]))
    output = None
    if best is not None:
        none = n.apply("equal", lifter.element(best, at), n.Const(-INFINITE))
        output = marked(lifter, picked, at, lambda condition: condition == none)
    if output is None:
        raise Refused("blocks that hold no key for a query are not marked by -1", picked)
    for node in (picked, best):
        if node is not None and not leads_only_to(node, output):
            raise Refused("more is read of the selected blocks than their places", node)
    shows_sets_only(lifter, output, None)
    return output


RULE = Rule(op=OP, is_anchor=is_anchor, find=find)
