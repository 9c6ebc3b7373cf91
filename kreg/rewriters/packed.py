"""Packed sequences: within a document, positions compare as places do.

Several sequences in one row are told apart by their positions: one begins where a position is not the one before it
plus 1, and ``D = cumsum(P[j] - P[j - 1] != 1)`` numbers them. What is added up is never negative, so ``D[i] == D[j]``
says that none begins between ``i`` and ``j``: each position there is the one before it plus 1, and
``P[i] - P[j] == i - j``. That holds for every P, whether or not it is what positions should be. So a condition beside
``D[q] == D[k]`` that compares ``P[k]`` with ``P[q]`` compares k with q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten, dtype_of, shape_of
from kreg.rewriters.lift import Lifter
from kreg.rewriters.notation import Expr

EXACT = (torch.int32, torch.int64)
"""Integers that no count of tokens leaves: in narrower ones a position after the largest may be the smallest."""


@dataclass(frozen=True)
class _Pair:
    """Two elements of one tensor that differ in one index.

    Attributes:
        one, other: the elements.
        dim: the dimension in which they differ.
    """

    one: n.Load
    other: n.Load
    dim: int

    @property
    def places(self) -> tuple[Expr, Expr]:
        return self.one.index[self.dim], self.other.index[self.dim]


def by_places(lifter: Lifter, keep: Expr) -> Expr:
    """A condition with places in it for positions, where documents that it asks to be equal are made of those."""
    conditions = n.conjuncts(keep)
    documents = [pair for c in conditions if (pair := _agreeing(c)) is not None]
    if not documents:
        return keep
    result = n.TRUE
    for condition in conditions:
        result = n.and_(result, _by_places(lifter, condition, documents))
    return result


def _by_places(lifter: Lifter, condition: Expr, documents: Sequence[_Pair]) -> Expr:
    """A condition without positions; as it is where some would be left."""
    result = condition
    for positions in _pairs(condition):
        if any(_numbers(lifter, pair, positions) for pair in documents):
            result = _replaced(result, positions)
    loaded = {part.node for part in condition.walk() if isinstance(part, n.Load)}
    left = {part.node for part in result.walk() if isinstance(part, n.Load)}
    return condition if left & loaded else result


def _agreeing(condition: Expr) -> _Pair | None:
    """The elements of a running sum along one dimension that a condition asks to be equal."""
    match condition:
        case n.Apply("eq0", (n.Linear(((n.Load() as a, c), (n.Load() as b, d)), 0),)) if c + d == 0:
            pair = _pair(a, b)
            if pair is not None and pair.one.node.target is aten.cumsum.default:
                dim = pair.one.node.args[1]
                return pair if dim in (pair.dim, pair.dim - len(a.index)) else None
    return None


def _pair(a: n.Load, b: n.Load) -> _Pair | None:
    if a.node is not b.node or dtype_of(a.node) not in EXACT:
        return None
    differ = [d for d, (i, j) in enumerate(zip(a.index, b.index, strict=True)) if i != j]
    return _Pair(a, b, differ[0]) if len(differ) == 1 else None


def _pairs(condition: Expr) -> Iterator[_Pair]:
    """Elements of one tensor of which the condition takes a difference."""
    for part in condition.walk():
        if isinstance(part, n.Linear):
            factors = [(atom, c) for atom, c in part.terms if isinstance(atom, n.Load)]
            for i, (a, c) in enumerate(factors):
                for b, d in factors[:i]:
                    if c + d == 0 and (pair := _pair(a, b)) is not None:
                        yield pair


def _numbers(lifter: Lifter, documents: _Pair, positions: _Pair) -> bool:
    """Whether documents are counted by the steps of positions other than 1, and both are asked of the same places."""
    if set(documents.places) != set(positions.places):
        return False
    node, dim = documents.one.node, documents.dim
    if shape_of(node)[dim] != shape_of(positions.one.node)[positions.dim]:
        return False
    before = n.Var(f"{node.name}.before", shape_of(node)[dim] - 1)
    after = n.add(before, n.ONE)
    index = documents.one.index
    begins = lifter.element(node.args[0], (*index[:dim], after, *index[dim + 1 :]))
    if isinstance(begins, n.Apply) and begins.function == "indicator":
        (begins,) = begins.arguments
    elif not n.is_boolean(begins):
        return False
    step = n.sub(_at(positions, after), _at(positions, before))
    goes_on = n.eq0(n.sub(step, n.ONE))
    return begins == n.not_(goes_on)


def _at(positions: _Pair, place: Expr) -> n.Load:
    """The position at a place."""
    load, dim = positions.one, positions.dim
    return n.Load(load.node, (*load.index[:dim], place, *load.index[dim + 1 :]), load.integral)


def _replaced(e: Expr, positions: _Pair) -> Expr:
    """A condition with the difference of two places where it has the difference of their positions."""
    match e:
        case n.Linear(terms, constant):
            rest = dict(terms)
            factor = rest.get(positions.one, 0)
            if factor and rest.get(positions.other) == -factor:
                del rest[positions.one], rest[positions.other]
                difference = n.sub(*positions.places)
                return n.add(n.linear(rest, constant), n.mul(n.Const(factor), difference))
        case n.Apply("le0", (inner,)):
            return n.le0(_replaced(inner, positions))
        case n.Apply("eq0", (inner,)):
            return n.eq0(_replaced(inner, positions))
        case n.Apply("not", (inner,)):
            return n.not_(_replaced(inner, positions))
        case n.Apply("and" | "or" as function, arguments):
            join, result = (n.and_, n.TRUE) if function == "and" else (n.or_, n.FALSE)
            for argument in arguments:
                result = join(result, _replaced(argument, positions))
            return result
    return e
