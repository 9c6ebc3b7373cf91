"""What a mask means: conditions on (query, key) read off their index notation.

Every integer comparison arrives as ``linear <= 0``, so the structures are a table of coefficients, whichever way
the model wrote them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from kreg.rewriters import notation as n
from kreg.rewriters.notation import Expr

NEGLIGIBLE = -1e4
"""Added to a score, this or less leaves a weight of 0 beside any other key of an ordinary score."""

ABSORBING = -1e30
"""Added to a score in any float, this or less leaves nothing of it; a few of them may add up to -inf."""


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
    """The conjunction a mask was proven to be; ``p = query + offset`` is a query's position.

    Attributes:
        causal: key <= p.
        window: key > p - window; 0 for none. Without ``causal`` also key < p + window.
        chunk: key // chunk == p // chunk; 0 for none.
        prefix: keys below it are kept whatever the four above say.
        offset: position of query 0.
        ratio: (key + 1) * ratio <= p + 1: compressed entries that are causally ready; 0 for none.
        selected: the tensor element whose values, over its last index, name the keys.
        documents: the element that keys and queries agree on, at the key.
        padding: conditions on (batch, key) that are read from an input.
        entries: the conditions that ``ratio`` and ``selected`` were read from.
        rest: conditions that fit no structure.
    """

    causal: bool = False
    window: int = 0
    chunk: int = 0
    prefix: int = 0
    offset: int = 0
    ratio: int = 0
    selected: n.Load | None = None
    documents: n.Load | None = None
    padding: tuple[Expr, ...] = ()
    entries: tuple[Expr, ...] = ()
    rest: tuple[Expr, ...] = ()

    @property
    def is_band(self) -> bool:
        """Whether nothing but distances and places count: no input, no selection, nothing unproven."""
        return not (self.ratio or self.selected or self.documents or self.padding or self.rest)


def leaves_keys(s: Structure, queries: n.Sized, keys: n.Sized) -> bool:
    """Whether the structure provably leaves every query a key: the one at its own position, or any."""
    if s.ratio or s.selected or s.padding or s.rest:
        return False
    if s.prefix > 0:
        return s.documents is None
    own_is_first = s.offset >= 0
    own_is_a_key = _end_within(queries, s.offset, keys)
    if s.chunk or s.documents:
        return own_is_first and own_is_a_key
    if not s.causal and not s.window:
        return True
    if s.window and not own_is_a_key:  # the last query's window may begin behind the last key
        last = n.add(n.size(queries), n.Const(s.offset - 1))
        reach = n.add(n.size(keys), n.Const(s.window - 2))
        return own_is_first and n.never_negative(n.sub(reach, last))
    return own_is_first


def read(keep: Expr, query: Expr, key: Expr, batch: Collection[Expr], square: bool = False) -> Structure:
    """Reads the structure of a condition over query and key indices.

    Args:
        batch: the variables a padding mask may be indexed by besides the key.
        square: whether there are as many queries as keys: then a window as far ahead as behind is told as such.
    """
    found = _Found()
    rest: list[Expr] = []
    for condition in n.conjuncts(keep):
        if not found.takes(condition, query, key, batch):
            rest.append(condition)
    structure = found.structure(square)
    if structure is None:
        return Structure(rest=n.conjuncts(keep))
    chunks = [c for c, at in found.placed if at != structure.offset]
    documents: list[Expr] = []
    if structure.documents is not None:
        own = n.substitute(structure.documents, {key: n.add(query, n.Const(structure.offset))})  # type: ignore[dict-item]
        all_are_keys = _all_are_keys(query, structure.offset, key)
        documents = [c for c, at_query in found.documents if at_query != own or not all_are_keys]
    return replace(  # those that agree with the rest are said by the structure, the others are not
        structure,
        chunk=structure.chunk if len(chunks) < len(found.placed) else 0,
        documents=structure.documents if len(documents) < len(found.documents) else None,
        rest=(*rest, *chunks, *documents),
    )


def _all_are_keys(query: Expr, offset: int, key: Expr) -> bool:
    """Whether every query provably stands at the position of a key."""
    queries = query.size if isinstance(query, n.Var) else 1
    return offset >= 0 and isinstance(key, n.Var) and _end_within(queries, offset, key.size)


def _end_within(queries: n.Sized, offset: int, keys: n.Sized) -> bool:
    """Whether the last query provably stands before the end of the keys."""
    return n.never_negative(n.sub(n.size(keys), n.add(n.size(queries), n.Const(offset))))


@dataclass
class _Found:
    """Conditions by kind, while a conjunction is read."""

    causal: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    placed: list[tuple[Expr, int]] = field(default_factory=list)
    selected: list[n.Load] = field(default_factory=list)
    documents: list[tuple[Expr, Expr]] = field(default_factory=list)
    at_key: list[n.Load] = field(default_factory=list)
    padding: list[Expr] = field(default_factory=list)
    entries: list[Expr] = field(default_factory=list)
    beside_prefix: bool = False  # a band that the prefix does not loosen
    bands: int = 0

    def takes(
        self, condition: Expr, query: Expr, key: Expr, batch: Collection[Expr], whole: Expr | None = None
    ) -> bool:
        """Whether a condition has a place here; ``whole`` is the one that it is a part of."""
        band = _band(condition, query, key) or _first_key(condition, query, key)
        if band is not None and band[:2] == (1, -1):
            self.causal.append(-band[2])
            self.bands += 1
        elif band is not None and band[:2] == (-1, 1):
            self.first.append(band[2])
            self.bands += 1
        elif band is not None and band[0] > 1 and band[1] == -1:
            self.blocks.append((band[0], band[0] - 1 - band[2]))
            self.entries.append(condition)
        elif (chunk := _chunk(condition, query, key)) is not None:
            self.chunks.append(chunk[0])
            self.placed.append((whole or condition, chunk[1]))
            self.bands += 1
        elif (member := _member(condition, key)) is not None:
            self.selected.append(member)
            self.entries.append(condition)
        elif (pair := _same(condition, query, key)) is not None:
            self.documents.append((condition, pair[0]))
            self.at_key.append(pair[1])
        elif sides := _sides(condition, query, key):
            return all(self.takes(side, query, key, batch) for side in sides)
        elif (prefix := _prefix(condition, query, key)) is not None:
            self.beside_prefix |= self.bands > 0
            self.prefixes.append(prefix[0])
            taken = all(self.takes(inner, query, key, (), condition) for inner in prefix[1])
            self.bands = 0
            return taken
        elif key in condition.variables and condition.variables <= {key, *batch}:
            self.padding.append(condition)
        else:
            return False
        return True

    def structure(self, square: bool) -> Structure | None:
        """The conditions together; None where they do not make one structure."""
        lists = (self.blocks, self.selected, self.chunks, self.at_key, self.prefixes)
        if any(len(set(found)) > 1 for found in lists) or (self.blocks and (self.causal or self.first or self.chunks)):
            return None
        if self.prefixes and (self.beside_prefix or self.bands):
            return None
        offset, first = min(self.causal, default=None), max(self.first, default=None)
        causal, window = offset is not None, 0
        if offset is None and first is not None:
            return None
        if offset is None:
            offset = self.placed[0][1] if self.placed else 0
        if first is not None:
            window = offset + 1 - first
            if window < 1:
                return None
            if square and offset > 0 and first == -offset and not self.prefixes:
                causal, window, offset = False, offset + 1, 0
        return Structure(
            causal=causal,
            window=window,
            chunk=self.chunks[0] if self.chunks else 0,
            prefix=self.prefixes[0] if self.prefixes else 0,
            offset=self.blocks[0][1] if self.blocks else offset,
            ratio=self.blocks[0][0] if self.blocks else 0,
            selected=self.selected[0] if self.selected else None,
            documents=self.at_key[0] if self.at_key else None,
            padding=tuple(self.padding),
            entries=tuple(self.entries),
        )


def _chunk(condition: Expr, query: Expr, key: Expr) -> tuple[int, int] | None:
    """``(query + c) // chunk == key // chunk`` as (chunk, c)."""
    match condition:
        case n.Apply("eq0", (n.Linear(((a, c), (b, d)), 0),)) if c + d == 0 and abs(c) == 1:
            for x, y in ((a, b), (b, a)):
                match x, y:
                    case n.Apply("floordiv", (of_key, n.Const(chunk))), n.Apply("floordiv", (of_query, n.Const(same))):
                        terms, offset = n.parts(of_query)
                        if of_key == key and chunk == same and isinstance(chunk, int) and terms == {query: 1}:
                            return chunk, offset
    return None


