"""Launching a Triton kernel, or recording the launch: what is compiled ahead of time is what would be launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from kreg.kernels.gpu.tables import Config
from kreg.kernels.gpu.targets import Target, assume

Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the function that ``triton.jit`` made.
        arguments: what it is launched with, by parameter name, but for what ``config`` gives. Tensors may be on
            the meta device.
        config: block sizes, warps, stages.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.__name__)


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)


def launch(kernel: Any, grid: Grid, config: Config, **arguments: Any) -> None:
    """Launch a kernel with arguments by name; within `record`, only note the launch.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs, up to three numbers, or a function of the configuration's parameters. Where there are none,
            nothing is launched.
    """
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(kernel, arguments, config))
        return
    programs = grid(config.meta) if callable(grid) else grid
    if all(programs):
        with _device_of(arguments):
            kernel[programs](**arguments, **config.options)


def _device_of(arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which is not that of the tensors in a model on several."""
    device = next((a.device for a in arguments.values() if isinstance(a, torch.Tensor)), None)
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext()


def record(target: Target | str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches that a call of host code makes on a target. Nothing runs: give it tensors of the meta device."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        with assume(target):
            function(*args, **kwargs)
    finally:
        _recorded.reset(token)
    return launches
