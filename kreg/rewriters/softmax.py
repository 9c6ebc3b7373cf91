"""Attention as it is found: ``out = sum_t softmax_t(logits) * v``, from a softmax or from PyTorch's fused operator.

One reading serves every rule that wants attention of some kind. It starts at an anchor, writes the result's element
in index notation, takes the scores apart (`scores.py`), and gives each index variable its role (`roles.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.anchors import DROPOUTS, PASSING, has_keys, is_sdpa, is_stable, logits_of
from kreg.rewriters.arrange import Group
from kreg.rewriters.graph import aten, dtype_of, is_learnt, shape_of, upstream, users
from kreg.rewriters.lift import Index, Lifter
from kreg.rewriters.lift_ops import CONTRACTIONS
from kreg.rewriters.notation import Expr, Var
from kreg.rewriters.roles import Roles, assign
from kreg.rewriters.scores import Scores, factors_of, sum_over, summands, take_apart, terms_of
from kreg.rewriters.sdpa import read_sdpa, whole_sdpa
from kreg.rewriters.site import Refused
from kreg.rewriters.stretches import Stretch, extent, join, lifted_on

Zeroed = Literal["never", "infinite", "always", "undefined", "multiplied"]
MOST_CUTS = 6
"""How often index variables are cut into digits before a reading gives up."""


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention as it was found, before any rule asks for more.

    Attributes:
        lifter: what lifted it.
        anchor: the softmax, or the fused operator.
        output: the product with the values, whose element was read at ``index``.
        place: where a key's logit stands: batch, heads, query and key in the model's own order.
        values: element of the values, as that of the keys is in ``scores.product``: of one tensor, or on each stretch
            of keys of another.
        scores: the logits taken apart.
        scores_at: the logits of another key than ``roles.key``.
        whole: the logits taken apart no further than the terms that the model adds.
        sinks: the logit without a value, or None.
        factor: a constant on the result.
        zeroed: what the graph gives for a query without keys: 0 "always", 0 where masks are "infinite", no number
            ("undefined"), what the masks make of it ("never"), or 0 times that ("multiplied").
        roles: the part that each index variable plays.
    """

    lifter: Lifter
    anchor: Node
    output: Node
    index: Index
    place: Index
    values: Expr
    scores: Scores
    scores_at: Callable[[Expr], Scores]
    whole: Callable[[], Scores]
    sinks: Expr | None
    factor: float
    zeroed: Zeroed
    roles: Roles

    @property
    def q(self) -> n.Load:
        """Element of the queries."""
        return self.scores.product.q

    @property
    def k(self) -> n.Load:
        """Element of the keys, where they are one tensor."""
        return self.scores.product.k

    @property
    def v(self) -> n.Load:
        """Element of the values, where they are one tensor."""
        if not isinstance(self.values, n.Load):
            raise Refused("the values are in several tensors", self.anchor)
        return self.values

    @property
    def sinks_by_query(self) -> bool:
        """Whether each query has a sink of its own."""
        return self.sinks is not None and bool(self.sinks.variables & set(self.roles.query))

    @cached_property
    def region(self) -> frozenset[Node]:
        """The nodes that compute the result from queries, keys, values, and whatever else the graph reads."""
        return frozenset(upstream([self.output], {*self.operands}))

    @property
    def operands(self) -> tuple[Node, ...]:
        """The nodes of queries, keys and values."""
        parts = (self.q, *tensors(self.scores.product.keys), *tensors(self.values))
        return tuple(dict.fromkeys(part.node for part in parts))


def tensors(e: Expr) -> Iterator[n.Load]:
    """The elements of tensors that an operand's element is, on one stretch of keys or another."""
    match e:
        case n.Load():
            yield e
        case n.Apply("where", (_, yes, no)):
            yield from tensors(yes)
            yield from tensors(no)


