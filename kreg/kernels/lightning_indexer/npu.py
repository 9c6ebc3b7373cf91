"""``lightning_indexer`` by torch_npu's ``npu_lightning_indexer``, over the keys themselves (no compressed entries)."""

from __future__ import annotations

from typing import Any

import torch

from kreg.kernels.attention.npu import zeros
from kreg.kernels.attention.npu_fusion import operators
from kreg.kernels.lightning_indexer.npu_rows import completed, completed_scores, ready_entries, weighted
from kreg.registry.ops.attention import accumulation_dtype


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    scored: bool = False,
    sentinel: bool = True,
    **absent: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and scores of the op. ``sparse_mode`` 3 keeps ``t <= s + entries - queries``, 0 every entry."""
    picks, values = operators().npu_lightning_indexer(
        q.contiguous(),
        k.unsqueeze(2).contiguous(),
        weighted(weights, scale, q.dtype),
        layout_query="BSND",
        layout_key="BSND",
        sparse_count=topk,
        sparse_mode=3 if ratio else 0,
        return_value=scored,
    )
    ready = ready_entries(q.shape[1], k.shape[1], ratio=ratio, offset=offset, device=q.device)
    indices = completed(picks.squeeze(2), ready, sentinel)
    if not scored:
        return indices, q.new_empty(*q.shape[:2], 0, dtype=accumulation_dtype(q.dtype))
    return indices, completed_scores(values.squeeze(2), picks.squeeze(2), ready, scale)


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    ratio: int,
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """Gradients by ``npu_lightning_indexer_grad``, at the op's own indices.

    Slots that hold no ready entry name entry 0 there, with a gradient of 0: what -1 means to it is not documented.
    """
    (indices, scores), grad = outputs, grads[1]
    arguments = {"q": q, "k": k, "weights": weights}
    if grad is None or not scores.shape[-1]:
        return zeros(arguments, needs)
    absent = scores.isneginf()
    dq, dk, dweights = operators().npu_lightning_indexer_grad(
        q.contiguous(),
        k.unsqueeze(2).contiguous(),
        (grad * abs(scale)).masked_fill(absent, 0.0).to(q.dtype).contiguous(),
        indices.masked_fill(absent, 0).to(torch.int32).contiguous(),
        weighted(weights, scale, q.dtype),
        layout="BSND",
        sparse_mode=3 if ratio else 0,
    )
    found = {"q": dq, "k": dk.squeeze(2), "weights": -dweights if scale < 0 else dweights}
    return {name: x for name, x in found.items() if name in needs}
