"""``block_indexer`` in plain PyTorch, a tile of queries at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kreg.kernels.tiles import Workspace, product, spans
from kreg.registry.ops.attention import accumulation_dtype

SCORES_HELD = 1 << 20
"""Scores of keys held at once, all index heads together."""


@torch.no_grad()
def forward(
    q: torch.Tensor, k: torch.Tensor, *, topk: int, block: int, local: int = 0, offset: int = 0
) -> torch.Tensor:
    """Selected blocks; keys after a tile's last position are not scored."""
    acc = accumulation_dtype(q.dtype)
    (batch, heads, queries, dim), keys = q.shape, k.shape[1]
    blocks = -(-keys // block)
    indices = q.new_empty(batch, heads, queries, topk, dtype=torch.int64)
    if not topk or not blocks:
        return indices
    work = Workspace(q, acc)
    order, own = torch.arange(keys, device=q.device), torch.arange(local, device=q.device)
    rows = max(1, min(256, SCORES_HELD // (heads * keys)))
    for b in range(batch):
        keys_b = F.pad(k[b].to(acc), (0, 0, 0, blocks * block - keys))
        for start, stop in spans(0, queries, rows):
            position = torch.arange(start + offset, stop + offset, device=q.device).unsqueeze(1)
            begun = max(1, min(blocks, -(-(stop + offset) // block)))
            seen = begun * block
            flat = work.copy("q", q[b, :, start:stop]).view(1, -1, dim)
            scores = product("scores", work, flat, keys_b[:seen].mT.unsqueeze(0)).view(heads, stop - start, seen)
            scores[..., :keys].masked_fill_(order[:seen] > position, float("-inf"))
            scores[..., keys:] = float("-inf")
            best = scores.new_full((heads, stop - start, max(begun, topk)), float("-inf"))
            torch.amax(scores.unflatten(-1, (begun, block)), -1, out=best[..., :begun])
            nearest = (position // block - own).clamp_(0).expand(heads, -1, -1)
            values, places = best.scatter_(-1, nearest, float("inf")).topk(topk, dim=-1, sorted=False)
            indices[b, :, start:stop] = places.masked_fill_(values.isneginf(), -1)
    return indices