def read(lifter: Lifter, anchor: Node) -> Attention:
    """Takes an attention apart.

    Raises:
        Refused: an obligation that does not hold, with its node.
    """
    output, at = (anchor, _at_sdpa) if is_sdpa(anchor) else (_consumer(anchor), _at_softmax)
    lifter = lifter if is_sdpa(anchor) or has_keys(anchor) else lifter.into_layers
    groups: list[Group] = [(Var(f"x{d}", extent),) if extent != 1 else () for d, extent in enumerate(shape_of(output))]
    for _ in range(MOST_CUTS):
        index = tuple(n.number(group) for group in groups)
        found = at(lifter, anchor, output, index)
        if found.scores.scale == 0.0:
            raise Refused("the scores are multiplied by 0, which is NaN wherever they are infinite", anchor)
        cut = next(iter(_cuts(found)), None)
        if cut is None:
            return found
        groups = [_cut(group, *cut) for group in groups]
    raise Refused("heads and batch are flattened in a way that is not read", output)


def _cuts(found: Attention) -> list[tuple[Var, int]]:
    """Index variables to read as two digits: those of batch and heads that an operand or a mask takes apart."""
    scores = found.scores
    parts = [*(m.keep for m in scores.masks), *(b.expression for b in scores.biases), found.sinks or n.ZERO]
    cuts = {cut for part in parts for cut in n.cuts(part)} | found.lifter.cuts
    shared = {*found.roles.batch, *found.roles.heads}
    return sorted(
        ((v, radix) for v, radix in cuts if v in shared and isinstance(radix, int) and _divides(v, radix)),
        key=lambda cut: (cut[0].name, -cut[1]),
    )


def _divides(variable: Var, radix: int) -> bool:
    extent = variable.size
    if isinstance(extent, int):
        return extent % radix == 0 and extent > radix
    return bool((extent / radix).is_integer)


def _cut(group: tuple[Var, ...], variable: Var, radix: int) -> tuple[Var, ...]:
    if variable not in group:
        return group
    high = variable.size // radix if isinstance(variable.size, int) else variable.size / radix
    at = group.index(variable)
    digits = (Var(f"{variable.name}/{radix}", high), Var(f"{variable.name}%{radix}", radix))
    return (*group[:at], *digits, *group[at + 1 :])


def _consumer(softmax: Node) -> Node:
    """The product that the weights go into, or the sum of those that slices of them go into; they go nowhere else."""
    open_ends = _products(softmax)
    while len(open_ends) > 1:
        first = min(open_ends)
        following = users(first)
        if len(following) != 1 or following[0].target not in PASSING:
            raise Refused(_used_by(softmax), softmax)
        open_ends = (open_ends - {first}) | {following[0]}
    return open_ends.pop()


def _products(softmax: Node) -> set[Node]:
    """The products that weights go into."""
    found: set[Node] = set()
    pending: list[tuple[Node, Refused | None]] = [(softmax, None)]
    while pending:
        node, several = pending.pop()
        following = users(node)
        if len(following) > 1:
            several = Refused(_used_by(node), node)
        for user in following:
            if user.target in CONTRACTIONS:
                found.add(user)
                continue
            if user.target in DROPOUTS and (user.target is aten.native_dropout.default or _active(user)):
                raise Refused(f"dropout is on for the attention weights (p={user.args[1]})", user)
            if user.target not in PASSING:
                raise several or Refused(f"the attention weights leave the region through {user.name}", user)
            pending.append((user, several))
    return found


def _used_by(weights: Node) -> str:
    return f"the attention weights are used more than once, by {', '.join(user.name for user in users(weights))}"


def _active(dropout: Node) -> bool:
    return bool(dropout.args[1] != 0.0 and dropout.args[2])


