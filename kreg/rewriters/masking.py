"""What the masks and biases of an attention become: attributes where proven, else the tensors that the model made.

A query whose keys are all masked decides what may be done. In the model it may be 0, NaN, the mean of all values, or
a softmax of what is left of the scores; the op can say the first three (``empty``). Where neither holds for certain,
additive masks are passed on as they are, and added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.anchors import is_sdpa, logits_of
from kreg.rewriters.arrange import Group, arrange, bind, condition, in_a_row, renamed
from kreg.rewriters.biases import is_moderate, refuse_masked_scores, refuse_undefined_shift
from kreg.rewriters.graph import argument, aten, dtype_of
from kreg.rewriters.lift import broadcast
from kreg.rewriters.notation import Expr
from kreg.rewriters.packed import by_places
from kreg.rewriters.scores import INFINITE, Bias, MaskTerm
from kreg.rewriters.site import Claim, Extent, Mask, Operand, Refused
from kreg.rewriters.softmax import Attention
from kreg.rewriters.stretches import Stretch

FAR = 1000
"""So many nodes behind a result its masks are looked for; each layer's stand before it."""


@dataclass(frozen=True)
class Masking:
    """Arguments of the op ``attention``, and what the report says of them."""

    attributes: dict[str, Any]
    operands: dict[str, Operand]
    mask: Mask
    claims: tuple[Claim, ...] = ()


def masking(found: Attention, like: Sequence[Extent] = ()) -> Masking:
    """Arguments for the masks and biases of an attention.

    Raises:
        Refused: a term that no argument can express.
    """
    scores = found.scores
    empty = _empty(found, scores.masks, scores.biases, _read(found, scores.masks))
    if empty is None:
        scores = found.whole()
        empty = _empty(found, scores.masks, scores.biases, _read(found, scores.masks))
    if empty is None:
        raise Refused("a query may have no keys, and what the model gives then is not one thing", found.anchor)
    terms, biases, structure = scores.masks, (*scores.biases, *_sunk(found)), _read(found, scores.masks)
    refuse_undefined_shift(found, scores.shift, biases)
    refuse_masked_scores(found, terms, biases)
    operands: dict[str, Operand] = {}
    if biases:
        operands["bias"] = _sum(found, biases, found.roles.of_scores, like)
    structure, inputs = _inputs(found, terms, structure, like)
    operands |= inputs
    attributes = {
        "causal": structure.causal,
        "window": structure.window,
        "chunk": structure.chunk,
        "prefix": structure.prefix,
        "offset": structure.offset,
        "empty": empty,
    }
    masked = "mask" in operands or not all(is_moderate(b) for b in scores.biases)
    return Masking(attributes, operands, describe(structure, operands, masked), claims(found, terms, like, biases))


def _sunk(found: Attention) -> tuple[Bias, ...]:
    """Each query's own sink as a bias: a softmax does not change when one number is taken from all its logits.

    The sink itself becomes 0 by that.

    Raises:
        Refused: it may be infinite, and then nothing can be taken from.
    """
    if found.sinks is None or not found.sinks_by_query:
        return ()
    less = Bias(found.sinks, -1.0, depth=0)
    if not is_moderate(less, beside=aten.linear.default):
        raise Refused("the logit without a value is one for each query, and may be infinite", found.anchor)
    return (less,)


def _all_kept(terms: Sequence[MaskTerm]) -> Expr:
    keep: Expr = n.TRUE
    for term in terms:
        keep = n.and_(keep, term.keep)
    return keep


def _read(found: Attention, terms: Sequence[MaskTerm]) -> masks.Structure:
    roles = found.roles
    square = roles.queries == roles.key.size
    keep = by_places(found.lifter, _all_kept(terms))
    return masks.read(keep, roles.query_index, roles.key, roles.batch, square)


