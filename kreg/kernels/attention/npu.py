"""``attention`` by torch_npu's ``npu_fusion_attention``, where the mask is proven and costs no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kreg.kernels.attention import npu_fusion as fusion


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    offset: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op. Under these masks every query keeps a key: its own position's, or key 0."""
    masking = fusion.band(q.shape[2], k.shape[2], causal=causal, window=window, offset=offset, device=q.device)
    out, largest, total = fusion.forward(q, k, v, masking, scale=scale, sinks=sinks)
    return out, fusion.packed(largest + total.log())


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    offset: int = 0,
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """Gradients by ``npu_fusion_attention_grad``, from the saved output and lse."""
    (out, lse), grad = outputs, grads[0]
    arguments = {"q": q, "k": k, "v": v, "sinks": sinks}
    if grad is None:
        return zeros(arguments, needs)
    masking = fusion.band(q.shape[2], k.shape[2], causal=causal, window=window, offset=offset, device=q.device)
    found = fusion.backward(grad, q, k, v, out, lse, None, masking, scale=scale, sinks=sinks)
    return {name: getattr(found, name) for name in arguments if name in needs}


def zeros(arguments: Mapping[str, torch.Tensor | None], needs: frozenset[str]) -> dict[str, torch.Tensor]:
    """The gradients of what has no influence."""
    return {name: torch.zeros_like(x) for name, x in arguments.items() if name in needs and x is not None}