def _at_softmax(lifter: Lifter, softmax: Node, output: Node, index: Index) -> Attention:
    factor, result = n.scaled(lifter.element(output, index))
    products = [_weighted(term, softmax, output) for term in terms_of(result)]
    weights, condition = products[0].weights, products[0].condition
    source, dim = logits_of(softmax)
    if torch.promote_types(dtype_of(source), dtype_of(softmax)) != dtype_of(softmax):
        raise Refused("the softmax rounds its logits to a narrower dtype", softmax)
    key, first, values = _all_keys(products, softmax)
    if key.size == 1:
        raise Refused("there is a single key: its weight is no choice among keys", softmax)
    if condition is not None:
        condition, _ = (
            lifted_on(lifter, e, products[0].variable, Stretch(n.ZERO, key)) for e in (condition, n.not_(condition))
        )
    at_key = (*weights.index[:dim], n.add(key, first), *weights.index[dim + 1 :])

    def scores_at(at: Expr, whole: bool = False) -> Scores:
        place = tuple(n.substitute(i, {key: at}) for i in at_key)
        logit = lifter.element(source, place)
        return take_apart(lifter, logit, at, dtype_of(output), softmax, whole=whole, values=values.variables)

    def whole() -> Scores:
        return scores_at(key, whole=True)

    if lifter.layers and _has_learnt_keys(lifter.element(source, at_key), key):
        raise Refused("the logits are not one product of queries and keys: the keys are a parameter", softmax)
    scores = scores_at(key)
    if condition is not None and condition != scores.keep:
        raise Refused("weights are masked after the softmax by another condition than before it", output)
    sinks = _sink(lifter, softmax, at_key, key, scores)
    roles = assign(index, at_key, key, scores, values, sinks, output)
    if lifter.layers and _are_features(roles, scores):
        raise Refused("the softmax is of a layer's results that are features of the keys, and no scores", softmax)
    zeroed: Zeroed = "never" if is_stable(softmax) else "undefined"
    if condition is not None and (products[0].chosen or is_stable(softmax)):
        zeroed = "always" if products[0].chosen else "multiplied"
    factor *= products[0].factor
    return Attention(
        lifter, softmax, output, index, at_key, values, scores, scores_at, whole, sinks, factor, zeroed, roles
    )


def _has_learnt_keys(logit: Expr, key: Var) -> bool:
    sums = (part for part in logit.walk() if isinstance(part, n.Reduce))
    loads = (part for e in sums for part in e.walk() if isinstance(part, n.Load))
    return any(key in load.variables and is_learnt(load.node) for load in loads)


def _are_features(roles: Roles, scores: Scores) -> bool:
    """Whether a layer gives out features, as in linear attention: split into heads, or no fewer than it was given.

    To read its weight as queries would not be wrong; but there the layer is no part of an attention, and stays one.
    """
    split = not {*roles.batch, *roles.heads} <= scores.product.keys.variables
    given = [channel.size for channel in scores.product.channels]
    return split or not all(isinstance(s, int) for s in (*given, roles.queries)) or roles.queries >= math.prod(given)


@dataclass(frozen=True)
class _Weighted:
    """``factor * sum over variable of weights * values``: what some of the keys add to the result.

    Attributes:
        first: the first of these keys.
        condition: under which the weights are kept after the softmax.
        chosen: whether 0 is chosen in their place otherwise; a factor 0 leaves what is no number.
    """

    first: Expr
    variable: Var
    weights: n.Softmax
    values: n.Load
    factor: float
    condition: Expr | None
    chosen: bool


def _weighted(term: Expr, softmax: Node, output: Node) -> _Weighted:
    summed, factor, body = sum_over(term)
    if len(summed) != 1:
        raise Refused("the product with the values has a form that is not read", output)
    (variable,) = summed
    weights, values, condition, chosen = _weighted_values(body, output)
    if weights.node is not softmax:
        raise Refused("the weights go through another softmax", softmax)
    place = weights.index[weights.dim]  # of a single key the place is a number
    first = n.sub(place, variable) if variable.size != 1 else n.substitute(place, {variable: n.ZERO})
    if variable in first.variables or not _is_size(first):
        raise Refused("the softmax does not run over the keys that the values are summed over", softmax)
    if any(variable in i.variables for d, i in enumerate(weights.index) if d != weights.dim):
        raise Refused("the weights are a diagonal", softmax)
    return _Weighted(first, variable, weights, values, factor, condition, chosen)


def _is_size(e: Expr) -> bool:
    return all(isinstance(atom, n.Size) for atom in n.parts(e)[0])


