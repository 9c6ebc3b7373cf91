"""How `lightning_indexer` is recognised: a top-k over head-weighted, rectified products of queries and entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import LIGHTNING_INDEXER
from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.arrange import Group, arrange, bind
from kreg.rewriters.graph import argument, aten, is_tensor, shape_of, unpacked
from kreg.rewriters.lift import Lifter, variables
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.padding import padding
from kreg.rewriters.rules.picks import leads_only_to, marked, reaches, shows_sets_only
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Extent, Mask, Operand, Output, Refused, Site

OP: Op = LIGHTNING_INDEXER


def is_anchor(node: Node) -> bool:
    """A top-k of a sum over heads: of three dimensions, over the last, from scores that rectify a product."""
    if node.target is not aten.topk.default or not is_tensor(node.args[0]):
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return len(shape_of(source)) == 3 and reaches(source, aten.relu.default, 10)


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
    ends, keep = _ends(context.lifter, keep, query, (batch, entry))
    structure = masks.read(keep, query, entry, (batch,))
    if not replace(structure, ratio=0, padding=()).is_band or structure.window or structure.chunk or structure.prefix:
        raise Refused("the scores' mask is more than causal, by entry, block or last position, and padding", anchor)
    q, k, weights, scale, channel, head = _scores(scores, query, entry, anchor)
    if unpacked(anchor, 0) is not None:
        raise Refused("the selected scores are used, not only their places", anchor)
    picked = unpacked(anchor, 1)
    if picked is None:
        raise Refused("the selected places are not used", anchor)
    operands = {
        "q": arrange(q.node, q.index, ((batch,), (query,), (head,), (channel,)), "indexer's queries"),
        "k": arrange(k.node, k.index, ((batch,), (entry,), (channel,)), "indexer's keys"),
        "weights": arrange(weights.node, weights.index, ((batch,), (query,), (head,)), "indexer's weights"),
    }
    like = [Extent(operand.node, d) for operand in operands.values() for d in range(len(shape_of(operand.node)))]
    keys = ((batch,), (entry,))
    if ends is not None:
        if structure.offset != ends.offset and (structure.causal or structure.ratio):
            raise Refused("the scores are masked by two different positions of the queries", anchor)
        operands["ends"] = bind(context.lifter, ends.element, keys, "entries' last positions", like, full=True)
        operands["ends"] = operands["ends"].cast(torch.int64)
    if structure.padding:
        operands["padding"] = _padding(context.lifter, structure.padding, keys, like)
    output, sentinel = _selection(context.lifter, source, picked, index)
    ratio = 1 if structure.causal else structure.ratio
    attributes = {
        "scale": scale,
        "topk": topk,
        "ratio": ratio,
        "offset": structure.offset if ends is None else ends.offset,
        "scored": False,
        "sentinel": sentinel,
    }
    kinds = ["causal"] if structure.causal else ["block-causal"] if structure.ratio else []
    facts: dict[str, object] = {"ratio": structure.ratio} if structure.ratio else {}
    if ends is not None:
        kinds.append("ends")
        facts["ends"] = "input"
    if structure.padding:
        kinds.append("padding")
        facts["padding"] = "input"
    return Site(OP, anchor, operands, attributes, (Output(output, 0),), Mask("+".join(kinds) or "full", facts))


def _unmasked(e: Expr, anchor: Node) -> tuple[Expr, Expr]:
    """The condition the scores are kept under, and the scores."""
    keep: Expr = n.TRUE
    while True:
        match e:
            case n.Apply("where", (c, x, n.Const(value))) if value <= masks.NEGLIGIBLE:
                keep, e = n.and_(keep, c), x
            case n.Apply("where", (c, n.Const(value), x)) if value <= masks.NEGLIGIBLE:
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


@dataclass(frozen=True)
class Ends:
    """``element <= query + offset``: an integer of an entry, at the entry, that a query's position has to reach."""

    element: Expr
    offset: int


