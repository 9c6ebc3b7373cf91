"""``attention`` by cuDNN, through PyTorch: what is fastest on Hopper and Blackwell for plain causal attention.

Its causal mask begins at the first query and key. cuda.yaml asks for as many of the one as of the other, and for what
torch's own checks ask for besides (``sdp_utils``: head dimension, lengths above 1).
"""

from __future__ import annotations

from typing import Any

import torch

from kreg.kernels.attention.cuda import dense, finished, zeros


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: None = None,
    mask: None = None,
    sinks: None = None,
    padding: None = None,
    documents: None = None,
    *,
    scale: float,
    causal: bool = False,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(dense(x) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return finished(out, lse.view(q.shape[:3]), None)


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
    """Gradients from the saved output and lse."""
    grad, (out, lse) = grads[0], outputs
    if grad is None:
        return zeros({"q": q, "k": k, "v": v}, needs)
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
    parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(dense(x) for x in (grad, q, k, v)),
        out,
        lse.unsqueeze(-1),
        seed,
        seed,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )
    return {name: part for name, part in zip("qkv", parts, strict=True) if name in needs}