def _same(condition: Expr, query: Expr, key: Expr) -> tuple[Expr, n.Load] | None:
    """Elements of one tensor at the query and at the key that are equal."""
    match condition:
        case n.Apply("eq0", (n.Linear(((n.Load() as a, c), (n.Load() as b, d)), 0),)):
            for x, y in ((a, b), (b, a)):
                apart = {query, key} & y.variables == {key} and {query, key} & x.variables == {query}
                if apart and a.node is b.node and c + d == 0:
                    return x, y
    return None


def _prefix(condition: Expr, query: Expr, key: Expr) -> tuple[int, tuple[Expr, ...]] | None:
    """``key < prefix or (the rest)`` as (prefix, the rest's conditions)."""
    if not isinstance(condition, n.Apply) or condition.function != "or":
        return None
    arms = [_for_all_queries(a, condition.arguments, query, key) for a in condition.arguments]
    bounds = [(a, found) for a in arms if (found := _band(a, query, key)) and found[:2] == (1, 0)]
    others = [a for a in arms if all(a is not b for b, _ in bounds)]
    if len(bounds) != 1 or len(others) != 1:
        return None
    inner = n.conjuncts(others[0])
    bands = all(_band(c, query, key) is not None or _chunk(c, query, key) is not None for c in inner)
    return (1 - bounds[0][1][2], inner) if bands else None


