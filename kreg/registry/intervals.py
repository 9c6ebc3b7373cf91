"""What is known of a number before it has a value: its bounds, and its remainder modulo a step.

A `Range` stands for every number it may turn out to be. The functions below take ranges and return a range
that holds every possible result; None is the range of which nothing is known, not even that it is defined (a
divisor may be 0). Bounds of floats are sound because IEEE rounding never reverses an order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, isfinite
from typing import TypeAlias

Number: TypeAlias = int | float

LARGEST_SIZE = 2**63 - 1
"""Tensor sizes are int64, so a size without a known bound has this one."""

LARGEST_POWER_BITS = 4096
"""Powers longer than this are treated as undefined, so that no expression can exhaust memory."""

YES, NO, UNDEFINED = "yes", "no", "undefined"
Outcomes: TypeAlias = frozenset[str]
"""What a condition may turn out to be, over all values of its names."""

HOLDS: Outcomes = frozenset({YES})
FAILS: Outcomes = frozenset({NO})
OPEN: Outcomes = frozenset({YES, NO})
ANYTHING: Outcomes = frozenset({YES, NO, UNDEFINED})


@dataclass(frozen=True)
class SymbolicSize:
    """A size that is not known while planning.

    Attributes:
        expr: its expression, such as ``"s0 // 4"``; two sizes with the same expression are equal.
        lower: least possible value.
        upper: greatest possible value, None where there is no bound.
        hint: the value of the example inputs, for cost estimates.
        multiple_of: a known divisor.
    """

    expr: str
    lower: int = 0
    upper: int | None = None
    hint: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or (self.upper is not None and self.upper < self.lower):
            raise ValueError(f"no size can satisfy {self!r}")

    def __str__(self) -> str:
        bounds = f"at least {self.lower}" if self.upper is None else f"from {self.lower} to {self.upper}"
        divisor = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.expr} ({bounds}{divisor})"


@dataclass(frozen=True)
class Range:
    """Numbers from ``lower`` to ``upper``.

    ``step`` None: real numbers. Otherwise integers that leave the remainder ``offset`` when divided by
    ``step``; step 0: exactly ``offset``.
    """

    lower: Number
    upper: Number
    step: int | None = None
    offset: int = 0

    @property
    def exact(self) -> bool:
        """Whether it is a single number."""
        return self.lower == self.upper


Known: TypeAlias = Range | None


def exactly(value: Number) -> Known:
    """The range of one number; None for infinities and NaN, whose arithmetic has no bounds."""
    if isinstance(value, int):
        return Range(int(value), int(value), 0, int(value))
    return Range(value, value) if isfinite(value) else None


def integers(lower: int, upper: int, step: int = 1, offset: int = 0) -> Range:
    """Integers between two bounds with ``value % step == offset % step``, bounds tightened to such values."""
    if step == 0:
        return Range(offset, offset, 0, offset)
    offset %= step
    first, last = lower + (offset - lower) % step, upper - (upper - offset) % step
    if first > last:  # contradictory knowledge: no value at all, so the wider range is as true
        return Range(lower, upper, 1, 0)
    return Range(first, first, 0, first) if first == last else Range(first, last, step, offset)


def of_size(size: SymbolicSize) -> Range:
    """The range of a symbolic size."""
    upper = LARGEST_SIZE if size.upper is None else size.upper
    return integers(size.lower, max(upper, size.lower), size.multiple_of, 0)


def power(base: Number, exponent: Number) -> Number:
    """``base ** exponent``, refused where the result would not fit in `LARGEST_POWER_BITS`.

    Raises:
        OverflowError: the result would be too long.
    """
    if isinstance(base, int) and abs(base).bit_length() * abs(exponent) > LARGEST_POWER_BITS:
        raise OverflowError(f"{base} ** {exponent} is too large")
    result: Number = base**exponent
    return result


OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": power,
}


def arithmetic(symbol: str, a: Known, b: Known) -> Known:
    """The range of ``a <symbol> b``."""
    if a is None or b is None:
        return None
    try:
        if a.exact and b.exact:
            return exactly(OPERATORS[symbol](_value(a), _value(b)))
        return _RANGES[symbol](a, b)
    except (ArithmeticError, ValueError):
        return None


def extremum(name: str, a: Known, b: Known) -> Known:
    """The range of ``min(a, b)`` or ``max(a, b)``."""
    if a is None or b is None:
        return None
    pick: Callable[[Number, Number], Number] = min if name == "min" else max
    lower, upper = pick(a.lower, b.lower), pick(a.upper, b.upper)
    if a.step is None or b.step is None:
        return Range(lower, upper)
    # One of the two values: it satisfies what both congruences have in common.
    return integers(int(lower), int(upper), gcd(a.step, b.step, a.offset - b.offset), a.offset)


def compare(symbol: str, a: Known, b: Known) -> Outcomes:
    """What ``a <symbol> b`` may turn out to be, a and b being independent."""
    if a is None or b is None:
        return ANYTHING
    if symbol in (">", ">="):
        return compare({">": "<", ">=": "<="}[symbol], b, a)
    if symbol == "!=":
        return frozenset({YES: NO, NO: YES}[o] for o in compare("==", a, b))
    if symbol == "<":
        return HOLDS if a.upper < b.lower else FAILS if a.lower >= b.upper else OPEN
    if symbol == "<=":
        return HOLDS if a.upper <= b.lower else FAILS if a.lower > b.upper else OPEN
    if a.upper < b.lower or b.upper < a.lower:
        return FAILS
    if a.exact and b.exact:
        return HOLDS
    if a.step is not None and b.step is not None and (a.offset - b.offset) % gcd(a.step, b.step):
        return FAILS
    return OPEN


def _value(a: Range) -> Number:
    return a.lower if a.step is None else a.offset


def _corners(symbol: str, a: Range, b: Range) -> list[Number]:
    apply = OPERATORS[symbol]
    return [apply(x, y) for x in (a.lower, a.upper) for y in (b.lower, b.upper)]


def _hull(values: list[Number], step: int | None = None, offset: int = 0) -> Known:
    if not all(isfinite(v) for v in values):
        return None
    if step is None:
        return Range(min(values), max(values))
    return integers(int(min(values)), int(max(values)), step, offset)


def _sum(symbol: str) -> Callable[[Range, Range], Known]:
    def of(a: Range, b: Range) -> Known:
        if a.step is None or b.step is None:
            return _hull(_corners(symbol, a, b))
        return _hull(_corners(symbol, a, b), gcd(a.step, b.step), int(OPERATORS[symbol](a.offset, b.offset)))

    return of


def _product(a: Range, b: Range) -> Known:
    if a.step is None or b.step is None:
        return _hull(_corners("*", a, b))
    # (r + m i)(s + n j) = r s + r n j + s m i + m n i j
    step = gcd(a.offset * b.step, b.offset * a.step, a.step * b.step)
    return _hull(_corners("*", a, b), step, a.offset * b.offset)


def _quotient(a: Range, b: Range) -> Known:
    return None if b.lower <= 0 <= b.upper else _hull(_corners("/", a, b))


def _floor(a: Range, b: Range) -> Known:
    if b.lower <= 0 <= b.upper or a.step is None or b.step is None:
        return None
    if b.exact and a.step % b.offset == 0:
        # (r + m i) // c = r // c + (m / c) i when c divides m
        return _hull(_corners("//", a, b), abs(a.step // b.offset), a.offset // b.offset)
    return _hull(_corners("//", a, b), 1)


def _remainder(a: Range, b: Range) -> Known:
    if b.lower <= 0 <= b.upper or a.step is None or b.step is None:
        return None
    if b.exact:
        c = b.offset
        if a.lower // c == a.upper // c:  # one period: a % c = a - c (a // c)
            return arithmetic("-", a, exactly(c * int(a.lower // c)))
        step = gcd(a.step, c)
        if step == abs(c):
            return exactly(a.offset % c)
        return integers(0, c - 1, step, a.offset) if c > 0 else integers(c + 1, 0, step, a.offset)
    if b.lower > 0:
        if a.lower >= 0 and a.upper < b.lower:
            return a
        return integers(0, int(min(b.upper - 1, a.upper) if a.lower >= 0 else b.upper - 1))
    return integers(int(b.lower) + 1, 0)


def _power(a: Range, b: Range) -> Known:
    if a.step is None or b.step != 0 or b.offset < 0:
        return None
    n = b.offset
    values = [power(a.lower, n), power(a.upper, n)]
    if n % 2 == 0 and a.lower < 0 < a.upper:
        values.append(0)
    if a.offset == 0:  # a multiple of m: its power is a multiple of m ** n
        return _hull(values, int(power(a.step, n)) if n else 0, 1 if n == 0 else 0)
    return _hull(values, a.step, int(power(a.offset, n)))


_RANGES: dict[str, Callable[[Range, Range], Known]] = {
    "+": _sum("+"),
    "-": _sum("-"),
    "*": _product,
    "/": _quotient,
    "//": _floor,
    "%": _remainder,
    "**": _power,
}
