"""The language of constraints: a small tree, how it is read, and how it is computed on concrete values.

Python's own parser reads the text; a whitelist then turns its tree into ours: nothing is executed as Python.
It means what Python means, but that ``and`` and ``or`` give True or False, and stop in ``in (...)`` as well.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from kreg.errors import SpecError
from kreg.registry.intervals import OPERATORS
from kreg.registry.wording import did_you_mean, listing

LONGEST = 1000
"""Characters of one constraint."""

LARGEST_EXPONENT = 64

ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
}

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}

ALLOWED = "numbers, names, + - * / // % **, comparisons, and, or, not, in (...), not in (...), min(...), max(...)"


@dataclass(frozen=True)
class Literal:
    """A number, a word, True, False or None."""

    value: int | float | bool | str | None


@dataclass(frozen=True)
class Name:
    """A dimension, an attribute, or ``has_<optional tensor>``; None where the site has no such dimension."""

    name: str


@dataclass(frozen=True)
class Arithmetic:
    """``left symbol right``."""

    symbol: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Extremum:
    """``min(...)`` or ``max(...)``."""

    name: str
    operands: tuple[Node, ...]


@dataclass(frozen=True)
class Compare:
    """``left symbol right``. A chain is an `All` of these, membership an `AnyOf` of equalities."""

    symbol: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Not:
    """The opposite of a condition."""

    operand: Node


@dataclass(frozen=True)
class All:
    """``and``: stops at the first part that does not hold."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class AnyOf:
    """``or``: stops at the first part that holds."""

    parts: tuple[Node, ...]


Node: TypeAlias = Literal | Name | Arithmetic | Extremum | Compare | Not | All | AnyOf


def parse(text: str, names: Collection[str]) -> tuple[str, tuple[tuple[str, Node], ...]]:
    """Read an expression: its text, and the parts of its outermost ``and`` with their own texts.

    Raises:
        SpecError: see `Constraint.parse`.
    """
    return _Reader(text, names).read()


