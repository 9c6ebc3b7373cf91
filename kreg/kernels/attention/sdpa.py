"""``attention`` by PyTorch's own fused CPU kernel, where nothing but a causal mask is asked."""

from __future__ import annotations

from typing import Any

import torch


def per_head(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Keys or values [batch, kv_heads, keys, dim], one copy for each query head."""
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: None = None,
    mask: None = None,
    sinks: None = None,
    *,
    scale: float,
    causal: bool = False,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse; torch's causal mask, ``t <= s``, is the op's for offset 0."""
    groups = q.shape[1] // k.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, per_head(k, groups), per_head(v, groups), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


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
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """Gradients of q, k and v; those of a shared key head are summed over its query heads."""
    arguments = {"q": q, "k": k, "v": v}
    grad, (out, lse) = grads[0], outputs
    if grad is None:
        return {name: torch.zeros_like(x) for name, x in arguments.items() if name in needs}
    groups = q.shape[1] // k.shape[1]
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, per_head(k, groups), per_head(v, groups), out, lse, 0.0, causal, scale=scale
    )
    return {
        name: part if part.shape == x.shape else part.unflatten(1, (-1, groups)).sum(2)
        for (name, x), part in zip(arguments.items(), found, strict=True)
        if name in needs
    }
