"""The cheapest choice of one kernel per site in which no two kernels exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    """A kernel for each site, or None for the original code, and what they cost together."""

    kernels: Mapping[str, str | None]
    cost_us: float

    @property
    def used(self) -> tuple[str, ...]:
        """The kernels used anywhere."""
        return tuple(sorted({name for name in self.kernels.values() if name is not None}))


def assign(
    costs: Mapping[str, Mapping[str, float]],
    references: Mapping[str, float],
    conflicts: Mapping[str, frozenset[str]],
    forbidden: frozenset[str] = frozenset(),
) -> Assignment:
    """Minimise the total cost exactly.

    Args:
        costs: for each site the kernels it can use, with their costs.
        references: for each site the cost without a kernel.
        conflicts: for each kernel those that may not be used with it; symmetric.
        forbidden: kernels not to use.

    Without conflicts every site takes its cheapest kernel, and that bounds the cost of any plan from below.
    If two kernels of that choice conflict, every valid plan lacks one or the other: branch on which, and drop
    a branch whose bound is no better than the best plan found.
    """
    best: Assignment | None = None
    branches = [forbidden]
    while branches:
        without = branches.pop()
        relaxed = _cheapest(costs, references, without)
        if best is not None and relaxed.cost_us >= best.cost_us:
            continue
        clash = _clash(relaxed.used, conflicts)
        if clash is None:
            best = relaxed
        else:
            branches.extend((without | {clash[0]}, without | {clash[1]}))
    assert best is not None  # forbidding every kernel leaves the references
    return best


def _cheapest(
    costs: Mapping[str, Mapping[str, float]], references: Mapping[str, float], forbidden: frozenset[str]
) -> Assignment:
    kernels: dict[str, str | None] = {}
    total = 0.0
    for site, offers in costs.items():
        allowed = [(cost, name) for name, cost in offers.items() if name not in forbidden]
        cost, name = min(allowed, default=(references[site], None))
        # On equal cost a kernel goes before the original code.
        kernels[site] = name if cost <= references[site] else None
        total += min(cost, references[site])
    return Assignment(kernels, total)


def _clash(used: tuple[str, ...], conflicts: Mapping[str, frozenset[str]]) -> tuple[str, str] | None:
    for first in used:
        for second in used:
            if second in conflicts.get(first, frozenset()):
                return first, second
    return None
