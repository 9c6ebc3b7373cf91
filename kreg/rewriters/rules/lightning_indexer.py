"""How `lightning_indexer` is recognised: a top-k over head-weighted, rectified products of queries and entries."""

from __future__ import annotations

import math

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import LIGHTNING_INDEXER
from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.arrange import arrange
from kreg.rewriters.graph import argument, aten, is_tensor, shape_of, unpacked, users
from kreg.rewriters.lift import variables
from kreg.rewriters.lift_ops import LAYOUT, POINTWISE
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Mask, Output, Refused, Site

OP: Op = LIGHTNING_INDEXER


def is_anchor(node: Node) -> bool:
    """A top-k of a sum over heads: of three dimensions, over the last, from scores that rectify a product."""
    if node.target is not aten.topk.default or not is_tensor(node.args[0]):
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return len(shape_of(source)) == 3 and _reaches_relu(source, 10)


def _reaches_relu(node: Node, depth: int) -> bool:
    if node.target is aten.relu.default:
        return True
    if depth == 0 or node.op != "call_function":
        return False
    return any(_reaches_relu(i, depth - 1) for i in node.all_input_nodes if is_tensor(i) and _is_light(node))


def _is_light(node: Node) -> bool:
    return node.target in POINTWISE or node.target in LAYOUT


def find(context: Context, anchor: Node) -> Site:
    """The indexer around a top-k."""
    source, topk = anchor.args[:2]
    assert isinstance(source, Node)
    if argument(anchor, 2, "dim", -1) not in (-1, 2) or not argument(anchor, 3, "largest", True):
        raise Refused("the top-k is not the largest along the entries", anchor)
    batch, query, entry = index = variables(source, "bsj")
    if entry.size == 1:
        raise Refused("there is a single entry: nothing to select", anchor)
    keep, scores = _unmasked(context.lifter.element(source, index), anchor)
    structure = masks.read(keep, query, entry, (batch,))
    if structure.rest or structure.padding or structure.selected or structure.window or structure.causal:
        raise Refused("the scores' mask is not causal by block", anchor)
    q, k, weights, scale, channel, head = _scores(scores, query, entry, anchor)
    if unpacked(anchor, 0) is not None:
        raise Refused("the selected scores are used, not only their places", anchor)
    picked = unpacked(anchor, 1)
    if picked is None:
        raise Refused("the selected places are not used", anchor)
    output = _sentinel(context, picked, keep, index, structure) if structure.ratio else picked
    _order_is_free(output)
    operands = {
        "q": arrange(q.node, q.index, ((batch,), (query,), (head,), (channel,)), "indexer's queries"),
        "k": arrange(k.node, k.index, ((batch,), (entry,), (channel,)), "indexer's keys"),
        "weights": arrange(weights.node, weights.index, ((batch,), (query,), (head,)), "indexer's weights"),
    }
    attributes = {
        "scale": scale,
        "topk": topk,
        "ratio": structure.ratio,
        "offset": structure.offset,
        "scored": False,
    }
    kind = "block-causal" if structure.ratio else "full"
    facts = {"ratio": structure.ratio} if structure.ratio else {}
    return Site(OP, anchor, operands, attributes, (Output(output, 0),), Mask(kind, facts))


def _unmasked(e: Expr, anchor: Node) -> tuple[Expr, Expr]:
    """The condition the scores are kept under, and the scores."""
    keep: Expr = n.TRUE
    while True:
        match e:
            case n.Apply("where", (c, x, n.Const(value))) if value == -math.inf:
                keep, e = n.and_(keep, c), x
            case n.Apply("where", (c, n.Const(value), x)) if value == -math.inf:
                keep, e = n.and_(keep, n.not_(c)), x
            case n.Apply("add", arguments):
                rest = [a for a in arguments if masks.keep_of(a) is None]
                if len(rest) != 1:
                    raise Refused("the scores are a sum that is not read", anchor)
                for a in arguments:
                    keep = n.and_(keep, masks.keep_of(a) or n.TRUE)
                e = rest[0]
            case _:
                return keep, e


def _scores(e: Expr, query: n.Var, entry: n.Var, anchor: Node) -> tuple[n.Load, n.Load, n.Load, float, n.Var, n.Var]:
    """q, k, weights, scale, channel and head of ``c * sum_h w[s, h] * relu(sum_d q[s, h, d] * k[j, d])``."""
    scale, e = n.scaled(e)
    if not isinstance(e, n.Reduce) or e.kind != "sum":
        raise Refused("the scores are not a sum over heads", anchor)
    more, body = n.scaled(e.body)
    factors = list(body.arguments) if isinstance(body, n.Apply) and body.function == "mul" else [body]
    rectified = [f for f in factors if isinstance(f, n.Apply) and f.function == "relu"]
    weights = [f for f in factors if isinstance(f, n.Load) and entry not in f.variables]
    if len(rectified) != 1 or len(weights) != 1 or len(factors) != 2:
        raise Refused("the scores are not rectified products weighted by head", anchor)
    inner, product = n.scaled(rectified[0].arguments[0])
    if inner <= 0:
        raise Refused("the products are rectified after a change of sign", anchor)
    if not isinstance(product, n.Reduce) or not isinstance(product.body, n.Apply):
        raise Refused("what is rectified is not a product of queries and keys", anchor)
    operands = product.body.arguments
    q = [f for f in operands if isinstance(f, n.Load) and query in f.variables]
    k = [f for f in operands if isinstance(f, n.Load) and entry in f.variables]
    if len(operands) != 2 or len(q) != 1 or len(k) != 1 or e.variable in k[0].variables:
        raise Refused("the rectified products are not of queries by head and shared keys", anchor)
    return q[0], k[0], weights[0], scale * more * inner, product.variable, e.variable


def _sentinel(context: Context, picked: Node, keep: Expr, index: tuple[n.Var, ...], structure: masks.Structure) -> Node:
    """The node where picks that are not ready have become -1, by the condition that masked the scores."""
    batch, query, entry = index
    for candidate in _near(picked, 4):
        if candidate.target not in (aten.where.self, aten.where.ScalarSelf, aten.masked_fill.Scalar):
            continue
        at = (batch, query, n.Var("m", shape_of(candidate)[-1]))
        place = context.lifter.element(picked, at)
        match context.lifter.element(candidate, at):
            case n.Apply("where", (c, n.Const(-1), kept)) if kept == place:
                ready = n.not_(c)
            case n.Apply("where", (c, kept, n.Const(-1))) if kept == place:
                ready = c
            case _:
                continue
        if ready != n.substitute(keep, {entry: place}):
            raise Refused("picks become -1 by another condition than the scores were masked by", candidate)
        if any(user not in _near(picked, 4) for user in users(picked)):
            raise Refused("picks that are not ready are used", picked)
        return candidate
    raise Refused("picks that are not ready are not marked by -1", picked)


def _near(node: Node, depth: int) -> list[Node]:
    found: list[Node] = []
    for user in users(node) if depth else ():
        found.append(user)
        if _is_light(user):
            found.extend(_near(user, depth - 1))
    return found


def _order_is_free(node: Node) -> None:
    """The places may only name elements to scatter to: then neither their order nor ties matter."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        for user in users(current):
            if user in seen:
                continue
            seen.add(user)
            if user.target in (aten.scatter.value, aten.scatter.src) and user.args[2] is current:
                continue
            if user.op == "output" or not _is_light(user):
                raise Refused(f"the order of the selected places matters to {user.name}", user)
            pending.append(user)


RULE = Rule(op=OP, is_anchor=is_anchor, find=find)