def _empty(
    found: Attention, terms: Sequence[MaskTerm], biases: Sequence[Bias], structure: masks.Structure
) -> str | None:
    """The op's ``empty`` under which a query without keys gives what the model gives; None if there is none."""
    roles, moderate = found.roles, all(is_moderate(b) for b in biases)
    leaves_keys = masks.leaves_keys(structure, roles.queries, roles.key.size)
    if found.scores.floored and found.sinks is None and not (leaves_keys and moderate):
        return None
    if found.sinks is not None or leaves_keys:
        soft = [t for t in terms if t.value != INFINITE]
        # beside a bias that may itself mask, a finite mask does not say which keys are left, nor how far below a sink
        if soft and not moderate and (found.sinks is None or any(not t.value <= masks.ABSORBING for t in soft)):
            return None
        undefined = biases and found.sinks is None and found.zeroed in ("never", "undefined", "multiplied")
        return "nan" if undefined else "zero"  # a bias may be -inf for every key
    finite = moderate and all(t.value > INFINITE for t in terms)  # or 0 times it is no number
    if found.zeroed == "always" or (found.zeroed == "multiplied" and finite):
        return "zero"
    if found.zeroed == "undefined":
        return "nan"
    values = {t.value for t in terms}
    if values == {INFINITE}:
        return "zero" if found.zeroed == "infinite" else "nan"
    if len(values) != 1 or any(v != v for v in values) or not moderate:
        return None
    (value,) = values
    fills = [t for t in terms if not t.added]
    if len(fills) == len(terms):
        return "uniform" if all(b.depth >= len(fills) for b in biases) else None
    return "shifted" if len(terms) == 1 and not biases and value <= masks.ABSORBING else None


def _sum(
    found: Attention, biases: Sequence[Bias], want: Sequence[Group], like: Sequence[Extent], full: bool = False
) -> Operand:
    """The biases as one tensor; ``full`` where they are those of a stretch of keys."""
    by_factor: dict[float, Operand] = {}  # added up first, as large ones may overflow together
    for bias in [part for whole in biases for part in _summands(found, whole, some=full)]:
        if bias.stretches:
            factor = 1.0
            part = _along_keys(found, bias, lambda own, its: _sum(found, own, its, like, full=True), like)
        else:
            expression, factor = _held(found, bias)
            part = _of_bias(found, expression, want, like, full)
        by_factor[factor] = by_factor[factor].then(aten.add.Tensor, part) if factor in by_factor else part
    first, *others = [
        total if factor == 1.0 else total.then(aten.mul.Scalar, factor) for factor, total in by_factor.items()
    ]
    for other in others:
        first = first.then(aten.add.Tensor, other)
    return first


def _of_bias(found: Attention, e: Expr, want: Sequence[Group], like: Sequence[Extent], full: bool) -> Operand:
    """The tensor of a bias; one of booleans as the numbers 0 and 1 that are added."""
    match e:
        case n.Apply("indicator", (holds,)) if e not in found.lifter.origins:
            return _condition(found, holds, want, like, full).then(aten.to.dtype, dtype_of(found.output))
    return _bound(found, e, want, "bias", like, full)


def _along_keys(
    found: Attention,
    term: MaskTerm | Bias,
    tensor_of: Callable[[Any, Sequence[Group]], Operand],
    like: Sequence[Extent],
    value: float = 0.0,
) -> Operand:
    """The tensor of a term that is another for each stretch of keys; ``value`` where a stretch has none."""
    key = found.roles.key
    stretches: Sequence[tuple[Stretch, Sequence[Any]]] = term.stretches
    varies = {x for _, own in stretches for part in own for x in part.expression.variables}
    want = [group if group == (key,) or varies & set(group) else () for group in found.roles.of_scores]
    parts = [(s, tensor_of(own, renamed(want, key, s)) if own else None) for s, own in stretches]
    return in_a_row(parts, want.index((key,)), len(want), like, value)


def _bound(
    found: Attention, expression: Expr, want: Sequence[Group], what: str, like: Sequence[Extent], full: bool = False
) -> Operand:
    return bind(found.lifter, expression, want, what, like, full, found.region)


