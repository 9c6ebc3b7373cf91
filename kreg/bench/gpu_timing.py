"""Timing one call on a device, and what the device can do at most, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSHED = 256 * 2**20
"""Bytes written between two calls, more than a cache holds, so that no call finds its inputs there."""


class Timer(Protocol):
    """Seconds of a call."""

    def median(self, call: Call, budget: float) -> tuple[float, int]:
        """The median of several calls that together take about ``budget`` seconds, and how many they were."""
        ...


class DeviceTimer:
    """By events on the device's own clock: the host's time counts only where the device waits for it."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")

    def median(self, call: Call, budget: float) -> tuple[float, int]:
        """See `Timer`; at least 5 calls, and at most 100, after two that do not count."""
        call()
        rounds = _rounds(self._once(call), budget)
        return statistics.median(self._once(call) for _ in range(rounds)), rounds

    def _once(self, call: Call) -> float:
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def graphed(call: Call) -> Call:
    """The call as a CUDA graph, as serving replays it: what the host does to launch it is not in its time.

    Raises:
        RuntimeError: it cannot be captured, as it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # outside the capture first: it may compile, or allocate for good
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class HostTimer:
    """By the host's clock, where there is no GPU: it shows that the benchmark runs, and nothing else."""

    def median(self, call: Call, budget: float) -> tuple[float, int]:
        """See `Timer`."""
        call()
        return statistics.median(self._once(call) for _ in range(3)), 3

    def _once(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def _rounds(seconds: float, budget: float) -> int:
    return max(5, min(100, int(budget / max(seconds, 1e-6))))


@dataclass(frozen=True)
class Ceilings:
    """What the device reached here.

    Attributes:
        flops: floating-point operations a second of a large matrix product in the benchmark's dtype.
        bandwidth: bytes a second of a large copy, read and written ones both counted.
    """

    flops: float
    bandwidth: float

    def seconds(self, operations: float, moved: float) -> float:
        """The least time for this work: the roofline."""
        return max(operations / self.flops, moved / self.bandwidth)

    def bound(self, operations: float, moved: float) -> str:
        """Which of the two it is: "matmul" or "copy"."""
        return "matmul" if operations / self.flops >= moved / self.bandwidth else "copy"


def ceilings(dtype: torch.dtype, device: str, timer: Timer, size: int = 8192, moved: int = 2**31) -> Ceilings:
    """Measured with a square product of ``size`` and a copy of ``moved / 2`` bytes."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    product, _ = timer.median(lambda: torch.mm(a, b, out=out), 0.5)
    source = torch.zeros(moved // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy, _ = timer.median(lambda: target.copy_(source), 0.2)
    return Ceilings(2.0 * size**3 / product, moved / copy)
