"""What depth costs: one config with different numbers of layers, captured and raised without weights."""

from __future__ import annotations

import gc
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kreg import api
from kreg.bench.measure import timed
from kreg.rewriters.report import Report

Progress = Callable[[str], None]
Build = Callable[[int], tuple[nn.Module, Mapping[str, Any]]]
"""A model of so many layers and its inputs, all of fake tensors."""


@dataclass(frozen=True)
class DepthResult:
    """What one number of layers cost.

    Attributes:
        seconds, processor_seconds: medians over rounds, of capture, raise and plan.
        ratio, processor_ratio: medians over rounds of what it took over what the first number of layers took.
        sites: how many were found, by op.
    """

    layers: int
    seconds: float
    processor_seconds: float
    ratio: float
    processor_ratio: float
    sites: dict[str, int]


def measure_depth(
    depths: Sequence[int], build: Build, device: str, *, rounds: int, progress: Progress = lambda step: None
) -> Iterator[DepthResult]:
    """Measures each number of layers once in each round, in turn, every time from nothing."""
    times: dict[int, list[tuple[float, float]]] = {layers: [] for layers in depths}
    reports: dict[int, Report] = {}
    progress(f"capturing {depths[0]} layers, not counted")
    _capture(*build(depths[0]), device)  # the first capture of a process pays for imports
    for turn in range(rounds):
        for layers in depths:
            progress(f"capturing {layers} layers, round {turn + 1} of {rounds}")
            reports[layers], taken = _capture(*build(layers), device)
            times[layers].append(taken)
    first = times[depths[0]]
    for layers, each in times.items():
        pairs = list(zip(each, first, strict=True))
        yield DepthResult(
            layers,
            statistics.median(wall for wall, _ in each),
            statistics.median(processor for _, processor in each),
            statistics.median(a[0] / b[0] for a, b in pairs),
            statistics.median(a[1] / b[1] for a, b in pairs),
            dict(Counter(site.op for site in reports[layers].sites)),
        )


def _capture(model: nn.Module, inputs: Mapping[str, Any], device: str) -> tuple[Report, tuple[float, float]]:
    torch._dynamo.reset()
    gc.collect()
    found: list[Report] = []
    taken = timed(lambda: found.append(api.analyse(model, dict(inputs), device=device, dry_run=True)), "cpu")
    return found[0], taken
