"""What MindSpeed's and CANN's documentation leave open, as switches: an adapter has to be right under each setting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Readings:
    """One way to read the documentation.

    Attributes:
        minus_one: whether an index of -1 is one that is "skipped", or one that "ends" the row.
        causal_again: whether entries that are named are held to the causal bound of ``cmp_mask_mode=3`` as well.
        missing: what the indexer writes where no ready entry is left: "-1", a "masked" entry, or "zero".
        shuffled: whether the indexer's picks come in no order.
        dtypes: of queries and keys. The kernels take two; tests of exact arithmetic add float64.
    """

    minus_one: str = "skipped"
    causal_again: bool = True
    missing: str = "-1"
    shuffled: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


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
    """A ValueError for arguments that MindSpeed's function, or CANN's operator under it, does not take."""
    if not holds:
        raise ValueError(told)
