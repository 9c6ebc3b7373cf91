"""What torch_npu's documentation says its operators compute, as CPU implementations of its own schemas.

Registered for the CPU on the real `torch.ops.npu`, so that PyTorch's dispatcher checks every call against torch_npu's
schema, and nothing of these operators is a stub. Each file is a reading of torch_npu's documentation (`torch_npu/
_op_plugin_docs.py` of the 2.13.0 wheel) and, where that says less, of the CANN operator underneath. They are written
from that text alone, row by row, and share no code with kreg. Arguments that the documentation does not allow are an
error here, and so is leaning on what it leaves open.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Readings:
    """What the documentation leaves open: an adapter has to be right under each setting.

    Attributes:
        pse_before_scale: ``scale * (q k + pse)``, as the formula says, or ``scale * q k + pse``.
        missing: what `npu_lightning_indexer` writes where no ready entry is left: "-1", a "masked" one, or "zero".
        shuffled: whether its picks come in no order.
        dtypes: beside the documented ones, for tests of exact arithmetic.
    """

    pse_before_scale: bool = True
    missing: str = "-1"
    shuffled: bool = False
    dtypes: tuple[torch.dtype, ...] = ()


_now = [Readings()]


def now() -> Readings:
    """The reading in force."""
    return _now[-1]


@contextlib.contextmanager
def reading(**changes: Any) -> Iterator[None]:
    """Another reading, for a while."""
    _now.append(replace(now(), **changes))
    try:
        yield
    finally:
        _now.pop()


def demand(holds: bool, told: str) -> None:
    """A ValueError for a call that the documentation does not allow."""
    if not holds:
        raise ValueError(told)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated in, and what the documentation calls float32: float64 in tests of exact arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def registered() -> torch.library.Library:
    """The CPU implementations, in place from now on."""
    from . import fusion_attention, grouped_matmul, lightning_indexer, sparse_flash_attention

    library = torch.library.Library("npu", "IMPL")
    for module in (fusion_attention, grouped_matmul, lightning_indexer, sparse_flash_attention):
        for name, implementation in module.OPERATORS.items():
            library.impl(name, implementation, "CPU")
    return library
