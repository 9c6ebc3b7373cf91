"""``lightning_indexer`` by MindSpeed's ``npu_lightning_indexer`` (LI).

Its values have a gradient by autograd, through the function run again. But the order of its picks is not documented, so
what it picks again need not be slot for slot what it picked: scores are left to kernels that take the indices for their
gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from kreg.kernels.lightning_indexer.npu_rows import completed, ready_entries, weighted
from kreg.registry.ops.attention import accumulation_dtype


def function() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """MindSpeed's own."""
    module = importlib.import_module("mindspeed.ops.npu_lightning_indexer")
    found: Callable[..., tuple[torch.Tensor, torch.Tensor]] = module.npu_lightning_indexer
    return found


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    sentinel: bool = True,
    **absent: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the op, and no scores."""
    picks, _ = function()(
        q.contiguous(),
        k.unsqueeze(2).contiguous(),
        weighted(weights, scale, q.dtype),
        layout="BSND",
        sparse_count=topk,
        sparse_mode=3,
        cmp_ratio=ratio,
    )
    ready = ready_entries(q.shape[1], k.shape[1], ratio=ratio, offset=offset, device=q.device)
    nothing = q.new_empty(*q.shape[:2], 0, dtype=accumulation_dtype(q.dtype))
    return completed(picks.squeeze(2), ready, sentinel), nothing
