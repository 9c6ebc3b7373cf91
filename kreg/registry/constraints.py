"""Constraints of a kernel, written as expressions over named dimensions and attributes.

``head_dim % 16 == 0 and head_dim <= 512`` is parsed into a small tree; nothing is ever evaluated as Python.
On concrete values a constraint holds or not. On sizes that are still symbolic it is decided by interval and
divisibility arithmetic: yes, no, or unknown, which means that it has to be checked at call time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, reduce
from typing import Any, TypeAlias

from kreg.registry import intervals
from kreg.registry.expressions import (
    All,
    AnyOf,
    Arithmetic,
    Compare,
    Extremum,
    Literal,
    Name,
    Node,
    Not,
    computed,
    names_of,
    parse,
)
from kreg.registry.intervals import (
    ANYTHING,
    FAILS,
    HOLDS,
    NO,
    OPEN,
    UNDEFINED,
    YES,
    Outcomes,
    Range,
    SymbolicSize,
)

__all__ = ["Constraint", "SymbolicSize", "Value", "Verdict"]

Value: TypeAlias = int | float | bool | str | SymbolicSize | None
"""What a name stands for: a number, a flag, a word, nothing, or a size not known yet."""


class Verdict(Enum):
    """Whether a constraint holds: for every possible size, for none, or to be checked at call time."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Clause:
    """One part of a constraint's outermost ``and``, with the user's own text."""

    text: str
    tree: Node
    names: tuple[str, ...]
    test: Callable[[Mapping[str, Any]], Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Constraint:
    """A parsed constraint.

    Attributes:
        text: as the user wrote it.
        clauses: the parts of its outermost ``and``.
    """

    text: str
    clauses: tuple[Clause, ...]

    @staticmethod
    def parse(text: str, names: Collection[str]) -> Constraint:
        """Parse an expression over these names.

        Raises:
            SpecError: it is not an expression, uses a name that is not known, or a part of Python that
                constraints do not have; the message points at the part.
        """
        return _constraint(text, tuple(sorted(names)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names it reads, in the order of first use."""
        return tuple(dict.fromkeys(name for clause in self.clauses for name in clause.names))

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it holds for concrete values; what has no value (an absent dimension, x % 0) does not."""
        try:
            return all(clause.test(values) for clause in self.clauses)
        except (TypeError, ValueError, ArithmeticError):
            return False

    def decide(self, values: Mapping[str, Value]) -> Verdict:
        """Whether it holds for every size in range, for none, or neither can be told before the call."""
        if not any(isinstance(values.get(name), SymbolicSize) for name in self.names):
            return Verdict.YES if self.holds(values) else Verdict.NO
        return _verdict(_in_turn(tuple(clause.tree for clause in self.clauses), values, YES))

    def explain(self, values: Mapping[str, Value]) -> str:
        """A sentence: ``head_dim <= 256 does not hold: head_dim is 512``."""
        verdicts = [Constraint(c.text, (c,)).decide(values) for c in self.clauses]
        for wanted, phrase in ((Verdict.NO, "does not hold"), (Verdict.UNKNOWN, "is checked at call time")):
            if wanted in verdicts:
                clause = self.clauses[verdicts.index(wanted)]
                facts = " and ".join(_fact(name, values.get(name)) for name in clause.names)
                return f"{clause.text} {phrase}" + (f": {facts}" if facts else "")
        return f"{self.text} holds"

    def __str__(self) -> str:
        return self.text


@lru_cache(maxsize=1024)
def _constraint(text: str, names: tuple[str, ...]) -> Constraint:
    text, parts = parse(text, names)
    return Constraint(text, tuple(Clause(t, node, names_of(node), computed(node)) for t, node in parts))


def _fact(name: str, value: Value) -> str:
    return f"there is no {name} here" if value is None else f"{name} is {value}"


def _verdict(outcomes: Outcomes) -> Verdict:
    if outcomes == HOLDS:
        return Verdict.YES
    return Verdict.UNKNOWN if YES in outcomes else Verdict.NO


Opaque: TypeAlias = tuple[str | None]
"""A value that is not a number."""


def _in_turn(parts: tuple[Node, ...], values: Mapping[str, Value], going_on: str) -> Outcomes:
    """``and`` goes on while parts hold, ``or`` while they fail; either ends at a part that is undefined."""
    reached: set[str] = set()
    for part in parts:
        outcomes = _outcomes(part, values)
        reached |= outcomes - {going_on}
        if going_on not in outcomes:
            return frozenset(reached)
    return frozenset(reached | {going_on})


def _outcomes(node: Node, values: Mapping[str, Value]) -> Outcomes:
    """What a condition may turn out to be."""
    match node:
        case All(parts):
            return _in_turn(parts, values, YES)
        case AnyOf(parts):
            return _in_turn(parts, values, NO)
        case Not(operand):
            opposite = {YES: NO, NO: YES, UNDEFINED: UNDEFINED}
            return frozenset(opposite[o] for o in _outcomes(operand, values))
        case Compare(symbol, left, right):
            return _comparison(symbol, left, right, values)
    known = _known(node, values)
    if isinstance(known, tuple):
        return HOLDS if known[0] else FAILS
    return intervals.compare("!=", known, intervals.exactly(0))


def _comparison(symbol: str, left: Node, right: Node, values: Mapping[str, Value]) -> Outcomes:
    a, b = _known(left, values), _known(right, values)
    if isinstance(a, tuple) or isinstance(b, tuple):
        if a is None or b is None or symbol not in ("==", "!="):
            return ANYTHING
        return HOLDS if (a == b) == (symbol == "==") else FAILS
    if a is not None and _named(left, values) == _named(right, values):
        # The same expression of the same sizes: equal, whatever the value.
        return HOLDS if symbol in ("==", "<=", ">=") else FAILS
    return intervals.compare(symbol, a, b)


def _named(node: Node, values: Mapping[str, Value]) -> object:
    """A node with every name replaced by its value; a symbolic size is its expression."""
    match node:
        case Name(name):
            value = values.get(name)
            return ("size", value.expr) if isinstance(value, SymbolicSize) else Literal(value)
        case Arithmetic(symbol, left, right) | Compare(symbol, left, right):
            return (type(node), symbol, _named(left, values), _named(right, values))
        case Extremum(name, operands):
            return (name, *(_named(o, values) for o in operands))
        case Not(operand):
            return (Not, _named(operand, values))
        case All(parts) | AnyOf(parts):
            return (type(node), *(_named(p, values) for p in parts))
    return node


def _known(node: Node, values: Mapping[str, Value]) -> Range | Opaque | None:
    """What is known of a value: a range of numbers, a word or None in a tuple, or None for nothing at all."""
    match node:
        case Literal(value):
            return _known_value(value)
        case Name(name):
            return _known_value(values.get(name))
        case Arithmetic(symbol, left, right):
            return intervals.arithmetic(symbol, _number(left, values), _number(right, values))
        case Extremum(name, operands):
            ranges = [_number(o, values) for o in operands]
            return reduce(lambda a, b: intervals.extremum(name, a, b), ranges)
    outcomes = _outcomes(node, values)
    if UNDEFINED in outcomes:
        return None
    return intervals.integers(0, 1) if outcomes == OPEN else intervals.exactly(int(outcomes == HOLDS))


def _known_value(value: Value) -> Range | Opaque | None:
    if isinstance(value, SymbolicSize):
        return intervals.of_size(value)
    return (value,) if value is None or isinstance(value, str) else intervals.exactly(value)


def _number(node: Node, values: Mapping[str, Value]) -> Range | None:
    known = _known(node, values)
    return None if isinstance(known, tuple) else known
