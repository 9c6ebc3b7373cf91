"""Index notation: what one element of a tensor is, as an expression in its indices.

A view, a broadcast, an iota, a comparison, a matrix product written in any of the ways PyTorch offers all come
down to the same few forms here, so rules and mask proofs read meaning instead of node sequences. Constructors
simplify as they build; each simplification is an identity that holds for every value in range.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import sympy

Sized: TypeAlias = int | sympy.Expr
"""A size: a number, or an expression in the graph's symbolic sizes."""


class Expr:
    """Base of all expressions. Immutable; equality is structural."""

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    @cached_property
    def variables(self) -> frozenset[Var]:
        """Index variables that the expression depends on, bound ones excluded."""
        return frozenset().union(*(child.variables for child in self.children))

    def walk(self) -> Iterator[Expr]:
        """This expression and everything below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Const(Expr):
    """A number. Booleans are the numbers True and False."""

    value: int | float | bool

    def __eq__(self, other: object) -> bool:  # 1, 1.0 and True are different constants
        return isinstance(other, Const) and type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class Var(Expr):
    """An index that runs from 0 to ``size - 1``."""

    name: str
    size: Sized

    @cached_property
    def variables(self) -> frozenset[Var]:
        return frozenset((self,))

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.size))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Size(Expr):
    """A symbolic size, at least 0."""

    value: sympy.Expr


@dataclass(frozen=True)
class Load(Expr):
    """One element of a tensor that is not looked into."""

    node: Any
    index: tuple[Expr, ...]
    integral: bool

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index

    @cached_property
    def _hash(self) -> int:
        return hash((id(self.node), self.index))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Linear(Expr):
    """An integer combination ``sum(coefficient * atom) + constant``, terms in a fixed order."""

    terms: tuple[tuple[Expr, int], ...]
    constant: int

    @property
    def children(self) -> tuple[Expr, ...]:
        return tuple(atom for atom, _ in self.terms)

    @cached_property
    def _hash(self) -> int:
        return hash((self.terms, self.constant))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Apply(Expr):
    """A pointwise function of other elements; ``le0`` and ``eq0`` compare an integer with 0."""

    function: str
    arguments: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.arguments

    @cached_property
    def _hash(self) -> int:
        return hash((self.function, self.arguments))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Reduce(Expr):
    """``sum``, ``any`` or ``max`` of ``body`` over all values of ``variable``."""

    kind: str
    variable: Var
    body: Expr

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.body,)

    @cached_property
    def variables(self) -> frozenset[Var]:
        return self.body.variables - {self.variable}

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.variable, self.body))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True)
class Softmax(Expr):
    """The softmax of tensor ``node`` along ``dim``, at ``index``; looked into by the rules that want to."""

    node: Any
    dim: int
    index: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index

    @cached_property
    def _hash(self) -> int:
        return hash((id(self.node), self.dim, self.index))

    def __hash__(self) -> int:
        return self._hash


TRUE: Expr = Const(True)
FALSE: Expr = Const(False)
ZERO: Expr = Const(0)
ONE: Expr = Const(1)
_fresh = itertools.count()


def fresh(name: str, size: Sized) -> Var:
    """A variable that no other expression mentions."""
    return Var(f"{name}#{next(_fresh)}", size)


def is_integral(e: Expr) -> bool:
    """Whether the value is an exact integer, so that linear arithmetic applies."""
    match e:
        case Const(value):
            return isinstance(value, int)
        case Var() | Size() | Linear():
            return True
        case Load():
            return e.integral
        case Apply(function, arguments):
            if function in ("floordiv", "mod", "indicator"):
                return True
            if function == "abs":
                return is_integral(arguments[0])
            return function == "where" and all(is_integral(a) for a in arguments[1:])
        case Reduce(kind, _, body):
            return kind == "sum" and is_integral(body)
    return False


def is_boolean(e: Expr) -> bool:
    """Whether the value is True or False."""
    match e:
        case Const(value):
            return isinstance(value, bool)
        case Apply(function, arguments):
            if function == "where":
                return is_boolean(arguments[1]) and is_boolean(arguments[2])
            return function in ("le0", "eq0", "and", "or", "not", "less", "equal", "truth")
        case Reduce(kind, _, _):
            return kind == "any"
    return False


# ── integers ──────────────────────────────────────────────────────────────────────────────────────────────────


def _order(e: Expr) -> tuple[str, str]:
    return type(e).__name__, e.name if isinstance(e, Var) else str(e._hash if hasattr(e, "_hash") else e)


def linear(terms: dict[Expr, int], constant: int) -> Expr:
    """The combination in its one canonical form."""
    kept = {atom: c for atom, c in terms.items() if c}
    if not kept:
        return Const(constant)
    if len(kept) == 1 and constant == 0:
        ((atom, c),) = kept.items()
        if c == 1:
            return atom
    return Linear(tuple(sorted(kept.items(), key=lambda item: _order(item[0]))), constant)


def parts(e: Expr) -> tuple[dict[Expr, int], int]:
    """The terms and the constant of an integer expression."""
    match e:
        case Const(value):
            return {}, int(value)
        case Linear(terms, constant):
            return dict(terms), constant
    return {e: 1}, 0


def size(value: Sized) -> Expr:
    """A size as an expression; sums and integer multiples of symbolic sizes become linear."""
    if isinstance(value, int):
        return Const(value)
    if value.is_Integer:
        return Const(int(value))
    terms: dict[Expr, int] = {}
    constant = 0
    for factor, c in sympy.expand(value).as_coefficients_dict().items():
        if factor == 1:
            constant += int(c)
        elif c.is_Integer and not _is_signed(factor):
            terms[Size(factor)] = terms.get(Size(factor), 0) + int(c)
        else:
            return Size(value)
    return linear(terms, constant)


def _is_signed(value: sympy.Expr) -> bool:
    """Whether a part of a size may itself be negative: ``(-s) // 5`` in ``-((-s) // 5)``, the ceiling of s / 5."""
    return any(part.is_number and part.is_negative for part in sympy.preorder_traversal(value))


