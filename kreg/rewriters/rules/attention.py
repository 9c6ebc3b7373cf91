"""How `attention` is recognised: any softmax between a product of queries with keys and one with values."""

from __future__ import annotations

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import ATTENTION
from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten, dtype_of, shape_of
from kreg.rewriters.lift import Index
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Mask, Operand, Output, Refused, Site, arrange, arranged_back
from kreg.rewriters.softmax import MaskTerm, SoftmaxAttention, is_attention
from kreg.rewriters.softmax import read as read_softmax

OP: Op = ATTENTION


def find(context: Context, anchor: Node) -> Site:
    """The attention around a softmax."""
    found = read_softmax(context.lifter, anchor)
    kv_head = next((i for i in found.k.index if found.head in i.variables), None) if found.head else None
    if found.head is not None and kv_head != next((i for i in found.v.index if found.head in i.variables), None):
        raise Refused("keys and values are shared by different groups of heads", found.output)
    result = dtype_of(found.output)

    def operand(element: n.Load, *want: Expr | None, what: str) -> Operand:
        return arrange(element.node, element.index, want, what).cast(result)

    operands = {
        "q": operand(found.q, found.batch, found.head, found.query, found.inner, what="queries"),
        "k": operand(found.k, found.batch, kv_head, found.key, found.inner, what="keys"),
        "v": operand(found.v, found.batch, kv_head, found.key, found.channel, what="values"),
    }
    if found.sinks is not None:
        operands["sinks"] = sinks(found)
    structure, extra = _masks(found)
    operands |= extra
    attributes = {
        "scale": found.scores.scale,
        "softcap": found.scores.softcap,
        "causal": structure.causal,
        "window": structure.window,
        "offset": structure.offset,
    }
    back = arranged_back(found.output, found.index, (found.batch, found.head, found.query, found.channel))
    return Site(OP, anchor, operands, attributes, (Output(found.output, 0, back),), describe(structure, extra))


def sinks(found: SoftmaxAttention) -> Operand:
    """The sink as a vector over heads."""
    logit = found.sinks
    if not isinstance(logit, n.Load) or logit.variables != {found.head}:
        raise Refused("the logit without a value is not one number a head", found.softmax)
    return arrange(logit.node, logit.index, (found.head,), "sink")


def describe(structure: masks.Structure, extra: dict[str, Operand]) -> Mask:
    """The proven structure, for the report."""
    facts: dict[str, object] = {}
    if structure.window:
        facts["window"] = structure.window
    if structure.offset:
        facts["offset"] = structure.offset
    kind = "sliding" if structure.window and structure.causal else "causal" if structure.causal else "full"
    if extra.keys() & {"bias", "mask"}:
        facts["input"] = sorted(extra.keys() & {"bias", "mask"})
        kind = "input" if kind == "full" else f"{kind}+input"
    return Mask(kind, facts)


def _masks(found: SoftmaxAttention) -> tuple[masks.Structure, dict[str, Operand]]:
    """What is proven becomes attributes; what is not is passed on as the tensors that the model made."""
    scores = found.scores
    structure = masks.read(scores.keep, found.query, found.key, found.batch)
    unproven = structure.rest or structure.padding or structure.selected or structure.ratio
    if structure.window < 0 or (structure.window and not structure.causal):
        unproven = True
    extra: dict[str, Operand] = {}
    biases = [(e, found.lifter.origin.get(e)) for e in scores.biases]
    if unproven:
        open_terms = [term for term in scores.masks if not _is_proven(term, found)]
        for term in open_terms:
            if term.additive:
                biases.append((term.expression, found.lifter.origin.get(term.expression)))
            elif found.sinks is None and not term.infinite:
                raise Refused(
                    "a mask from an input may leave a query without keys, which the model answers with uniform weights",
                    found.softmax,
                )
            elif "mask" in extra:
                raise Refused("two masks from inputs fill the scores", found.softmax)
            else:
                extra["mask"] = _condition(found, term.expression)
        soft = any(term.additive and not term.infinite for term in open_terms)
        closed = [term for term in scores.masks if term not in open_terms]
        if soft and found.sinks is None:
            # a row that is masked whole has uniform weights over all keys: proven parts must not narrow it
            for term in closed:
                if term.keep != n.TRUE:
                    raise Refused(
                        "an input mask and a proven one are added, and a query may have no keys",
                        found.softmax,
                    )
            closed = []
        keep: Expr = n.TRUE
        for term in closed:
            keep = n.and_(keep, term.keep)
        structure = masks.read(keep, found.query, found.key, found.batch)
    _no_empty_rows(found, structure)
    for expression, origin in biases:
        if origin is None:
            raise Refused("a term added to the scores has no tensor of its own", found.softmax)
        if "bias" in extra:
            raise Refused("two biases are added to the scores", found.softmax)
        extra["bias"] = _score_like(found, *origin)
        if expression in scores.biases and scores.scale == 0:
            raise Refused("the scores are scaled by 0", found.softmax)
    return structure, extra


def _no_empty_rows(found: SoftmaxAttention, structure: masks.Structure) -> None:
    """A query without keys is 0 in the op, and uniform or NaN in a softmax that no sink takes part in."""
    queries, keys = found.query.size, found.key.size
    if found.sinks is None and not masks.leaves_keys(structure, queries, keys):
        raise Refused("the mask may leave a query without keys", found.softmax)


def _is_proven(term: MaskTerm, found: SoftmaxAttention) -> bool:
    s = masks.read(term.keep, found.query, found.key, found.batch)
    if s.rest or s.padding or s.selected or s.ratio:
        return False
    return not s.window or (s.causal and s.window > 0)


def _score_like(found: SoftmaxAttention, node: Node, index: Index) -> Operand:
    """A tensor over (batch, head, query, key), each of which may be missing."""
    want = [e if e is not None and e in index else None for e in (found.batch, found.head, found.query, found.key)]
    return arrange(node, index, tuple(want), "mask")


def _condition(found: SoftmaxAttention, keep: Expr) -> Operand:
    """The tensor that holds a condition, negated where the model filled by its opposite."""
    for expression, negate in ((keep, False), (n.not_(keep), True)):
        origin = found.lifter.origin.get(expression)
        if origin is not None and shape_of(origin[0]) is not None:
            held = _score_like(found, *origin)
            calls = held.calls if not negate else (*held.calls, (aten.logical_not.default, ()))
            return Operand(held.node, calls)
    raise Refused("a condition on the scores has no tensor of its own", found.softmax)


RULE = Rule(op=OP, is_anchor=is_attention, find=find)
