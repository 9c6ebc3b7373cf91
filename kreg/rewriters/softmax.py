"""Attention as it is found: ``out = sum_t softmax_t(logits) * v``, from a softmax or from PyTorch's fused operator.

One reading serves every rule that wants attention of some kind. It starts at an anchor, writes the result's element
in index notation, takes the scores apart (`scores.py`), and gives each index variable its role (`roles.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.anchors import DROPOUTS, is_sdpa, is_stable, logits_of
from kreg.rewriters.arrange import Group
from kreg.rewriters.graph import aten, dtype_of, shape_of, users
from kreg.rewriters.lift import Index, Lifter
from kreg.rewriters.lift_ops import CONTRACTIONS, LAYOUT, POINTWISE
from kreg.rewriters.notation import Expr, Var
from kreg.rewriters.roles import Roles, assign
from kreg.rewriters.scores import Scores, factors_of, sum_over, summands, take_apart
from kreg.rewriters.sdpa import read_sdpa, whole_sdpa
from kreg.rewriters.site import Refused

Zeroed = Literal["never", "infinite", "always", "undefined"]
MOST_CUTS = 6
"""How often index variables are cut into digits before a reading gives up."""


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention as it was found, before any rule asks for more.

    Attributes:
        lifter: what lifted it.
        anchor: the softmax, or the fused operator.
        output: the product with the values, whose element was read at ``index``.
        v: element of the values; q and k are in ``scores.product``.
        scores: the logits taken apart.
        scores_at: the logits of another key than ``roles.key``.
        whole: the logits taken apart no further than the terms that the model adds.
        sinks: the logit without a value, or None.
        factor: a constant on the result.
        zeroed: what the graph gives for a query without keys: 0 "always", 0 where masks are "infinite", no number
            ("undefined"), or what the masks make of it ("never").
        roles: the part that each index variable plays.
    """

    lifter: Lifter
    anchor: Node
    output: Node
    index: Index
    v: n.Load
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
        """Element of the keys."""
        return self.scores.product.k


def read(lifter: Lifter, anchor: Node) -> Attention:
    """Takes an attention apart.

    Raises:
        Refused: an obligation that does not hold, with its node.
    """
    output, at = (anchor, _at_sdpa) if is_sdpa(anchor) else (_consumer(anchor), _at_softmax)
    groups: list[Group] = [(Var(f"x{d}", extent),) if extent != 1 else () for d, extent in enumerate(shape_of(output))]
    for _ in range(MOST_CUTS):
        index = tuple(n.number(group) for group in groups)
        found = at(lifter, anchor, output, index)
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
    """The one product that the weights go into; they may go nowhere else."""
    node = softmax
    while True:
        following = users(node)
        if len(following) != 1:
            names = ", ".join(user.name for user in following)
            raise Refused(f"the attention weights are used more than once, by {names}", node)
        (user,) = following
        if user.target in CONTRACTIONS:
            return user
        if user.target in DROPOUTS and (user.target is not aten.dropout.default or _active(user)):
            raise Refused(f"dropout is on for the attention weights (p={user.args[1]})", user)
        if user.op != "call_function" or not (user.target in LAYOUT or user.target in POINTWISE):
            raise Refused(f"the attention weights leave the region through {user.name}", user)
        node = user


def _active(dropout: Node) -> bool:
    return bool(dropout.args[1] != 0.0 and dropout.args[2])


