"""``attention`` within packed documents by ``npu_fusion_attention``'s varlen layout: each document is a sequence.

No mask of queries times keys is made. In return the operator takes the documents' ends as numbers of the host, so the
device is waited for, once forward and once backward. Documents in several pieces, or more of them than the
operator takes, are left to the mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kreg.kernels.attention import npu_fusion as fusion
from kreg.kernels.attention import npu_masked as masked
from kreg.kernels.attention.npu import zeros

LAYOUT = "TND"
"""[batch and position, head, dim], one sequence after the other."""

MOST = 1024
"""Sequences that the operator takes in this layout."""


def ends(documents: torch.Tensor) -> list[int] | None:
    """Where each document ends, counted through all rows of [batch, keys]; None where they are no sequences."""
    new = documents[:, 1:] != documents[:, :-1]
    ordered = documents.sort(dim=-1).values
    whole = new.sum(-1) == (ordered[:, 1:] != ordered[:, :-1]).sum(-1)  # as many pieces as documents
    told = torch.cat([F.pad(new, (1, 0), value=True).flatten(), whole]).cpu()
    starts = told[: documents.numel()].nonzero().flatten().tolist()
    if not bool(told[documents.numel() :].all()) or len(starts) > MOST:
        return None
    return [*starts[1:], documents.numel()]


def sequences(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, positions, dim] as [batch * positions, heads, dim]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def masking(causal: bool, device: torch.device) -> dict[str, Any]:
    """Within each sequence: none, or causal, whose mode starts at each sequence's own last query and key."""
    return {"atten_mask": fusion.triangle(device), "sparse_mode": 3} if causal else {}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool = False, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    bounds = ends(rest["documents"])
    if bounds is None:
        return masked.forward(q, k, v, scale=scale, causal=causal, **rest)
    batch, heads, queries, _ = q.shape
    out, largest, total, *_ = fusion.operators().npu_fusion_attention(
        sequences(q),
        sequences(k),
        sequences(v),
        heads,
        LAYOUT,
        scale=scale,
        actual_seq_qlen=bounds,
        actual_seq_kvlen=bounds,
        softmax_layout=LAYOUT,
        **masking(causal, q.device),
    )
    lse = (largest[..., 0] + total[..., 0].log()).view(batch, queries, heads)
    return out.view(batch, queries, heads, -1).transpose(1, 2), fusion.packed(lse.transpose(1, 2))


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    **rest: Any,
) -> dict[str, torch.Tensor]:
    """Gradients by ``npu_fusion_attention_grad``, from the saved output and lse: see `npu_fusion.backward`."""
    (out, lse), grad = outputs, grads[0]
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v}
    if grad is None:
        return zeros(arguments, needs)
    bounds = ends(rest["documents"])
    if bounds is None:
        return masked.backward(grads, outputs, needs, **arguments, scale=scale, causal=causal, **rest)
    maxima = fusion.lanes(lse).transpose(1, 2).flatten(0, 1).contiguous()
    found = fusion.operators().npu_fusion_attention_grad(
        sequences(q),
        sequences(k),
        sequences(v),
        sequences(grad),
        q.shape[1],
        LAYOUT,
        softmax_max=maxima,
        softmax_sum=torch.ones_like(maxima),
        attention_in=sequences(out),
        scale_value=scale,
        actual_seq_qlen=bounds,
        actual_seq_kvlen=bounds,
        softmax_layout=LAYOUT,
        **masking(causal, q.device),
    )
    return {
        name: part.view(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2)
        for (name, x), part in zip(arguments.items(), found, strict=False)
        if name in needs
    }
