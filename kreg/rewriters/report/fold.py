"""Repeated layers as one: sites that are equal but for the number of their layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from kreg.rewriters.report.model import NearMissReport, SiteReport

T = TypeVar("T", SiteReport, NearMissReport)

LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number of a layer: the first part of a module path that is nothing but digits."""

LISTED = 6
"""A list of layer numbers longer than this is shortened to its pattern or its ends."""


@dataclass(frozen=True)
class Fold(Generic[T]):
    """Equal members of repeated layers; most often one.

    Attributes:
        module: the path they share, as ``model.layers.{0..23}.self_attn``.
        members: the members, in the order of the graph.
    """

    module: str
    members: tuple[T, ...]

    @property
    def first(self) -> T:
        """The member that stands for all."""
        return self.members[0]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.members)


def fold_sites(sites: Iterable[SiteReport]) -> list[Fold[SiteReport]]:
    """Sites that differ in their layer's number, their node names and their errors only, as one."""
    return _fold(sites, _same_site)


def fold_near_misses(misses: Iterable[NearMissReport]) -> list[Fold[NearMissReport]]:
    """Near misses that differ in their layer's number and their node only, as one."""
    return _fold(misses, lambda miss: (miss.op, miss.reason))


def split_layer(module: str) -> tuple[str, int | None, str]:
    """A module path as what comes before its layer's number, the number, and what comes after."""
    found = LAYER.search(module)
    if found is None:
        return module, None, ""
    return module[: found.start()].rstrip("."), int(found[0]), module[found.end() :].lstrip(".")


def _same_site(site: SiteReport) -> Hashable:
    shared = site.model_dump(
        include={"op", "kernel", "status", "reason", "mask", "dims", "dtype", "trainable", "alternatives"}
    )
    return repr(shared), None if site.verify is None else site.verify.passed


def _fold(items: Iterable[T], same: Callable[[T], Hashable]) -> list[Fold[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        before, number, after = split_layer(item.module)
        groups.setdefault((before, number is None, after, same(item)), []).append(item)
    return [Fold(_shared_module([m.module for m in members]), tuple(members)) for members in groups.values()]


def _shared_module(modules: Sequence[str]) -> str:
    numbers = list(dict.fromkeys(split_layer(module)[1] for module in modules))
    before, _, after = split_layer(modules[0])
    if len(numbers) < 2:
        return modules[0]
    return ".".join(part for part in (before, f"{{{spelled([n or 0 for n in numbers])}}}", after) if part)


def spelled(numbers: Sequence[int]) -> str:
    """Layer numbers in few words: ``0..23``, ``0,2,..,22``, ``0,3,7``, ``0..2,5..9``."""
    ordered = sorted(numbers)
    steps = {b - a for a, b in pairwise(ordered)}
    if len(ordered) < 3:
        return ",".join(map(str, ordered))
    if steps == {1}:
        return f"{ordered[0]}..{ordered[-1]}"
    if len(ordered) > 3 and len(steps) == 1:
        return f"{ordered[0]},{ordered[1]},..,{ordered[-1]}"
    runs: list[list[int]] = []
    for number in ordered:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    return ",".join(parts if len(parts) <= LISTED else [*parts[:3], "..", parts[-1]])