def _at_softmax(lifter: Lifter, softmax: Node, output: Node, index: Index) -> Attention:
    summed, factor, body = sum_over(lifter.element(output, index))
    if len(summed) != 1:
        raise Refused("the product with the values has a form that is not read", output)
    key = Var("t", summed[0].size)
    if key.size == 1:
        raise Refused("there is a single key: its weight is no choice among keys", softmax)
    body = n.substitute(body, {summed[0]: key})
    weights, v, condition = _weighted_values(body, output)
    if weights.node is not softmax:
        raise Refused("the weights go through another softmax", softmax)
    source, dim = logits_of(softmax)
    if torch.promote_types(dtype_of(source), dtype_of(softmax)) != dtype_of(softmax):
        raise Refused("the softmax rounds its logits to a narrower dtype", softmax)
    if weights.index[dim] not in (key, n.add(key, n.ONE)):
        raise Refused("the softmax does not run over the keys that the values are summed over", softmax)
    if any(key in i.variables for d, i in enumerate(weights.index) if d != dim):
        raise Refused("the weights are a diagonal", softmax)

    def scores_at(at: Expr, whole: bool = False) -> Scores:
        place = tuple(n.substitute(i, {key: at}) for i in weights.index)
        return take_apart(lifter.element(source, place), at, dtype_of(output), softmax, whole=whole)

    def whole() -> Scores:
        return scores_at(key, whole=True)

    scores = scores_at(key)
    if condition is not None and condition != scores.keep:
        raise Refused("weights are masked after the softmax by another condition than before it", output)
    sinks = _sink(lifter, softmax, weights, key, scores)
    roles = assign(index, weights.index, key, scores, v, sinks, output)
    zeroed: Zeroed = "always" if condition is not None else "never" if is_stable(softmax) else "undefined"
    return Attention(lifter, softmax, output, index, v, scores, scores_at, whole, sinks, factor, zeroed, roles)


def _at_sdpa(lifter: Lifter, node: Node, output: Node, index: Index) -> Attention:
    found = read_sdpa(lifter, node, index)
    scores = found.scores
    roles = assign(index, (*index[:-1], found.key), found.key, scores, found.v, None, node)
    whole = partial(whole_sdpa, lifter, node, index, scores)
    return Attention(
        lifter, node, node, index, found.v, scores, lambda _: scores, whole, None, found.factor, "infinite", roles
    )


def _weighted_values(body: Expr, output: Node) -> tuple[n.Softmax, n.Load, Expr | None]:
    """The weight and the value of a key, and the condition that weights are kept under after the softmax."""
    factors = factors_of(body)
    masked = [f for f in factors if isinstance(f, n.Apply) and f.function == "indicator"]
    conditions = [f.arguments[0] for f in masked]
    values = [f for f in factors if isinstance(f, n.Load)]
    weights = [f for f in factors if f not in masked and f not in values]
    if len(values) == 1 and len(weights) == 1 and len(conditions) <= 1:
        condition: Expr | None = conditions[0] if conditions else None
        e = weights[0]
        while True:
            match e:
                case n.Softmax():
                    return e, values[0], condition
                case n.Apply("rounded:bfloat16" | "rounded:float16", (inner,)):
                    if str(dtype_of(output)).removeprefix("torch.") not in e.function:
                        raise Refused(f"the weights are {e.function.replace(':', ' to ')} on the way", output)
                    e = inner
                    continue
                case n.Apply("where", (c, inner, n.Const(0))) if condition is None:
                    condition, e = c, inner
                    continue
                case n.Apply("where", (c, n.Const(0), inner)) if condition is None:
                    condition, e = n.not_(c), inner
                    continue
            break
        name = e.function if isinstance(e, n.Apply) else type(e).__name__.lower()
        raise Refused(f"between the softmax and the values there is more than a product ({name})", output)
    raise Refused("between the softmax and the values there is more than a product with one tensor", output)


def _sink(lifter: Lifter, softmax: Node, weights: n.Softmax, key: Var, scores: Scores) -> Expr | None:
    source, dim = logits_of(softmax)
    extent = n.size(shape_of(source)[dim])
    keys = n.size(key.size)
    if extent == keys:
        return None
    if extent != n.add(keys, n.ONE):
        raise Refused("the softmax runs over logits that have no value, and they are not one sink", softmax)
    at = n.ZERO if weights.index[dim] != key else keys
    logit = lifter.element(source, (*weights.index[:dim], at, *weights.index[dim + 1 :]))
    rest = summands(logit)
    for e in scores.shift:
        if e not in rest:
            raise Refused("the keys' logits are shifted by an amount that the sink's is not", softmax)
        rest.remove(e)
    if len(rest) > 1:
        raise Refused("the sink is a sum that is not read", softmax)
    return rest[0] if rest else n.Const(0.0)