def _held(found: Attention, bias: Bias) -> tuple[Expr, float]:
    """A bias as an expression that a node holds, and a factor: ``x - c * y`` is added as ``-1 * (c * y)``."""
    whole = n.mul(n.Const(bias.factor), bias.expression)
    factor, rest = n.scaled(whole)
    ways = ((bias.expression, bias.factor), (whole, 1.0), (n.neg(whole), -1.0), (rest, factor))
    return next((way for way in ways if way[0] in found.lifter.origins), ways[0])


def _summands(found: Attention, bias: Bias, some: bool) -> Iterator[Bias]:
    """The terms of a bias that have tensors: itself, or the terms that the model added to the scores one by one.

    A number that is added to all scores changes nothing; one that is added to those of ``some`` keys does, or to all
    but a sink.
    """
    match bias.expression:
        case n.Apply("add", arguments) if not bias.stretches and _held(found, bias)[0] not in found.lifter.origins:
            for part in arguments:
                if not isinstance(part, n.Const):
                    yield from _summands(found, replace(bias, expression=part), some)
                elif some or found.sinks is not None:
                    others = "the other keys" if some else "the sink"
                    raise Refused(
                        f"a number is added to the scores of some of the keys, and not to {others}", found.anchor
                    )
                elif abs(part.value * bias.factor) >= -masks.NEGLIGIBLE:
                    raise Refused("a large number is added to all scores", found.anchor)
        case _:
            yield bias


def _inputs(
    found: Attention, terms: Sequence[MaskTerm], structure: masks.Structure, like: Sequence[Extent]
) -> tuple[masks.Structure, dict[str, Operand]]:
    """What is left of the structure, and tensors for what depends on inputs: padding, documents, an opaque mask.

    A condition with a tensor of its own is passed on alone; else the whole mask that it is part of is.
    """
    roles = found.roles
    keys = (roles.batch, (roles.key,))
    operands: dict[str, Operand] = {}
    opaque = (*structure.rest, *structure.entries)
    try:
        if structure.documents is not None:
            held = _bound(found, structure.documents, keys, "documents", like, full=True)
            keep = _all_kept(terms)
            operands["documents"] = replace(held, follows=by_places(found.lifter, keep) != keep)
        if structure.padding:
            padding = [_condition(found, c, keys, like, full=True) for c in structure.padding]
            operands["padding"] = _all(padding)
        if opaque:
            operands["mask"] = _all([_condition(found, c, roles.of_scores, like) for c in opaque])
        return structure, operands
    except Refused:
        whole = [t for t in terms if not _read(found, [t]).is_band] or list(terms)
        rest = _read(found, [t for t in terms if t not in whole])
        return rest, {"mask": _all([_kept(found, t, roles.of_scores, like) for t in whole])}


def _all(conditions: Sequence[Operand]) -> Operand:
    """The conjunction of conditions."""
    first, *others = conditions
    for other in others:
        first = first.then(aten.logical_and.default, other)
    return first


def _kept(
    found: Attention, term: MaskTerm, want: Sequence[Group], like: Sequence[Extent], full: bool = False
) -> Operand:
    """A whole mask as a boolean tensor."""
    if term.stretches:

        def of_stretch(own: Sequence[MaskTerm], its: Sequence[Group]) -> Operand:
            return _all([_kept(found, part, its, like, full=True) for part in own])

        return _along_keys(found, term, of_stretch, like, value=True)
    if term.expression == term.keep:
        return _condition(found, term.keep, want, like, full=full)
    held = replace(_bound(found, term.expression, want, "mask", like, full), levels=term.levels)
    return held.then(aten.gt.Scalar, masks.NEGLIGIBLE)


def _condition(
    found: Attention, keep: Expr, want: Sequence[Group], like: Sequence[Extent], full: bool = False
) -> Operand:
    return condition(found.lifter, keep, want, "mask", like, full, found.region)