class _Reader:
    """Turns Python's tree of one expression into ours, or says which part cannot be."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self.text = " ".join(text.split()) if "\n" in text else text.strip()
        self.known = names

    def read(self) -> tuple[str, tuple[tuple[str, Node], ...]]:
        if not self.text:
            raise self.refusal_at(0, 0, "it is empty")
        if len(self.text) > LONGEST:
            length = len(self.text)
            self.text = f"{self.text[:60]}…"
            raise self.refusal_at(60, 1, f"it has {length} characters, {LONGEST} are allowed")
        try:
            with warnings.catch_warnings():  # Python's advice is about its own language
                warnings.simplefilter("ignore")
                tree = ast.parse(self.text, mode="eval").body
            parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
            return self.text, tuple((self.source(part), self.condition(part)) for part in parts)
        except SyntaxError as error:
            column = (error.offset or len(self.text) + 1) - 1
            hint = ": write == to compare" if "=" in self.text[column : column + 1] else ""
            width = (error.end_offset or 0) - column - 1
            raise self.refusal_at(column, width, f"{error.msg}{hint}") from None
        except (RecursionError, MemoryError, ValueError) as error:
            if isinstance(error, SpecError):
                raise
            raise self.refusal_at(0, 0, f"Python cannot parse it: {error}") from None

    def condition(self, node: ast.expr) -> Node:
        """A part that holds or not."""
        read = self.node(node)
        plain = isinstance(read, Literal) and type(read.value) is not bool
        if plain or isinstance(read, Arithmetic | Extremum):
            what = self.source(node)
            raise self.refusal(node, f"{what} is a value, not a condition: compare it with something")
        return read

    def number(self, node: ast.expr) -> Node:
        """A part that arithmetic can use."""
        read = self.node(node)
        if isinstance(read, Literal) and (read.value is None or isinstance(read.value, str)):
            raise self.refusal(node, f"{self.source(node)} is not a number")
        return read

    def node(self, node: ast.expr) -> Node:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return Literal(value)
            case ast.Name(id=name):
                if name not in self.known:
                    raise self.refusal(node, f"{name!r} is not a known name{did_you_mean(name, self.known)}")
                return Name(name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Not(self.condition(operand))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return Literal(-value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Arithmetic("-", Literal(0), self.number(operand))
            case ast.BoolOp(op=ast.And(), values=values):
                return All(tuple(self.condition(v) for v in values))
            case ast.BoolOp(op=ast.Or(), values=values):
                return AnyOf(tuple(self.condition(v) for v in values))
            case ast.BinOp(op=ast.Pow(), right=exponent) if not (
                isinstance(exponent, ast.Constant)
                and type(exponent.value) is int
                and 0 <= exponent.value <= LARGEST_EXPONENT
            ):
                raise self.refusal(exponent, f"an exponent is a literal integer from 0 to {LARGEST_EXPONENT}")
            case ast.BinOp(left=left, op=symbol, right=right) if type(symbol) in ARITHMETIC:
                return Arithmetic(ARITHMETIC[type(symbol)], self.number(left), self.number(right))
            case ast.Call(func=ast.Name(id="min" | "max" as name), args=args, keywords=[]) if len(args) > 1:
                return Extremum(name, tuple(self.number(a) for a in args))
            case ast.Compare():
                return self.comparison(node)
            case _:
                what = self.source(node)
                raise self.refusal(node, f"{what} is not part of this language, which has {ALLOWED}")

    def comparison(self, node: ast.Compare) -> Node:
        """A chain ``a < b <= c`` becomes ``a < b and b <= c``; membership becomes equalities."""
        lefts = [node.left, *node.comparators]
        links = [self.link(a, o, b) for a, o, b in zip(lefts, node.ops, node.comparators, strict=False)]
        return links[0] if len(links) == 1 else All(tuple(links))

    def link(self, left: ast.expr, symbol: ast.cmpop, right: ast.expr) -> Node:
        if isinstance(symbol, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
                raise self.refusal(right, "membership needs a tuple in brackets, as in ratio in (4, 128)")
            member = AnyOf(tuple(Compare("==", self.node(left), self.node(e)) for e in right.elts))
            return Not(member) if isinstance(symbol, ast.NotIn) else member
        if type(symbol) not in COMPARISONS:
            raise self.refusal(left, "'is' is not part of this language: use == or !=")
        operand = self.node if isinstance(symbol, ast.Eq | ast.NotEq) else self.number
        return Compare(COMPARISONS[type(symbol)], operand(left), operand(right))

    def source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text, node) or self.text

    def refusal(self, node: ast.expr, problem: str) -> SpecError:
        line = self.text.encode()  # Python counts columns in bytes
        start = len(line[: node.col_offset].decode())
        return self.refusal_at(start, len(line[node.col_offset : node.end_col_offset].decode()), problem)

    def refusal_at(self, column: int, width: int, problem: str) -> SpecError:
        marks = "^" * max(width, 1)
        return SpecError(
            f"constraint {self.text!r}, column {column + 1}: {problem}\n"
            f"    {self.text}\n    {' ' * column}{marks}\n"
            f"known names: {listing(self.known)}"
        )


def names_of(node: Node) -> tuple[str, ...]:
    """The names a tree reads, in the order of first use."""
    match node:
        case Name(name):
            return (name,)
        case Arithmetic(left=left, right=right) | Compare(left=left, right=right):
            children: tuple[Node, ...] = (left, right)
        case Extremum(operands=children) | All(parts=children) | AnyOf(parts=children):
            pass
        case Not(operand):
            children = (operand,)
        case _:
            children = ()
    return tuple(dict.fromkeys(name for child in children for name in names_of(child)))


Computation: TypeAlias = Callable[[Mapping[str, Any]], Any]

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def computed(node: Node) -> Computation:
    """A function from concrete values to the value of a tree.

    The function raises TypeError, ValueError or ArithmeticError where a tree has no value.
    """
    match node:
        case Literal(value):
            return lambda values: value
        case Name(name):
            return lambda values: values.get(name)
        case Arithmetic(symbol, left, right):
            return _binary(OPERATORS[symbol], _numeric(left), _numeric(right))
        case Extremum(name, operands):
            pick = min if name == "min" else max
            numbers = [_numeric(o) for o in operands]
            return lambda values: pick(n(values) for n in numbers)
        case Compare(symbol, left, right):
            side = computed if symbol in ("==", "!=") else _numeric
            return _binary(_COMPARE[symbol], side(left), side(right))
        case Not(operand):
            inner = computed(operand)
            return lambda values: not inner(values)
        case All(parts):
            tests = [computed(p) for p in parts]
            return lambda values: all(t(values) for t in tests)
        case AnyOf(parts):
            tests = [computed(p) for p in parts]
            return lambda values: any(t(values) for t in tests)


def _binary(apply: Callable[[Any, Any], Any], left: Computation, right: Computation) -> Computation:
    return lambda values: apply(left(values), right(values))


def _numeric(node: Node) -> Computation:
    """As `computed`, refusing words: in Python ``"a" % x`` and ``"a" < "b"`` would have a value."""
    compute = computed(node)
    if not isinstance(node, Name):
        return compute

    def number(values: Mapping[str, Any]) -> Any:
        value = compute(values)
        if value is None or isinstance(value, str):
            raise TypeError(f"{value!r} is not a number")
        return value

    return number
