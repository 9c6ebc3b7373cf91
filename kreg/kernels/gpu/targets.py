"""The GPUs that kernels are tuned and compiled for, and the limits that a compiled kernel has to fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch

from kreg.errors import SelectionError
from kreg.registry.environment import Environment
from kreg.registry.wording import listing

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU architecture.

    Attributes:
        name: "sm_90", "gfx942"; as `kreg.registry.environment` names architectures.
        backend: Triton's: "cuda" or "hip".
        arch: what Triton calls it: 90, or "gfx942".
        warp_size: threads of a warp (a wavefront on AMD).
        shared_bytes: shared memory (LDS) that one block can have at most, opted in to where that is needed.
        registers: 32-bit registers that a thread can have at most.
        register_file: 32-bit registers of one multiprocessor (compute unit): a block's threads share them.
        tuned_as: the target whose rows of a tuning table it takes where it has none of its own.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    registers: int
    register_file: int
    tuned_as: str = ""


def _cuda(arch: int, shared: int, tuned_as: str = "") -> Target:
    return Target(f"sm_{arch}", "cuda", arch, 32, shared * KIB, 255, 64 * KIB, tuned_as)


def _hip(arch: str, shared: int, tuned_as: str = "") -> Target:
    return Target(arch, "hip", arch, 64, shared * KIB, 512, 128 * KIB, tuned_as)


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": maximum amount of shared
# memory per thread block, 32-bit registers per thread and per multiprocessor.
# AMD: CDNA 3 and CDNA 4 Instruction Set Architecture: LDS of a compute unit (64 KiB, 160 KiB), 512 VGPRs a lane
# (architectural and accumulation), and 512 KiB of VGPRs in its four SIMDs.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _cuda(80, 163),
        _cuda(86, 99),
        _cuda(87, 163, tuned_as="sm_80"),
        _cuda(89, 99, tuned_as="sm_86"),
        _cuda(90, 227),
        _cuda(100, 227),
        _cuda(103, 227, tuned_as="sm_100"),
        _cuda(120, 99, tuned_as="sm_86"),
        _cuda(121, 99, tuned_as="sm_86"),
        _hip("gfx90a", 64, tuned_as="gfx942"),
        _hip("gfx942", 64),
        _hip("gfx950", 160),
    )
}

COMPILED = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
"""The targets that every kernel is compiled for ahead of time."""

INTERPRETED = "sm_90"
"""The target whose configurations Triton's interpreter runs with, on tensors of a CPU."""

_assumed: ContextVar[Target | None] = ContextVar("assumed target", default=None)


@contextmanager
def assume(target: Target | str) -> Iterator[Target]:
    """While it lasts, `current_target` is this one, whatever the device."""
    chosen = target_of(target) if isinstance(target, str) else target
    token = _assumed.set(chosen)
    try:
        yield chosen
    finally:
        _assumed.reset(token)


def target_of(name: str) -> Target:
    """The target of an architecture's name.

    Raises:
        SelectionError: its limits are not known.
    """
    if name not in TARGETS:
        raise SelectionError(f"no limits are known for the GPU architecture {name!r}; known: {listing(TARGETS)}")
    return TARGETS[name]


def current_target(device: torch.device | str | None = None) -> Target:
    """The target of a device; of a device without a GPU's architecture (cpu, meta) what the interpreter takes.

    Raises:
        SelectionError: the architecture is not in `TARGETS`.
    """
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    if chosen.type != "cuda":
        return TARGETS[INTERPRETED]
    return target_of(_architecture(torch.cuda.current_device() if chosen.index is None else chosen.index))


@cache  # asked at each launch
def _architecture(index: int) -> str:
    return Environment.detect(f"cuda:{index}").architecture or "unknown"