def _sides(condition: Expr, query: Expr, key: Expr) -> tuple[Expr, ...]:
    """``(key <= query and near on this side) or (key > query and near on that side)`` as both; () if it is no such.

    That is: a side's other conditions are bands, and hold on all of the other side.
    """
    match condition:
        case n.Apply("or", (n.Apply("and", one), n.Apply("and", other))):
            for side in one:
                opposite = n.not_(side)
                if opposite not in other:
                    continue
                mine, its = [c for c in one if c != side], [c for c in other if c != opposite]
                if all(_follows(c, opposite, query, key) for c in mine) and all(
                    _follows(c, side, query, key) for c in its
                ):
                    return (*mine, *its)
    return ()


def _follows(condition: Expr, given: Expr, query: Expr, key: Expr) -> bool:
    """Whether one band lies within another."""
    wide, narrow = _band(condition, query, key), _band(given, query, key)
    return wide is not None and narrow is not None and wide[:2] == narrow[:2] and wide[2] <= narrow[2]


def _for_all_queries(arm: Expr, arms: Sequence[Expr], query: Expr, key: Expr) -> Expr:
    """``key < a and query < b`` as ``key < a``, where another arm keeps these keys for all other queries anyway."""
    match n.conjuncts(arm):
        case (n.Apply("le0", (one,)) as first, n.Apply("le0", (two,)) as second):
            for (of_key, last_key), (of_query, last_query), keys in (
                (n.parts(one), n.parts(two), first),
                (n.parts(two), n.parts(one), second),
            ):
                if of_key != {key: 1} or of_query != {query: 1}:
                    continue
                furthest = last_query - last_key - 1  # how far ahead of other queries these keys may lie
                for other in arms:
                    band = _band(other, query, key)
                    if band is not None and band[:2] == (1, -1) and furthest + band[2] <= 0:
                        return keys
    return arm


def _band(condition: Expr, query: Expr, key: Expr) -> tuple[int, int, int] | None:
    """``a * key + b * query + c <= 0`` as (a, b, c)."""
    match condition:
        case n.Apply("le0", (inner,)):
            terms, constant = n.parts(inner)
            if terms.keys() <= {query, key} and terms.keys() >= {key}:
                a = terms[key]
                return a, -a if query == n.ZERO else terms.get(query, 0), constant
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
