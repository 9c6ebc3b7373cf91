"""What the two lightning indexers for Ascend have in common: their scale, and rows that have few entries to pick from.

Neither documents what it writes to slots that no ready entry is left for: -1, an entry that is masked, or whatever was
there. But a query with no more ready entries than slots picks all of them, whatever they score. Its row is written
here, and what the kernel wrote there is not read; a query with more ready entries than slots has no such slot.
"""

from __future__ import annotations

import torch

from kreg.registry.ops.attention import accumulation_dtype


def weighted(weights: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The weights for a kernel that takes no scale.

    A positive factor changes no order, so the scores are left without it and the values multiplied afterwards: the
    weights are not rounded once more. A negative one turns the order round.
    """
    weights = weights.to(dtype)
    return (-weights if scale < 0 else weights).contiguous()


def ready_entries(queries: int, entries: int, *, ratio: int, offset: int, device: torch.device) -> torch.Tensor:
    """How many entries are ready for each query, the first ones: int64 [queries, 1]."""
    if not ratio:
        return torch.full((queries, 1), entries, device=device)
    position = torch.arange(offset, offset + queries, device=device).unsqueeze(1)
    return ((position + 1) // ratio).clamp(0, entries)


def completed(picks: torch.Tensor, ready: torch.Tensor, sentinel: bool) -> torch.Tensor:
    """The op's indices, int64 [batch, queries, topk], from a kernel's picks of the same shape."""
    slot = torch.arange(picks.shape[-1], device=picks.device)
    row = torch.where(slot < ready, slot, -1) if sentinel else slot
    return torch.where(ready <= picks.shape[-1], row, picks.long())


def completed_scores(values: torch.Tensor, picks: torch.Tensor, ready: torch.Tensor, scale: float) -> torch.Tensor:
    """The scores of `completed`'s indices in the accumulation dtype; -inf where none is ready. Differentiable."""
    topk = picks.shape[-1]
    values = values.to(accumulation_dtype(values.dtype)) * abs(scale)
    few = ready <= topk
    place = torch.where(few & (picks >= 0) & (picks < ready), picks.long(), topk)
    nothing = values.new_full((*values.shape[:2], topk + 1), float("-inf"))
    return torch.where(few, nothing.scatter(-1, place, values)[..., :topk], values)
