"""``attention`` by PyTorch's own fused CPU kernel, where nothing but a causal mask is asked."""

from __future__ import annotations

from typing import Any

import torch


def per_head(x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Tensor [batch, heads, rows, dim] with each head repeated, rows dense as torch needs them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def stored_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x``, copied if its strides are not those of ``like``."""
    return x if x.stride() == like.stride() else like.copy_(x)


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
        per_head(q), per_head(k, groups), per_head(v, groups), 0.0, causal, scale=scale
    )
    batch, heads, queries, dim = q.shape
    by_position = out.new_empty(batch, queries, heads, dim).transpose(1, 2)
    return stored_as(out, by_position), stored_as(lse, lse.new_empty(batch, heads, queries))


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
    grad = grads[0]
    if grad is None:
        return {name: torch.zeros_like(x) for name, x in arguments.items() if name in needs}
    groups = q.shape[1] // k.shape[1]
    rows = (per_head(grad), per_head(q), per_head(k, groups), per_head(v, groups))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *rows, *outputs, 0.0, causal, scale=scale
    )
    return {
        name: part if part.shape == x.shape else part.unflatten(1, (-1, groups)).sum(2)
        for (name, x), part in zip(arguments.items(), found, strict=True)
        if name in needs
    }
