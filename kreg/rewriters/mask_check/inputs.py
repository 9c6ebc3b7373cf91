"""What the inputs of a mask may look like: padding, positions, documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Kind = Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor]


def runs(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """1 but for runs of padding, on the left, the right or both; and a row with holes."""
    length = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    first, last = (torch.randint(0, length + 1, (rows, 1), generator=generator) for _ in range(2))
    side = torch.randint(0, 4, (rows, 1), generator=generator)
    place = torch.arange(length)
    left, right = place >= first // 2, place < length - last // 2
    holes = torch.rand(rows, length, generator=generator) < 0.7
    kept = torch.where(side == 0, left, torch.where(side == 1, right, torch.where(side == 2, left & right, holes)))
    return kept.reshape(shape).to(dtype)


def _documents(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Numbers of documents that lie one after the other."""
    return (torch.rand(shape, generator=generator) < 0.3).long().cumsum(-1).to(dtype) if shape else _one(dtype)


def positions(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Positions that start again at 0 with each document."""
    if not shape:
        return _one(dtype)
    place = torch.arange(shape[-1]).expand(shape)
    starts = torch.rand(shape, generator=generator) < 0.3
    return (place - (place * starts).cummax(-1).values).to(dtype)


def _irregular(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Positions as they should not be: some begin anywhere, some are left out, some come twice or go back."""
    if not shape:
        return _one(dtype)
    odd = torch.rand(shape, generator=generator) < 0.4
    steps = torch.where(odd, torch.randint(-3, 4, shape, generator=generator), 1)
    return steps.cumsum(-1).to(dtype)


def signed(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Numbers of either sign; ones and zeros where they are no floats."""
    drawn = torch.randn(shape, generator=generator)
    return drawn.to(dtype) if dtype.is_floating_point else runs(shape, dtype, generator)


def _one(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((), dtype=dtype)


def _unless_boolean(kind: Kind) -> Kind:
    def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return (runs if dtype is torch.bool or dtype.is_floating_point else kind)(shape, dtype, generator)

    return draw


KINDS: tuple[Kind, ...] = (runs, *map(_unless_boolean, (positions, _documents, _irregular)))
"""What an input of a mask may look like; each input is drawn as each of them in turn."""

COMPUTED: tuple[Kind, ...] = (signed, *KINDS[1:])
"""What a tensor may look like that a model computes and masks by: a score that is compared, or such an input."""
