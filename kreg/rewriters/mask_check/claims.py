"""What a model masks with, from the tensors that were claimed of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kreg.rewriters.masks import NEGLIGIBLE
from kreg.rewriters.site import Claim

CLOSE = 1e-3
"""Weights that differ by no more are equal: what is added was rounded to the model's dtype."""


def kept(claim: Claim, value: torch.Tensor) -> torch.Tensor:
    """Which keys a claimed tensor keeps."""
    return value == 0 if claim.levels else value.bool()


def is_sound(claim: Claim, value: torch.Tensor) -> torch.Tensor:
    """Whether what is added is 0, or no less negligible than what was read; half of it leaves room for rounding."""
    if not claim.levels:
        return torch.ones((), dtype=torch.bool)
    least = max((level for level in claim.levels if level < 0), default=NEGLIGIBLE)
    return (value == 0) | (value <= least / 2)


def fused_causal(queries: int, keys: int) -> torch.Tensor:
    """The causal mask of PyTorch's fused operator, as it gives it: where a query without a preference finds weight."""
    q, k, v = torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1), torch.eye(keys)[None, None]
    weights = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return weights > 0


def weights(*added: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Attention weights where all products are 0, for each of what may be added.

    A row that masks everything has none; but where a softmax gives the same of all, as of rows that one of them
    shifts, these are its weights.
    """
    empty = [(scores <= NEGLIGIBLE / 2).all(dim=-1, keepdim=True) for scores in added]
    plain = [torch.softmax(scores, dim=-1) for scores in added]
    same = torch.stack([(one - plain[0]).abs().amax(-1, keepdim=True) <= CLOSE for one in plain]).all(0)
    return tuple(one.masked_fill(none & ~same, 0.0) for one, none in zip(plain, empty, strict=True))


def conjunction(conditions: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of some conditions."""
    result = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for condition in conditions:
        result = result & condition
    return result