def add(a: Expr, b: Expr) -> Expr:
    """a + b. Integers combine linearly and go into the branches of a `where`."""
    if is_boolean(a):
        a = indicator(a)
    if is_boolean(b):
        b = indicator(b)
    a, b = _whole(a, b), _whole(b, a)
    if is_integral(a) and is_integral(b):
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Apply) and x.function == "where":
                c, yes, no = x.arguments
                return where(c, add(yes, y), add(no, y))
        terms, constant = parts(a)
        more, extra = parts(b)
        for atom, factor in more.items():
            terms[atom] = terms.get(atom, 0) + factor
        return linear(terms, constant + extra)
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(a.value + b.value)
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Const) and x.value == 0:
            return y
        if isinstance(x, Const) and is_choice(y):
            return choose(y, lambda branch, x=x: add(x, branch))  # type: ignore[misc]
    return Apply("add", (*_flat("add", a), *_flat("add", b)))


def _whole(a: Expr, b: Expr) -> Expr:
    """A float that is a small integer, beside an integer, as that integer: their sum is exact either way."""
    if isinstance(a, Const) and isinstance(a.value, float) and a.value.is_integer() and abs(a.value) < 2**24:
        return Const(int(a.value)) if is_integral(b) and not isinstance(b, Const) else a
    return a


def _flat(function: str, e: Expr) -> tuple[Expr, ...]:
    return e.arguments if isinstance(e, Apply) and e.function == function else (e,)