def _all_keys(products: Sequence[_Weighted], softmax: Node) -> tuple[Var, Expr, Expr]:
    """The key of all that is added up, the place of the first in the softmax, and the value of a key."""
    one = products[0]
    for other in products[1:]:
        if other.factor != one.factor or other.condition is not None or one.condition is not None:
            raise Refused("slices of the attention weights are changed each in its own way", softmax)
        if _beside(other) != _beside(one):
            raise Refused("slices of the attention weights are not of the same queries", softmax)
    left = list(products)
    begin = place = n.ZERO if any(p.first == n.ZERO for p in left) else n.ONE
    parts: list[tuple[Stretch, Expr]] = []
    while left:
        found = next((p for p in left if p.first == place), None)
        if found is None:
            if len(products) == 1:
                raise Refused("the softmax does not run over the keys that the values are summed over", softmax)
            reason = "the attention weights are used more than once, and not in slices that follow one another"
            raise Refused(reason, softmax)
        left.remove(found)
        parts.append((Stretch(n.sub(place, begin), found.variable), found.values))
        place = n.add(place, n.size(found.variable.size))
    key = Var("t", extent(n.sub(place, begin)))
    return key, begin, join(parts, key)


def _beside(product: _Weighted) -> Index:
    """Where weights are taken, the key aside."""
    weights = product.weights
    return (*weights.index[: weights.dim], *weights.index[weights.dim + 1 :])


def _at_sdpa(lifter: Lifter, node: Node, output: Node, index: Index) -> Attention:
    found = read_sdpa(lifter, node, index)
    scores = found.scores
    roles = assign(index, (*index[:-1], found.key), found.key, scores, found.v, None, node)
    whole = partial(whole_sdpa, lifter, node, index, scores)
    place = (*index[:-1], found.key)
    return Attention(
        lifter,
        node,
        node,
        index,
        place,
        found.v,
        scores,
        lambda _: scores,
        whole,
        None,
        found.factor,
        "infinite",
        roles,
    )


def _weighted_values(body: Expr, output: Node) -> tuple[n.Softmax, n.Load, Expr | None, bool]:
    """The weight and the value of a key, the condition that weights are kept under after the softmax, and whether it
    chooses 0 in their place."""
    factors = factors_of(body)
    masked = [f for f in factors if isinstance(f, n.Apply) and f.function == "indicator"]
    conditions = [f.arguments[0] for f in masked]
    values = [f for f in factors if isinstance(f, n.Load)]
    weights = [f for f in factors if f not in masked and f not in values]
    if len(values) == 1 and len(weights) == 1 and len(conditions) <= 1:
        condition: Expr | None = conditions[0] if conditions else None
        chosen, e = False, weights[0]
        while True:
            match e:
                case n.Softmax():
                    return e, values[0], condition, chosen
                case n.Apply("rounded:bfloat16" | "rounded:float16", (inner,)):
                    if str(dtype_of(output)).removeprefix("torch.") not in e.function:
                        raise Refused(f"the weights are {e.function.replace(':', ' to ')} on the way", output)
                    e = inner
                    continue
                case n.Apply("where", (c, inner, n.Const(0))) if condition is None:
                    condition, chosen, e = c, True, inner
                    continue
                case n.Apply("where", (c, n.Const(0), inner)) if condition is None:
                    condition, chosen, e = n.not_(c), True, inner
                    continue
            break
        name = e.function if isinstance(e, n.Apply) else type(e).__name__.lower()
        raise Refused(f"between the softmax and the values there is more than a product ({name})", output)
    raise Refused("between the softmax and the values there is more than a product with one tensor", output)


def _sink(lifter: Lifter, softmax: Node, at_key: Index, key: Var, scores: Scores) -> Expr | None:
    source, dim = logits_of(softmax)
    extent = n.size(shape_of(source)[dim])
    keys = n.size(key.size)
    if extent == keys:
        return None
    if extent != n.add(keys, n.ONE):
        raise Refused("the softmax runs over logits that have no value, and they are not one sink", softmax)
    at = n.ZERO if at_key[dim] != key else keys
    logit = lifter.element(source, (*at_key[:dim], at, *at_key[dim + 1 :]))
    rest = summands(logit)
    for e in scores.shift:
        if e not in rest:
            raise Refused("the keys' logits are shifted by an amount that the sink's is not", softmax)
        rest.remove(e)
    if len(rest) > 1:
        raise Refused("the sink is a sum that is not read", softmax)
    return rest[0] if rest else n.Const(0.0)
