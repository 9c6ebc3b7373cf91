"""Numbers for a graph's symbolic sizes, at which a site is verified."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._sympy.solve import try_solve

SMALL = 320
"""Symbolic sizes are verified at their example value, or at this where that is larger and the graph allows it."""

TRIES = 2000
"""Numbers that are tried for sizes that depend on data, until all of them fit what the graph asserts."""

Numbers = dict[sympy.Symbol, sympy.Integer]


class Sizes:
    """Numbers for a graph's symbolic sizes: the example's, made small where the graph's guards still hold.

    A size that depends on data has no example: it is one in its range, large enough that a top-k drops something, and
    such that what the graph asserts of it holds (height times width is the number of keys).
    """

    def __init__(self, graph: Graph, nodes: Iterable[Node]) -> None:
        self.values: Numbers = {}
        symints = [s for node in nodes for s in _symints(node.meta.get("val"))]
        if not symints:
            return
        environment = symints[0].node.shape_env
        needed: set[sympy.Symbol] = set().union(*(s.node.expr.free_symbols for s in symints))
        constraints = [guard.expr for guard in environment.guards] + _asserted(graph, environment)
        known, ranges = environment.backed_var_to_val, environment.var_to_range
        related = _related(needed, constraints)
        constraints = [c for c in constraints if c.free_symbols & related]
        symbols = sorted(related & ranges.keys(), key=str)
        example = {s: sympy.Integer(int(known[s])) for s in symbols if s in known}
        small = {s: min(number, max(_lowest(ranges[s]), SMALL)) for s, number in example.items()}
        free = {s: _candidates(ranges[s], constraints) for s in symbols if s not in known}
        found = (_fitting(sizes, free, constraints) for sizes in (small, example))
        first = {s: candidates[0] for s, candidates in free.items()}
        self.values = next((numbers for numbers in found if numbers is not None), example | first)

    def number(self, size: Any) -> Any:
        """A size, or a value made of sizes, as a number."""
        if isinstance(size, torch.SymInt):
            return int(size.node.expr.xreplace(self.values))
        if isinstance(size, (torch.SymFloat, torch.SymBool)):
            return size.node.expr.xreplace(self.values)
        return size

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's tensor."""
        return tuple(self.number(s) for s in node.meta["val"].shape)

    def count(self, node: Node) -> int:
        """Elements of a node's tensor; 0 for anything else."""
        value = node.meta.get("val")
        return math.prod(self.shape(node)) if isinstance(value, torch.Tensor) else 0


def _symints(value: Any) -> list[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        return [value] if not value.node.expr.is_Integer else []
    if isinstance(value, torch.Tensor):
        sizes: list[Any] = list(value.shape)
        return [s for s in sizes if isinstance(s, torch.SymInt)]
    return []


def _asserted(graph: Graph, environment: Any) -> list[sympy.Basic]:
    """What has to hold of sizes when the graph runs: its own assertions, and those that wait to be put into it."""
    targets = (torch.ops.aten._assert_scalar.default, torch._check)
    conditions = [node.args[0] for node in graph.nodes if node.target in targets]
    values = [c.meta.get("val") if isinstance(c, Node) else c for c in conditions]
    waiting = [late.expr for several in environment.deferred_runtime_asserts.values() for late in several]
    return [value.node.expr for value in values if isinstance(value, torch.SymBool)] + waiting


def _related(symbols: set[sympy.Symbol], constraints: Sequence[sympy.Basic]) -> set[sympy.Symbol]:
    """Symbols, and those that a constraint ties to them."""
    related = set(symbols)
    while more := [c.free_symbols for c in constraints if c.free_symbols & related and not c.free_symbols <= related]:
        related = related.union(*more)
    return related


def _lowest(bounds: Any) -> sympy.Integer:
    return sympy.Integer(int(bounds.lower)) if bounds.lower.is_Integer else sympy.Integer(0)


def _candidates(bounds: Any, constraints: Sequence[sympy.Basic]) -> list[sympy.Integer]:
    """Numbers for a size that depends on data: the preferred one, those of the constraints and their divisors."""
    preferred = int(min(max(bounds.lower, SMALL), bounds.upper))
    mentioned = {int(number) for c in constraints for number in c.atoms(sympy.Integer) if 0 < number <= 2**20}
    divisors = {divisor for number in mentioned for divisor in sympy.divisors(number)}
    ordered = dict.fromkeys((preferred, *sorted(divisors, reverse=True), *range(1, 17)))
    return [sympy.Integer(number) for number in ordered if bounds.lower <= number <= bounds.upper]


def _fitting(
    known: Mapping[sympy.Symbol, sympy.Integer],
    free: Mapping[sympy.Symbol, Sequence[sympy.Integer]],
    constraints: Sequence[sympy.Basic],
) -> Numbers | None:
    """Known numbers and one of the candidates for each free symbol, under which no constraint is false."""
    left = [c.xreplace(dict(known)) for c in constraints]
    tries = iter(range(TRIES))
    return next(_choices(dict(known), dict(free), left, tries), None)


def _choices(
    chosen: Numbers,
    free: dict[sympy.Symbol, Sequence[sympy.Integer]],
    constraints: list[sympy.Basic],
    tries: Iterator[int],
) -> Iterator[Numbers]:
    if any(c is sympy.false for c in constraints):
        return
    if not free:
        yield chosen
        return
    symbol = next(iter(free))
    solutions = _solutions(symbol, constraints)
    rest = {s: candidates for s, candidates in free.items() if s is not symbol}
    open_ones = [c for c in constraints if c is not sympy.true]
    for number in dict.fromkeys((*solutions, *free[symbol])):
        if next(tries, None) is None:
            return
        yield from _choices(chosen | {symbol: number}, rest, [c.xreplace({symbol: number}) for c in open_ones], tries)


def _solutions(symbol: sympy.Symbol, constraints: Iterable[sympy.Basic]) -> list[sympy.Integer]:
    """The numbers that equations in a single symbol leave."""
    equations = [c for c in constraints if isinstance(c, sympy.Eq) and c.free_symbols == {symbol}]
    solved = [try_solve(equation, symbol) for equation in equations]
    return [found[1] for found in solved if found is not None and found[1].is_Integer and found[1] >= 0]