def mul(a: Expr, b: Expr) -> Expr:
    """a * b. A constant is kept first; integers by a constant stay linear; of conditions it is whether both hold."""
    if is_boolean(a) and is_boolean(b):
        return and_(a, b)
    if is_boolean(a):
        a = indicator(a)
    if is_boolean(b):
        b = indicator(b)
    if isinstance(b, Const):
        a, b = b, a
    if isinstance(a, Const):
        if isinstance(b, Const):
            return Const(a.value * b.value)
        if a.value == 1:
            return b
        if isinstance(a.value, int) and is_integral(b):
            if isinstance(b, Apply) and b.function == "where":
                c, yes, no = b.arguments
                return where(c, mul(a, yes), mul(a, no))
            terms, constant = parts(b)
            return linear({atom: c * a.value for atom, c in terms.items()}, constant * a.value)
        if is_choice(b):
            return choose(b, lambda branch: mul(a, branch))
        if isinstance(b, Apply) and b.function == "mul" and isinstance(b.arguments[0], Const):
            return mul(Const(a.value * b.arguments[0].value), product(b.arguments[1:]))
        return Apply("mul", (a, *_flat("mul", b)))
    if is_choice(a) and is_choice(b):
        return choose(a, lambda branch: mul(branch, b))
    for numbers, other in ((a, b), (b, a)):
        if is_choice(numbers) and isinstance(other, Apply) and other.function == "indicator" and not _is_gate(numbers):
            return _gated(numbers, other.arguments[0])
    left, right = _flat("mul", a), _flat("mul", b)
    constants = [f for f in (*left, *right) if isinstance(f, Const)]
    rest = tuple(f for f in (*left, *right) if not isinstance(f, Const))
    joined = Apply("mul", rest)
    return mul(Const(math.prod(c.value for c in constants)), joined) if constants else joined


def is_choice(e: Expr) -> bool:
    """Whether the value is one of some numbers, by conditions: then arithmetic with a number is of each."""
    match e:
        case Apply("where", (_, yes, no)):
            return all(isinstance(x, Const) or is_choice(x) for x in (yes, no))
    return False


def _is_gate(choice: Expr) -> bool:
    """Whether the numbers of a choice are 0 and 1: multiplied by one another, they stay factors."""
    return all(not isinstance(part, Const) or part.value in (0, 1) for part in choice.children[1:]) and not any(
        is_choice(part) for part in choice.children[1:]
    )


def _gated(numbers: Expr, gate: Expr) -> Expr:
    """Each number of a choice, times 1 or 0: what is infinite becomes no number by a 0."""
    return choose(numbers, lambda number: where(gate, number, mul(number, Const(0))))


