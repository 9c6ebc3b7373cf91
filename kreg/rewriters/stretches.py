"""Expressions that are one thing on some indices and another on the next: what a ``cat`` is in index notation.

``where(t < 5, a[t], b[t - 5])`` is two stretches of ``t``: ``a[u]`` from 0 on, and ``b[w]`` from 5 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

from kreg.rewriters import notation as n
from kreg.rewriters.lift import Lifter
from kreg.rewriters.notation import Expr, Sized, Var


@dataclass(frozen=True)
class Stretch:
    """A run of a variable's values.

    Attributes:
        first: where it begins.
        variable: the place in it.
    """

    first: Expr
    variable: Var


def split(e: Expr, key: Expr, worth: Callable[[n.Apply], bool] = lambda choice: True) -> list[Stretch]:
    """The stretches of ``key`` between which an expression changes its form.

    None where it is one form throughout, or where the order of the bounds is not known.

    Args:
        worth: which choices to split at.
    """
    if not isinstance(key, Var):
        return []
    ends: list[Expr] = [n.ZERO, n.size(key.size)]
    for part in e.walk():
        if isinstance(part, n.Apply) and part.function == "where" and worth(part):
            bound = _bound(part.arguments[0], key)
            if bound is not None and bound not in ends:
                place = next((i for i, end in enumerate(ends) if _precedes(bound, end)), None)
                if not place or not _precedes(ends[place - 1], bound):
                    return []
                ends.insert(place, bound)
    if len(ends) == 2:
        return []
    sizes = [(first, extent(n.sub(behind, first))) for first, behind in pairwise(ends)]
    return [Stretch(first, Var(f"{key.name}.{i}", size)) for i, (first, size) in enumerate(sizes)]


def on(e: Expr, key: Var, stretch: Stretch) -> Expr:
    """An expression in ``key``, on a stretch of it."""
    return n.substitute(e, {key: n.add(stretch.first, stretch.variable)})


def lifted_on(lifter: Lifter, e: Expr, key: Var, stretch: Stretch) -> Expr:
    """The same, lifted again where it is a tensor's element, so that its parts have their tensors there."""
    origins = [*lifter.origins.get(e, ())]
    found = [lifter.element(node, tuple(on(i, key, stretch) for i in index)) for node, index in origins]
    return found[0] if found else on(e, key, stretch)


def join(parts: Sequence[tuple[Stretch, Expr]], key: Var) -> Expr:
    """The expression that is one thing on each stretch of ``key``; the stretches follow one another."""

    def own(stretch: Stretch, e: Expr) -> Expr:
        return n.substitute(e, {stretch.variable: n.sub(key, stretch.first)})

    *others, last = parts
    ends = [stretch.first for stretch, _ in parts[1:]]
    return reduce(
        lambda rest, part: n.where(n.le0(n.add(n.sub(key, part[1]), n.ONE)), own(*part[0]), rest),
        reversed(list(zip(others, ends, strict=True))),
        own(*last),
    )


def extent(e: Expr) -> Sized:
    """A size in index notation as the number or symbolic size that it is."""
    terms, constant = n.parts(e)
    total: Sized = constant
    for atom, factor in terms.items():
        assert isinstance(atom, n.Size)
        total = total + factor * atom.value
    return total


def _bound(condition: Expr, key: Var) -> Expr | None:
    """The first ``key`` on the other side of a condition on nothing but sizes and it."""
    match condition:
        case n.Apply("le0", (inner,)):
            terms, _ = n.parts(inner)
            sign = terms.pop(key, 0)
            if abs(sign) == 1 and all(isinstance(atom, n.Size) for atom in terms):
                rest = n.sub(inner, n.mul(n.Const(sign), key))
                return n.sub(n.ONE, rest) if sign == 1 else rest
    return None


def _precedes(a: Expr, b: Expr) -> bool:
    return n.never_negative(n.sub(b, a))