def claims(
    found: Attention, terms: Sequence[MaskTerm], like: Sequence[Extent], biases: Sequence[Bias] = ()
) -> tuple[Claim, ...]:
    """The tensors that the model masks with: what was read of them is held against their values.

    Of the nodes that hold a mask it is the one nearest to the scores, so that all that was read lies behind it. Where
    there are biases, which may be masks too, it is all that is added to the product.
    """
    if is_sdpa(found.anchor) and argument(found.anchor, 5, "is_causal", False):
        return (Claim(None, of="causal"),)
    masked = [replace(_claim(found, term, like), leaves=_leaves(term.expression)) for term in terms]
    if biases:
        read = [*(term.expression for term in terms), *(bias.expression for bias in biases)]
        masked.append(replace(_added(found, like), leaves=_leaves(*read)))
    return tuple(masked)


def _leaves(*read: Expr) -> tuple[Node, ...]:
    """The nodes that expressions look no further into."""
    loads = (part.node for e in read for part in e.walk() if isinstance(part, n.Load))
    return tuple(dict.fromkeys(node for node in loads if node.op == "call_function"))


def _added(found: Attention, like: Sequence[Extent]) -> Claim:
    """What the softmax is of, or what PyTorch's fused operator adds to the product."""
    fused = is_sdpa(found.anchor)
    node = argument(found.anchor, 3, "attn_mask") if fused else logits_of(found.anchor)[0]
    try:
        held = arrange(node, broadcast(found.place, node), found.roles.of_scores, "scores", like=like)
    except Refused:
        return Claim(None, of="scores")
    return Claim(held, of="scores")


def _claim(found: Attention, term: MaskTerm, like: Sequence[Extent]) -> Claim:
    if term.stretches:
        try:
            return Claim(_kept(found, term, found.roles.of_scores, like))
        except Refused:
            return Claim(None)
    opposite = n.mul(n.Const(-1.0), term.expression)
    forms = (opposite, n.not_(term.keep), term.expression, term.keep)
    holders = {node: (form, index) for form in forms for node, index in found.lifter.origins.get(form, ())}
    for node in _nearest(found, holders):
        form, index = holders[node]
        try:
            held = arrange(node, index, found.roles.of_scores, "mask", like=like)
        except Refused:
            continue
        if form not in (term.keep, n.not_(term.keep)):
            return Claim(
                held if form == term.expression else held.then(aten.neg.default), term.levels or (masks.NEGLIGIBLE,)
            )
        held = held if dtype_of(node) is torch.bool else held.then(aten.ne.Scalar, 0)
        return Claim(held if form == term.keep else held.then(aten.logical_not.default))
    return Claim(None)


def _nearest(found: Attention, wanted: Collection[Node]) -> Iterator[Node]:
    """Those of some nodes that an attention is computed from, the nearest first; not looking far."""
    seen = {*found.operands}
    pending, missing = deque([found.output]), {*wanted}
    while pending and missing and len(seen) < FAR:
        node = pending.popleft()
        if node in seen:
            continue
        seen.add(node)
        if node in missing:
            missing.discard(node)
            yield node
        pending.extend(node.all_input_nodes)


def describe(structure: masks.Structure, operands: dict[str, Operand], masked: bool) -> Mask:
    """The proven structure, for the report: what bounds a query's keys, and what of it is an input.

    ``masked`` says whether some mask stays a tensor; a bias that masks nothing is an input, but no mask.
    """
    facts: dict[str, Any] = {
        name: value for name in ("window", "chunk", "prefix", "offset") if (value := getattr(structure, name))
    }
    kinds = []
    if structure.window:
        kinds.append("sliding" if structure.causal else "local")
    elif structure.causal:
        kinds.append("causal")
    if structure.chunk:
        kinds.append("chunked")
    if structure.prefix:
        kinds.append("prefix")
    inputs = sorted(operands.keys() & {"bias", "mask", "padding", "documents"})
    if inputs:
        facts["input"] = inputs
    kinds.extend(name for name in ("documents", "padding") if name in operands)
    if masked:
        kinds.append("input")
    return Mask("+".join(kinds) or "full", facts)