def choose(e: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """``function`` of each number of a choice."""
    if not is_choice(e):
        return function(e)
    assert isinstance(e, Apply)
    c, yes, no = e.arguments
    return where(c, choose(yes, function), choose(no, function))


def product(factors: tuple[Expr, ...]) -> Expr:
    """The product of at least one factor."""
    result = factors[0]
    for factor in factors[1:]:
        result = mul(result, factor)
    return result


def scaled(e: Expr) -> tuple[float, Expr]:
    """``e`` as a constant factor and the rest."""
    match e:
        case Apply("mul", (Const(value), *rest)):
            return float(value), product(tuple(rest))
    return 1.0, e


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two integers."""
    return where(le0(add(sub(a, b), ONE)), b, a)


def neg(a: Expr) -> Expr:
    """-a"""
    return mul(Const(-1), a)


def sub(a: Expr, b: Expr) -> Expr:
    """a - b"""
    return add(a, neg(b))


def lower(e: Expr) -> Expr | None:
    """An expression in sizes alone that an integer expression is never below; None if there is none."""
    return _bound(e, -1)


def upper(e: Expr) -> Expr | None:
    """An expression in sizes alone that an integer expression is never above; None if there is none."""
    return _bound(e, +1)


def _bound(e: Expr, side: int) -> Expr | None:
    terms, constant = parts(e)
    total: Expr = Const(constant)
    for atom, c in terms.items():
        limit = _atom_bound(atom, side if c > 0 else -side)
        if limit is None:
            return None
        total = add(total, mul(Const(c), limit))
    return total


def _atom_bound(atom: Expr, side: int) -> Expr | None:
    match atom:
        case Var(_, extent):
            return ZERO if side < 0 else sub(size(extent), ONE)
        case Size():
            return atom
        case Apply("indicator", _):
            return ZERO if side < 0 else ONE
        case Apply("mod", (_, divisor)) if never_negative(divisor):
            return ZERO if side < 0 else sub(divisor, ONE)
        case Apply("floordiv", (value, Const(divisor))) if isinstance(divisor, int) and divisor > 0:
            limit = _bound(value, side)
            return None if limit is None else floordiv(limit, Const(divisor))
        case Apply("where", (_, yes, no)):
            a, b = _bound(yes, side), _bound(no, side)
            if a is None or b is None:
                return None
            if never_negative(mul(Const(side), sub(a, b))):
                return a
            return b if never_negative(mul(Const(side), sub(b, a))) else None
    return None


def never_negative(e: Expr) -> bool:
    """Whether an expression in sizes alone is proven to be at least 0."""
    terms, constant = parts(e)
    total = constant
    for atom, c in terms.items():
        if not isinstance(atom, Size):
            return False
        lowest = _size_lower(atom.value)
        if lowest is None and c > 0:
            return False
        if c < 0:
            highest = _size_upper(atom.value)
            if highest is None:
                return False
            total += c * highest
        else:
            total += c * (lowest or 0)
    return total >= 0


SizeRange = Callable[[sympy.Expr], tuple[int, int | None]]
_size_range: SizeRange | None = None


def _size_lower(value: sympy.Expr) -> int | None:
    low = max(0, _size_range(value)[0]) if _size_range else 0
    return None if low == 0 and _is_signed(value) else low


def _size_upper(value: sympy.Expr) -> int | None:
    return _size_range(value)[1] if _size_range else None


class sizes_within:
    """Context: the ranges that capture proved for symbolic sizes."""

    def __init__(self, ranges: SizeRange) -> None:
        self.ranges = ranges

    def __enter__(self) -> None:
        global _size_range
        self.outer, _size_range = _size_range, self.ranges

    def __exit__(self, *_: object) -> None:
        global _size_range
        _size_range = self.outer


def floordiv(a: Expr, b: Expr) -> Expr:
    """floor(a / b) for integers: multiples of b leave, remainders within [0, b) vanish."""
    if b == ONE:
        return a
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(int(a.value // b.value))
    if not is_integral(a):
        return Apply("floordiv", (a, b))
    whole, rest = _split(a, b)
    if _within(rest, b):
        return whole
    return add(whole, Apply("floordiv", (rest, b)))


def mod(a: Expr, b: Expr) -> Expr:
    """a - b * floor(a / b) for integers."""
    if b == ONE:
        return ZERO
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(int(a.value % b.value))
    if not is_integral(a):
        return Apply("mod", (a, b))
    _, rest = _split(a, b)
    return rest if _within(rest, b) else Apply("mod", (rest, b))


def _split(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """a = b * whole + rest, moving every term that b divides into whole."""
    terms, constant = parts(a)
    whole: Expr = ZERO
    rest: Expr = ZERO
    if isinstance(b, Const):
        d = int(b.value)
        for atom, c in terms.items():
            whole = add(whole, mul(Const(c // d), atom)) if c % d == 0 else whole
            rest = rest if c % d == 0 else add(rest, mul(Const(c), atom))
        q, r = divmod(constant, d)
        return add(whole, Const(q)), add(rest, Const(r))
    for atom, c in terms.items():
        if isinstance(atom, Apply) and atom.function == "times" and b in atom.arguments:
            other = atom.arguments[1] if atom.arguments[0] == b else atom.arguments[0]
            whole = add(whole, mul(Const(c), other))
        else:
            rest = add(rest, mul(Const(c), atom))
    return whole, add(rest, Const(constant))


def times(a: Expr, b: Expr) -> Expr:
    """Integer product where neither need be constant, as in the strides of a reshape by a symbolic size."""
    if isinstance(a, Const) or isinstance(b, Const):
        return mul(a, b)
    return Apply("times", (a, b))


def _within(e: Expr, limit: Expr) -> bool:
    low, high = lower(e), upper(e)
    if low is None or high is None or not never_negative(low):
        return False
    return never_negative(sub(sub(limit, ONE), high))


# ── mixed radix ───────────────────────────────────────────────────────────────────────────────────────────────


def digits(index: Expr, extent: Sized) -> tuple[Var, ...] | None:
    """The variables whose mixed-radix number an index is, most significant first, if it runs through the extent.

    None if it is no such number; no variables for an extent of 1.
    """
    if extent == 1:
        return ()
    terms, constant = parts(index) if is_integral(index) else ({}, 1)
    rising = sorted(terms.items(), key=lambda item: item[1])
    weight: Sized = 1
    for atom, c in rising:
        if not isinstance(atom, Var) or c != weight:
            return None
        weight = weight * atom.size
    same = constant == 0 and bool(rising) and sympy.expand(weight - extent) == 0
    return tuple(atom for atom, _ in reversed(rising) if isinstance(atom, Var)) if same else None


def number(variables: tuple[Var, ...]) -> Expr:
    """The mixed-radix number of variables, most significant first."""
    result: Expr = ZERO
    for variable in variables:
        result = add(times(result, size(variable.size)), variable)
    return result


def cuts(e: Expr) -> Iterator[tuple[Var, int]]:
    """Places where an expression cuts a variable in two: ``v // radix`` and ``v % radix``."""
    for part in e.walk():
        match part:
            case Apply("floordiv" | "mod", (Var() as variable, Const(radix))) if isinstance(radix, int) and radix > 1:
                yield variable, radix


# ── booleans ──────────────────────────────────────────────────────────────────────────────────────────────────


def le0(e: Expr) -> Expr:
    """e <= 0 for an integer e; decided where the bounds allow."""
    if isinstance(e, Const):
        return Const(bool(e.value <= 0))
    if isinstance(e, Apply) and e.function == "where":
        c, yes, no = e.arguments
        return where(c, le0(yes), le0(no))
    for atom, factor in parts(e)[0].items():  # c * |x| + r <= 0: for both signs of x, or for one where c < 0
        match atom:
            case Apply("abs", (x,)):
                times_x, rest = mul(Const(factor), x), sub(e, mul(Const(factor), atom))
                return (and_ if factor > 0 else or_)(le0(add(rest, times_x)), le0(sub(rest, times_x)))
    high = upper(e)
    if high is not None and never_negative(neg(high)):
        return TRUE
    low = lower(e)
    if low is not None and never_negative(sub(low, ONE)):
        return FALSE
    return Apply("le0", (_reduced(_clear_floors(e)),))


def _clear_floors(e: Expr) -> Expr:
    """a - floor(b / d) <= 0  ⇔  d * a - b <= 0, and floor(b / d) - a <= 0  ⇔  b - d * a - (d - 1) <= 0."""
    terms, constant = parts(e)
    for atom, c in terms.items():
        match atom:
            case Apply("floordiv", (value, Const(d))) if abs(c) == 1 and isinstance(d, int) and d > 0:
                rest = linear({k: v for k, v in terms.items() if k is not atom}, constant)
                if c == -1:
                    return _clear_floors(sub(mul(Const(d), rest), value))
                return _clear_floors(add(sub(value, Const(d - 1)), mul(Const(d), rest)))
    return e


def _reduced(e: Expr) -> Expr:
    """Divides an inequality by the greatest common divisor of its coefficients, rounding the constant up."""
    terms, constant = parts(e)
    divisor = math.gcd(*terms.values()) if terms else 1
    if divisor <= 1:
        return e
    return linear({atom: c // divisor for atom, c in terms.items()}, -((-constant) // divisor))


def eq0(e: Expr) -> Expr:
    """e == 0 for an integer e."""
    if isinstance(e, Const):
        return Const(bool(e.value == 0))
    if isinstance(e, Apply) and e.function == "where":
        c, yes, no = e.arguments
        return where(c, eq0(yes), eq0(no))
    if isinstance(e, Apply) and e.function == "indicator":
        return not_(e.arguments[0])
    if isinstance(e, Reduce) and e.kind == "sum":  # of numbers that are not negative: 0 if each of them is
        least = lower(e.body)
        if least is not None and never_negative(least):
            return not_(exists(e.variable, truth(e.body)))
    match e:  # 1 - [p] == 0, and [p] - 1 == 0
        case Linear(((Apply("indicator", (p,)), factor),), constant) if constant == -factor:
            return p
    low, high = lower(e), upper(e)
    if (low is not None and never_negative(sub(low, ONE))) or (
        high is not None and never_negative(sub(neg(high), ONE))
    ):
        return FALSE
    terms, _ = parts(e)
    first = min(terms.items(), key=lambda item: _order(item[0]))
    return Apply("eq0", (neg(e) if first[1] < 0 else e,))


def indicator(e: Expr) -> Expr:
    """A boolean as the number 0 or 1."""
    if isinstance(e, Const):
        return Const(int(e.value))
    if isinstance(e, Apply) and e.function == "where":
        c, yes, no = e.arguments
        return where(c, indicator(yes), indicator(no))
    return Apply("indicator", (e,))


def truth(e: Expr) -> Expr:
    """e != 0, for a number of any kind."""
    if is_boolean(e):
        return e
    if isinstance(e, Const):
        return Const(bool(e.value))
    if isinstance(e, Apply) and e.function == "where":
        c, yes, no = e.arguments
        return where(c, truth(yes), truth(no))
    if is_integral(e):
        return not_(eq0(e))
    return Apply("truth", (e,))


def not_(e: Expr) -> Expr:
    """Logical negation, pushed inward."""
    match e:
        case Const(value):
            return Const(not value)
        case Apply("not", (inner,)):
            return inner
        case Apply("le0", (inner,)):
            return le0(sub(ONE, inner))
        case Apply("and", arguments):
            return _joined("or", tuple(not_(a) for a in arguments))
        case Apply("or", arguments):
            return _joined("and", tuple(not_(a) for a in arguments))
        case Apply("where", (c, yes, no)):
            return where(c, not_(yes), not_(no))
    return Apply("not", (e,))


def and_(a: Expr, b: Expr) -> Expr:
    """Logical and."""
    return _joined("and", (truth(a), truth(b)))


def or_(a: Expr, b: Expr) -> Expr:
    """Logical or."""
    return _joined("or", (truth(a), truth(b)))


def _joined(function: str, arguments: tuple[Expr, ...]) -> Expr:
    neutral, absorbing = (TRUE, FALSE) if function == "and" else (FALSE, TRUE)
    kept: list[Expr] = []
    for argument in arguments:
        for a in _flat(function, argument):
            if a == absorbing or not_(a) in kept:
                return absorbing
            if a != neutral and a not in kept:
                kept.append(a)
    if function == "and" and any(isinstance(a, Apply) and a.function == "where" for a in kept):
        known = [assuming(a, [b for b in kept if b is not a]) for a in kept]
        if known != kept:
            return _joined(function, tuple(known))
    if not kept:
        return neutral
    if (joined := _with_equality(function, kept)) is not None:
        return joined
    kept = [a for a in kept if not _absorbed(a, "or" if function == "and" else "and", kept)]
    return kept[0] if len(kept) == 1 else Apply(function, tuple(sorted(kept, key=_order)))


def _with_equality(function: str, kept: list[Expr]) -> Expr | None:
    """x < 0 or x == 0 is x <= 0; x <= 0 and x != 0 is x < 0."""
    for a in kept:
        match a if function == "or" else not_(a):
            case Apply("eq0", (e,)):
                for x in (e, neg(e)):
                    bounds = le0(add(x, ONE)), le0(x)
                    old, new = bounds if function == "or" else reversed(bounds)
                    if old in kept:
                        return _joined(function, (*(b for b in kept if b not in (a, old)), new))
    return None


def assuming(e: Expr, facts: Sequence[Expr]) -> Expr:
    """The branch of a `where` whose condition is decided by facts; ``e`` where none is."""
    if not isinstance(e, Apply) or e.function != "where":
        return e
    c, yes, no = e.arguments
    if all(part in facts for part in conjuncts(c)):
        return assuming(yes, facts)
    return assuming(no, facts) if any(not_(part) in facts for part in conjuncts(c)) else e


def _absorbed(e: Expr, dual: str, others: list[Expr]) -> bool:
    """a and (a or b) is a; a or (a and b) is a."""
    return isinstance(e, Apply) and e.function == dual and any(a in others for a in e.arguments)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """The conditions whose conjunction ``e`` is; none for True."""
    return () if e == TRUE else _flat("and", e)


def where(c: Expr, yes: Expr, no: Expr) -> Expr:
    """``yes`` if ``c`` else ``no``."""
    c = truth(c)
    if isinstance(c, Const):
        return yes if c.value else no
    yes, no = _known(c, yes), _known(not_(c), no)
    if yes == no:
        return yes
    if is_boolean(yes) and is_boolean(no):
        if isinstance(yes, Const):
            return or_(c, no) if yes.value else and_(not_(c), no)
        if isinstance(no, Const):
            return or_(not_(c), yes) if no.value else and_(c, yes)
        return Apply("where", (c, yes, no))
    if isinstance(c, Apply) and c.function == "not":
        return Apply("where", (c.arguments[0], no, yes))
    return Apply("where", (c, yes, no))


def _known(condition: Expr, e: Expr) -> Expr:
    """``e`` where ``condition`` holds: an index that must be 0 is 0, and the condition itself is True."""
    match condition:
        case Apply("le0", (Var() as variable,)):
            return substitute(e, {variable: ZERO})
    if isinstance(e, Apply) and e.function == "where":
        c, yes, no = e.arguments
        if c == condition:
            return yes
        if not_(c) == condition:
            return no
    return e


# ── structure ─────────────────────────────────────────────────────────────────────────────────────────────────


def apply(function: str, *arguments: Expr) -> Expr:
    """A pointwise function without identities of its own."""
    return Apply(function, arguments)


def total(variable: Var, body: Expr) -> Expr:
    """The sum of ``body`` over ``variable``; a constant factor is taken out of it."""
    if body == ZERO:
        return ZERO
    match body:
        case Apply("mul", (Const() as factor, *rest)):
            return mul(factor, Reduce("sum", variable, product(tuple(rest))))
    return Reduce("sum", variable, body)


def exists(variable: Var, body: Expr) -> Expr:
    """Whether ``body`` holds for some value of ``variable``."""
    if body == FALSE:
        return FALSE
    if variable not in body.variables and never_negative(sub(size(variable.size), ONE)):
        return body
    return Reduce("any", variable, body)


def largest(variable: Var, body: Expr) -> Expr:
    """The largest value of ``body`` over ``variable``."""
    return Reduce("max", variable, body)


_REDUCE: dict[str, Callable[[Var, Expr], Expr]] = {"sum": total, "any": exists, "max": largest}

_REBUILD: dict[str, Callable[..., Expr]] = {
    "floordiv": floordiv,
    "mod": mod,
    "times": times,
    "le0": le0,
    "eq0": eq0,
    "indicator": indicator,
    "truth": truth,
    "not": not_,
    "where": where,
}


def substitute(e: Expr, values: dict[Var, Expr]) -> Expr:
    """``e`` with index variables replaced, simplified again."""
    if not e.variables & values.keys():
        return e
    match e:
        case Var():
            return values[e]
        case Linear(terms, constant):
            result: Expr = Const(constant)
            for atom, c in terms:
                result = add(result, mul(Const(c), substitute(atom, values)))
            return result
        case Load(node, index, integral):
            return Load(node, tuple(substitute(i, values) for i in index), integral)
        case Softmax(node, dim, index):
            return Softmax(node, dim, tuple(substitute(i, values) for i in index))
        case Reduce(kind, variable, body):
            return _REDUCE[kind](variable, substitute(body, values))
        case Apply(function, arguments):
            new = tuple(substitute(a, values) for a in arguments)
            if function in ("and", "or"):
                return _joined(function, new)
            if function in ("add", "mul"):
                # a constant is multiplied in last, as it was: ``-1 * (a * b)`` of integers is not ``(-1 * a) * b``
                first = new[1:] + new[:1] if function == "mul" and isinstance(new[0], Const) else new
                result = first[0]
                for argument in first[1:]:
                    result = (add if function == "add" else mul)(result, argument)
                return result
            return _REBUILD[function](*new) if function in _REBUILD else Apply(function, new)
    return e