def _ends(lifter: Lifter, keep: Expr, query: n.Var, entry: tuple[n.Var, n.Var]) -> tuple[Ends | None, Expr]:
    """The last positions of the entries, and what is left of a condition without them."""
    found: Ends | None = None
    rest: Expr = n.TRUE
    for condition in n.conjuncts(keep):
        ends = None if found is not None else _end(lifter, condition, query, entry)
        found = ends or found
        rest = n.and_(rest, n.TRUE if ends is not None else condition)
    return found, rest


def _end(lifter: Lifter, condition: Expr, query: n.Var, entry: tuple[n.Var, n.Var]) -> Ends | None:
    """Of all integers that were met on the way, the one that the condition compares with the query."""
    if not {query, entry[1]} <= condition.variables <= {query, *entry}:
        return None
    offsets = {
        -constant
        for part in condition.walk()
        if isinstance(part, n.Apply) and part.function == "le0"
        for terms, constant in [n.parts(part.arguments[0])]
        if terms.get(query) == -1 and len(terms) == 2
    }
    for element in list(lifter.origins):
        if n.is_integral(element) and entry[1] in element.variables and element.variables <= set(entry):
            if not any(isinstance(part, n.Load) for part in element.walk()):
                continue  # a band
            for offset in offsets:
                if n.le0(n.sub(element, n.add(query, n.Const(offset)))) == condition:
                    return Ends(element, offset)
    return None


def _padding(lifter: Lifter, conditions: Sequence[Expr], want: Sequence[Group], like: Sequence[Extent]) -> Operand:
    """The conditions on an entry as one tensor; some may be of a key that a tensor of the entries names."""
    what = "indexer's padding"
    found = [
        _gathered(lifter, condition, want, like) or padding(lifter, (condition,), want, what, like)
        for condition in conditions
    ]
    first, *others = found
    for other in others:
        first = first.then(aten.logical_and.default, other)
    return first


def _gathered(lifter: Lifter, condition: Expr, want: Sequence[Group], like: Sequence[Extent]) -> Operand | None:
    """``table[b, place[b, j]] != 0`` as an operand."""
    (batch,), (entry,) = want
    match condition:
        case n.Apply("not", (n.Apply("eq0", (n.Load(node, (row, place)),)),)) if place != entry:
            if row not in (batch, n.ZERO) or (row == n.ZERO and shape_of(node)[0] != 1):
                return None
            key = n.Var("t", shape_of(node)[1])
            table = arrange(node, (row, key), ((batch,), (key,)), "indexer's padding", full=True, like=like)
            places = bind(lifter, place, want, "keys of the indexer's padding", like, full=True)
            return table.then(aten.gather.default, 1, places.cast(torch.int64)).then(aten.ne.Scalar, 0)
    return None


def _selection(lifter: Lifter, source: Node, picked: Node, index: tuple[n.Var, ...]) -> tuple[Node, bool]:
    """The node that names the selected entries, and whether those that are not ready are -1 there."""
    batch, query, entry = index
    keep, _ = _unmasked(lifter.element(source, index), picked)
    if keep == n.TRUE:
        shows_sets_only(lifter, picked, None)
        return picked, True
    at = (batch, query, n.Var("m", shape_of(picked)[-1]))
    late = n.not_(n.substitute(keep, {entry: lifter.element(picked, at)}))
    output = marked(lifter, picked, at, lambda condition: condition == late)
    if output is not None and leads_only_to(picked, output):
        shows_sets_only(lifter, output, None)
        return output, True

    def ready(lifter: Lifter, element: n.Load, place: Expr) -> Expr:
        kept, _ = _unmasked(lifter.element(source, index), picked)
        return n.substitute(kept, {batch: element.index[0], query: element.index[1], entry: place})

    shows_sets_only(lifter, picked, ready)
    return picked, False


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


RULE = Rule(op=OP, is_anchor=is_anchor, find=find)
