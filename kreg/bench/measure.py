"""Measuring one call: seconds, processor seconds, and the peak of memory above what was held before it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's work included."""
    return timed(call, device)[0]


def timed(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall time of one call, the device's work included, and the processor time that the host spent on it.

    On a machine that others use too, the second says more of code that runs on the host.
    """
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    call()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - processor


def synchronize(device: str) -> None:
    """Waits for a device's queued work."""
    module = getattr(torch, device, None)
    if device != "cpu" and module is not None:
        module.synchronize()


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Most memory that one call holds above what was held before; None where the system cannot tell."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    _return_freed_memory()
    CLEAR.write_text("5")  # resets the high-water mark of resident memory to what is resident now
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _return_freed_memory() -> None:
    """What the allocator keeps of earlier calls would hide what this one needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def matmul_rate(dtype: torch.dtype, device: str, size: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations a second of a square matrix product: the machine's ceiling, measured here."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(rounds))


def free_bytes() -> int | None:
    """Memory that can still be had on this machine; None where the system cannot tell."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    for line in info.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
