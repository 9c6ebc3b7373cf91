"""Numbers for the symbolic sizes of a mask: the example's, small odd ones, and some that pass every window."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sympy
import torch

from kreg.rewriters.mask_check.outcome import NotRun

SMALL = (5, 7, 9, 11, 13, 6, 8, 10)
ROUND = (24, 32, 48, 64, 80, 96, 128, 256, 384)
"""Sizes to choose from; round ones where a graph asks for multiples of something."""

TRIES = 150
"""Random choices of sizes, until one fits the graph's guards."""


def symbolic(value: Any) -> list[Any]:
    """The symbolic sizes of a value."""
    values = list(value.shape) if isinstance(value, torch.Tensor) else [value]
    return [s for s in values if isinstance(s, torch.SymInt) and not s.node.expr.is_Integer]


def numbers(values: Sequence[Any], sizes: Mapping[sympy.Symbol, int]) -> tuple[Any, ...]:
    """Sizes, or values made of sizes, as numbers."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.SymInt):
            found.append(int(value.node.expr.xreplace(dict(sizes))))
        elif isinstance(value, (torch.SymFloat, torch.SymBool)):
            found.append(value.node.expr.xreplace(sizes))
        else:
            found.append(value)
    return tuple(found)


class Symbols:
    """Numbers for symbolic sizes, within what the graph's guards allow."""

    def __init__(self, environment: Any, needed: set[sympy.Symbol]) -> None:
        known = environment.backed_var_to_val
        if not needed <= known.keys():
            raise NotRun("a size depends on data")
        guards = [environment.replace(guard.expr) for guard in environment.guards]
        symbols = needed | {s for guard in guards for s in guard.free_symbols if s in known}
        self.hints = {s: int(known[s]) for s in sorted(symbols, key=str)}
        self.ranges = {s: environment.var_to_range[s] for s in self.hints}
        self.guards = guards

    def choices(self, fixed: Mapping[sympy.Symbol, int] = MappingProxyType({})) -> Iterator[dict[sympy.Symbol, int]]:
        """Choices of numbers, small ones first: all different, then few different ones, for some have to be equal."""
        generator = random.Random(0)
        free = {s: hint for s, hint in self.hints.items() if s not in fixed}
        for attempt in range(TRIES):
            if attempt < TRIES // 3 and len(free) <= len(SMALL):
                sizes = dict(zip(free, generator.sample(SMALL, k=len(free)), strict=True))
            elif attempt < 2 * TRIES // 3:
                pool = [generator.choice(SMALL), *fixed.values()]
                sizes = {s: generator.choice(pool) for s in free}
            else:
                pool = [generator.choice(SMALL), generator.choice(ROUND), *fixed.values()]
                sizes = {s: generator.choice((*pool, hint, 2 * hint)) for s, hint in free.items()}
            sizes |= fixed
            if self._fits(sizes):
                yield sizes

    def _fits(self, sizes: dict[sympy.Symbol, int]) -> bool:
        inside = all(self.ranges[s].lower <= number <= self.ranges[s].upper for s, number in sizes.items())
        if not inside:
            return False
        for place, guard in enumerate(self.guards):
            if guard.xreplace(sizes) is sympy.false:
                self.guards.insert(0, self.guards.pop(place))  # what failed once is asked first
                return False
        return True
