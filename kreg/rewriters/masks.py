"""What a mask means: conditions on (query, key) read off their index notation.

Every integer comparison arrives as ``linear <= 0``, so the structures are a table of coefficients, whichever way
the model wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kreg.rewriters import notation as n
from kreg.rewriters.notation import Expr

NEGLIGIBLE = -1e4
"""Added to a score, this or less leaves a weight of 0 beside any other key of an ordinary score."""


def keep_of(e: Expr) -> Expr | None:
    """The condition under which an additive mask's element is 0 and not (nearly) -inf; None if it is no mask."""
    match e:
        case n.Const(value):
            if value == 0:
                return n.TRUE
            return n.FALSE if value <= NEGLIGIBLE else None
        case n.Apply("where", (c, yes, no)):
            a, b = keep_of(yes), keep_of(no)
            return None if a is None or b is None else n.where(c, a, b)
        case n.Apply("add", arguments):
            keeps = [keep_of(a) for a in arguments]
            if any(k is None for k in keeps):
                return None
            result = n.TRUE
            for k in keeps:
                result = n.and_(result, k or n.TRUE)
            return result
        case n.Apply("mul", (n.Const(value), rest)) if value <= NEGLIGIBLE:
            return _zero_one(rest)
        case n.Apply("rounded:bfloat16" | "rounded:float16", (inner,)):
            return keep_of(inner)
    return None


def _zero_one(e: Expr) -> Expr | None:
    """The condition for a number that is 0 or 1 to be 0."""
    if isinstance(e, n.Apply) and e.function == "indicator":
        return n.not_(e.arguments[0])
    terms, constant = n.parts(e) if n.is_integral(e) else ({}, 0)
    if len(terms) == 1:
        ((atom, c),) = terms.items()
        if isinstance(atom, n.Apply) and atom.function == "indicator" and (c, constant) in ((1, 0), (-1, 1)):
            return n.not_(atom.arguments[0]) if c == 1 else atom.arguments[0]
    return None


@dataclass(frozen=True)
class Structure:
    """The conjunction a mask was proven to be.

    Attributes:
        causal: key <= query + offset.
        window: key > query + offset - window; 0 for none.
        offset: position of query 0.
        ratio: (key + 1) * ratio <= query + offset + 1: compressed entries that are causally ready; 0 for none.
        selected: the tensor element whose values, over its last index, name the keys.
        padding: conditions on (batch, key) read from an input.
        rest: conditions that fit no structure.
    """

    causal: bool = False
    window: int = 0
    offset: int = 0
    ratio: int = 0
    selected: n.Load | None = None
    padding: tuple[Expr, ...] = ()
    rest: tuple[Expr, ...] = ()


def leaves_keys(s: Structure, queries: n.Sized, keys: n.Sized) -> bool:
    """Whether causal and window masks provably leave every query a key."""
    if s.causal and s.offset < 0:
        return False
    last = n.add(n.size(queries), n.Const(s.offset - 1))
    reach = n.add(n.size(keys), n.Const(s.window - 2))
    return not s.window or n.never_negative(n.sub(reach, last))


def read(keep: Expr, query: Expr, key: Expr, batch: Expr | None) -> Structure:
    """Reads the structure of a condition over query and key indices."""
    causal_at: list[int] = []
    window_at: list[int] = []
    blocks: list[tuple[int, int]] = []
    selected: list[n.Load] = []
    padding: list[Expr] = []
    rest: list[Expr] = []
    for condition in n.conjuncts(keep):
        band = _band(condition, query, key) or _first_key(condition, query, key)
        member = _member(condition, key)
        if band is not None and band[:2] == (1, -1):
            causal_at.append(-band[2])
        elif band is not None and band[:2] == (-1, 1):
            window_at.append(band[2])
        elif band is not None and band[0] > 1 and band[1] == -1:
            blocks.append((band[0], band[0] - 1 - band[2]))
        elif member is not None:
            selected.append(member)
        elif key in condition.variables and condition.variables <= {key, batch}:
            padding.append(condition)
        else:
            rest.append(condition)
    offset = min(causal_at, default=0)
    first = max(window_at, default=None)
    if len(blocks) > 1 or len(selected) > 1 or (blocks and causal_at):
        return Structure(rest=n.conjuncts(keep))
    return Structure(
        causal=bool(causal_at),
        window=0 if first is None else offset + 1 - first,
        offset=blocks[0][1] if blocks else offset,
        ratio=blocks[0][0] if blocks else 0,
        selected=selected[0] if selected else None,
        padding=tuple(padding),
        rest=tuple(rest),
    )


def _band(condition: Expr, query: Expr, key: Expr) -> tuple[int, int, int] | None:
    """``a * key + b * query + c <= 0`` as (a, b, c)."""
    match condition:
        case n.Apply("le0", (inner,)):
            terms, constant = n.parts(inner)
            if terms.keys() <= {query, key} and terms.keys() >= {key}:
                return terms[key], terms.get(query, 0), constant
    return None


def _first_key(condition: Expr, query: Expr, key: Expr) -> tuple[int, int, int] | None:
    """``c - query <= 0`` as a band, where there is but one key, of index 0: it may stand for ``c + 1`` positions."""
    if not isinstance(key, n.Var) or key.size != 1:
        return None
    match condition:
        case n.Apply("le0", (n.Linear(((variable, -1),), c),)) if variable == query and c > 0:
            return c + 1, -1, c
    return None


def _member(condition: Expr, key: Expr) -> n.Load | None:
    """The load L in ``any over m: L[..., m] == key``, whatever sentinel the model writes for "none"."""
    if not isinstance(condition, n.Reduce) or condition.kind != "any":
        return None
    named: n.Load | None = None
    others: list[Expr] = []
    for part in n.conjuncts(condition.body):
        loaded = _equals(part, key)
        if loaded is not None and condition.variable in loaded.variables:
            named = loaded
        else:
            others.append(part)
    if named is None or named.index[-1] != condition.variable:
        return None
    implied = n.Apply("le0", (n.neg(named),))  # L >= 0 follows from L == key
    return named if all(o == implied for o in others) else None


def _equals(condition: Expr, key: Expr) -> n.Load | None:
    match condition:
        case n.Apply("eq0", (n.Linear(terms, 0),)) if len(terms) == 2:
            coefficients = dict(terms)
            c = coefficients.pop(key, 0)
            ((other, k),) = coefficients.items() if len(coefficients) == 1 else (((key, 0)),)
            if isinstance(other, n.Load) and c * k == -1:
                return other
    return None


def loads(e: Expr) -> Iterator[n.Load]:
    """The tensor elements an expression reads."""
    return (part for part in e.walk() if isinstance(part, n.Load))
