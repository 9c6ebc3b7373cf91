"""``selected_attention`` by torch_npu's ``npu_fusion_attention``, dense: the selection becomes its mask tensor.

torch_npu has no attention over selected keys that fits this op: ``npu_sparse_flash_attention`` takes one head of keys
that are the values too, ``npu_nsa_select_attention`` 16 blocks of 64 keys and no causal mask.
"""

from __future__ import annotations

from typing import Any

import torch

from kreg.kernels.attention import npu_masked as masked
from kreg.registry.ops.selected_attention import named


def selected(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, block: int) -> torch.Tensor:
    """The selection as a mask: bool [batch, 1|heads, queries, keys]."""
    mask, index_heads = named(indices, k.shape[2], block), indices.shape[1]
    return mask if index_heads == 1 else mask.repeat_interleave(q.shape[1] // index_heads, dim=1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, *, block: int = 1, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    return masked.forward(q, k, v, mask=selected(q, k, indices, block), **more)


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    block: int = 1,
    **more: Any,
) -> dict[str, torch.Tensor]:
    """Its gradients."""
    mask = selected(q, k, indices, block)
    return masked.backward(grads, outputs, needs, q=q, k=k, v=v, mask=mask, **more)
