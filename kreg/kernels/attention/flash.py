"""``attention`` by the flash-attn package, for what PyTorch's own FlashAttention has not: a soft cap.

Signature, alignment and windows: flash_attn_func's documentation in flash-attn 2.6. It is called by its public name, so
the gradient runs the forward again, under its own autograd.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from kreg.kernels.attention.cuda import dense, sides
from kreg.kernels.attention.flex import as_the_op_stores


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
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse; causal masks and windows are aligned at the last query and key."""
    left, right = sides(causal, window)
    out, lse, _ = importlib.import_module("flash_attn").flash_attn_func(
        *(dense(x.transpose(1, 2)) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        window_size=tuple(-1 if side is None else side for side in (left, right)),
        softcap=softcap,
        return_attn_probs=True,
    )
    return as_the_op_stores(out.transpose(1, 2)), lse
