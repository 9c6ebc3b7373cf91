"""The account of a live model: the graphs that were made, the layers that each answers for, and the calls."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from kreg.registry.calls import fallbacks
from kreg.registry.catalogue import catalogue
from kreg.registry.plan import SiteFacts
from kreg.rewriters.live.variants import Variant
from kreg.rewriters.report import Calls, NearMissReport, Report, Seconds, SiteReport

log = logging.getLogger("kreg")


QUIET = 4
"""Calls in a row to which it did not matter how inputs were made, after which that is not noted any more."""


class _Thread(threading.local):
    path: str | None = None  # of the region that runs; none while a backward pass computes a layer anew
    rewritten = False
    counting = True
    watched = False


class Account:
    """What happened to one model so far.

    Args:
        model, device: for the report.
        paths: the model's regions, in order.
        decided: kernels that are off by a plan for the whole model, and why.
    """

    def __init__(self, model: str, device: str, paths: tuple[str, ...], decided: Mapping[str, str]) -> None:
        self.model = model
        self.device = device
        self.paths = paths
        self.variants: list[Variant] = []
        self.places: dict[str, dict[int, Variant]] = {path: {} for path in paths}
        self.calls: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.watching = True  # noting how masks and positions are made
        self._quiet = 0
        self.decided = decided
        self._before = Counter(fallbacks)
        self.now = _Thread()

    def watch(self) -> None:
        """It matters to a graph of this call how its inputs were made."""
        self.now.watched = True

    def added(self, variant: Variant) -> None:
        """A variant was made, for the region that is running."""
        self.variants.append(variant)
        if self.now.path is not None:
            self.places[self.now.path][id(variant)] = variant

    @property
    def kernels(self) -> frozenset[str]:
        """The kernels in use so far."""
        sites = (site for variant in self.variants for site in variant.report.sites)
        return frozenset(site.kernel for site in sites if site.kernel is not None)

    @property
    def excluded(self) -> Mapping[str, str]:
        """The kernels that are off because of others in the model, and why."""
        known = catalogue()
        return {
            name: f"it and {other} exclude each other, and {other} is used in another part of the model"
            for other in sorted(self.kernels)
            for name in known.excluded_by(other)
        } | dict(self.decided)

    @property
    def cut_short(self) -> list[str]:
        """The regions that give out what keeps a site from being one."""
        return [path for path in self.paths if any(variant.cut_short for variant in self._of(path))]

    @property
    def replaced(self) -> int:
        """How many sites are replaced in all regions."""
        return sum(_replaced(variant) for path in self.paths for variant in self._best(path))

    def facts(self) -> list[SiteFacts]:
        """The sites of every region, as each of its graphs has them."""
        return [
            replace(site, id=f"{path}/{number}/{site.id}")
            for path in self.paths
            for number, variant in enumerate(self._of(path))
            for site in variant.facts
        ]

    def ran(self, variant: Variant) -> None:
        """A variant answers for the region that is running."""
        now = self.now
        if variant.replaced and not variant.report.dry_run:
            now.rewritten = True
        if now.path is not None:
            self.places[now.path][id(variant)] = variant

    def failed(self, reason: str) -> None:
        """The original code answered; said once in the log, and counted."""
        if reason not in self.reasons:
            log.warning("%s: %s. The original code answers", self.model, reason)
        self.reasons[reason] += 1

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """While a call of the whole model runs."""
        now = self.now
        outer, now.rewritten, now.watched = now.rewritten, False, False
        try:
            yield
            if now.counting:
                self.calls["rewritten" if now.rewritten else "original"] += 1
            if now.rewritten or now.watched:  # a decoding step, which rests on nothing, says nothing of the rest
                self._quiet = 0 if now.watched else self._quiet + 1
                self.watching = self._quiet < QUIET
        finally:
            now.rewritten = outer

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """While the model is run to capture it."""
        self.now.counting = False
        try:
            yield
        finally:
            self.now.counting = True

    def report(self) -> Report:
        """Every region's sites, by the variant that replaced most in it; near misses of all; the calls so far."""
        chosen = [(path, variant) for path in self.paths for variant in self._best(path)]
        misses = dict.fromkeys(
            _miss_at(miss, path) for path in self.paths for v in self._of(path) for miss in v.report.near_misses
        )
        return Report(
            model=self.model,
            device=self.device,
            frontend="dynamo",
            nodes=sum(variant.report.nodes for _, variant in chosen),
            sites=tuple(_site_at(site, path, self._first(v)) for path, v in chosen for site in v.report.sites),
            near_misses=tuple(misses),
            unused={
                name: why
                for variant in self.variants
                for name, why in variant.report.unused.items()
                if name not in self.kernels
            },
            seconds=self._seconds(),
            calls=self._calls(),
            dry_run=any(variant.report.dry_run for variant in self.variants),
        )

    def _of(self, path: str) -> list[Variant]:
        return list(self.places[path].values())

    def _best(self, path: str) -> list[Variant]:
        """Of each graph of a region the variant that replaced most; several graphs where Dynamo breaks the region."""
        graphs: dict[int, list[Variant]] = {}
        for variant in self._of(path):
            graphs.setdefault(variant.graph, []).append(variant)
        best = [max(g, key=_replaced) for g in graphs.values()]
        return _distinct(sorted(best, key=_replaced, reverse=True))

    def _first(self, variant: Variant) -> str:
        """The region that a variant was made for."""
        return next(path for path, variants in self.places.items() if id(variant) in variants)

    def _seconds(self) -> Seconds:
        total: Counter[str] = Counter()
        for variant in self.variants:
            total.update(variant.report.seconds.model_dump(by_alias=True))
        return Seconds.model_validate(dict(total))

    def _calls(self) -> Calls:
        since = {f"{kernel}: {reason}": count for (kernel, reason), count in (fallbacks - self._before).items()}
        return Calls(
            rewritten=self.calls["rewritten"],
            original=self.calls["original"],
            fallbacks=since | dict(self.reasons),
        )


def _replaced(variant: Variant) -> int:
    return sum(site.status == "replaced" for site in variant.report.sites)


def _distinct(variants: list[Variant]) -> list[Variant]:
    """Without the graphs of the same code for other calls: with gradients and without, of other sizes."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for variant in variants:
        sites = {(site.op, site.module) for site in variant.report.sites}
        if sites and not sites & seen:
            kept.append(variant)
            seen |= sites
    return kept or variants[:1]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _site_at(site: SiteReport, path: str, first: str) -> SiteReport:
    """A site of a layer's graph, at one of the layers that it stands for."""
    at = None if site.verified_at is None else _join(first, site.verified_at)
    return site.model_copy(update={"id": _join(path, site.id), "module": _join(path, site.module), "verified_at": at})


def _miss_at(miss: NearMissReport, path: str) -> NearMissReport:
    return miss.model_copy(update={"module": _join(path, miss.module)})
