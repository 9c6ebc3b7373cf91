"""Verification errors on a logarithmic axis, against the tolerance of their op."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kreg.registry.catalogue import catalogue
from kreg.registry.op import Tolerance
from kreg.rewriters.report.model import SiteReport
from kreg.rewriters.report.wording import error

LEAST = 1e-17
"""Errors below this are drawn at the left edge, as 0."""


@dataclass(frozen=True)
class Dot:
    """One error of one site, at a percentage of the axis."""

    kind: str
    percent: float
    text: str


@dataclass(frozen=True)
class ErrorAxis:
    """Errors of several sites on one axis.

    Attributes:
        dots: results and gradients of each site.
        ticks: (percentage, label) at powers of ten.
        limit: where the tolerance of values of size 1 stands, in percent; None where it is not known.
        tolerance: the tolerance in words, "" where it is not known.
    """

    dots: tuple[Dot, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float | None
    tolerance: str


def error_axis(sites: tuple[SiteReport, ...]) -> ErrorAxis | None:
    """The errors of sites of one op; None where none was verified."""
    errors = [
        (kind, value, site.module)
        for site in sites
        if site.verify
        for kind, value in (("result", site.verify.max_error), ("gradient", site.verify.max_grad_error))
        if value is not None
    ]
    if not errors:
        return None
    tolerance = tolerance_of(sites[0])
    limit = None if tolerance is None else tolerance.atol + tolerance.rtol
    positive = [v for _, v, _ in errors if math.isfinite(v) and v > LEAST] + ([limit] if limit else [])
    low = math.floor(math.log10(min(positive, default=1e-8))) - 1
    high = max(math.ceil(math.log10(max(positive, default=1e-2))) + 1, low + 3)

    def percent(value: float) -> float:
        if value <= LEAST:
            return 0.0
        if not math.isfinite(value):
            return 100.0
        return round(min(100.0, max(0.0, 100 * (math.log10(value) - low) / (high - low))), 2)

    step = max(1, (high - low) // 5)
    return ErrorAxis(
        dots=tuple(Dot(kind, percent(value), f"{module}: {kind} {error(value)}") for kind, value, module in errors),
        ticks=tuple((100 * (e - low) / (high - low), f"1e{e}") for e in range(low, high + 1, step)),
        limit=None if limit is None else percent(limit),
        tolerance="" if tolerance is None else f"{tolerance.atol:.0e} + {tolerance.rtol:.0e} of the largest value",
    )


def tolerance_of(site: SiteReport) -> Tolerance | None:
    """The tolerance that a site's op declares for its dtype; None for an op that is not registered here."""
    op, dtype = catalogue().ops.get(site.op), getattr(torch, site.dtype, None)
    return None if op is None or not isinstance(dtype, torch.dtype) else op.tolerances.get(dtype)
