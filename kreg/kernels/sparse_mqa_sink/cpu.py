"""``sparse_mqa_sink`` in plain PyTorch, a tile of tokens at a time."""

from __future__ import annotations

import torch

from kreg.kernels.tiles import GATHERED_PER_TILE, spans
from kreg.registry.ops.sparse_mqa_sink import reference


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    topk_indices: torch.Tensor,
    attn_sink: torch.Tensor | None = None,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Output of the op."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = max(1, GATHERED_PER_TILE // max(1, topk_indices.shape[1] * q.shape[2]))
    for start, stop in spans(0, len(q), rows):
        out[start:stop] = reference(q[start:stop], kv, topk_indices[start:stop], attn_sink, scale=scale)[0]
    return (out,)
