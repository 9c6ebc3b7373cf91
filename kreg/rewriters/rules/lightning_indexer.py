"""How `lightning_indexer` is recognised: a top-k over head-weighted, rectified products of queries and entries."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import LIGHTNING_INDEXER
from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.arrange import arrange
from kreg.rewriters.graph import argument, aten, is_tensor, shape_of, unpacked
from kreg.rewriters.lift import Lifter, variables
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.padding import padding
from kreg.rewriters.rules.picks import is_light, leads_only_to, marked, shows_sets_only
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Extent, Mask, Output, Refused, Site

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
    return any(_reaches_relu(i, depth - 1) for i in node.all_input_nodes if is_tensor(i) and is_light(node))


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
    if not replace(structure, ratio=0, padding=()).is_band or structure.window or structure.chunk or structure.prefix:
        raise Refused("the scores' mask is more than causal, by entry or by block, and padding", anchor)
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
    if structure.padding:
        keys = ((batch,), (entry,))
        operands["padding"] = padding(context.lifter, structure.padding, keys, "indexer's padding", like)
    output, sentinel = _selection(context.lifter, picked, keep, index)
    ratio = 1 if structure.causal else structure.ratio
    attributes = {
        "scale": scale,
        "topk": topk,
        "ratio": ratio,
        "offset": structure.offset,
        "scored": False,
        "sentinel": sentinel,
    }
    kinds = ["causal"] if structure.causal else ["block-causal"] if structure.ratio else []
    facts: dict[str, object] = {"ratio": structure.ratio} if structure.ratio else {}
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


def _selection(lifter: Lifter, picked: Node, keep: Expr, index: tuple[n.Var, ...]) -> tuple[Node, bool]:
    """The node that names the selected entries, and whether those that are not ready are -1 there."""
    batch, query, entry = index
    if keep == n.TRUE:
        shows_sets_only(lifter, picked, None)
        return picked, True
    at = (batch, query, n.Var("m", shape_of(picked)[-1]))
    late = n.not_(n.substitute(keep, {entry: lifter.element(picked, at)}))
    output = marked(lifter, picked, at, lambda condition: condition == late)
    if output is not None and leads_only_to(picked, output):
        shows_sets_only(lifter, output, None)
        return output, True

    def ready(element: n.Load, place: Expr) -> Expr:
        return n.substitute(keep, {batch: element.index[0], query: element.index[1], entry: place})

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
