"""``sparse_attention`` by MindSpeed's ``npu_sparse_attn_shared_kv`` (SAS), a function that differentiates itself.

It takes positions before batch, [S, B, N, D]; inside it turns them to [B, S, N, D], so a transposed view costs nothing.

What its documentation leaves open is not relied on:

- Where -1 may stand among the indices ("invalid places are filled with -1"). They stand behind the valid ones, so it
  is right whether a kernel skips them or ends a row at the first. There is no entry to write in their stead: where all
  are ready every one would be read.
- Whether the causal bound of the compressed entries (``cmp_mask_mode=3``) holds for entries that are named, too.
  The op's indices come from an indexer of the same ratio, which names none that is not ready: both readings agree.
- How many indices a row may have: CANN documents 512 and 1024, so that many are given.

It has the lse, and keeps it. The op's second result is NaN here; nothing in kreg reads it but a kernel's own gradient,
and that of this one is autograd's, through the function run again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kreg.kernels.attention.npu_fusion import packed
from kreg.registry.ops.attention import accumulation_dtype

SLOTS = (512, 1024)
"""Indices of a row."""


def function() -> Callable[..., torch.Tensor]:
    """MindSpeed's own."""
    module = importlib.import_module("mindspeed.ops.npu_sparse_attn_shared_kv")
    found: Callable[..., torch.Tensor] = module.npu_sparse_attn_shared_kv
    return found


def valid_first(indices: torch.Tensor) -> torch.Tensor:
    """The indices, int32, with -1 only behind the others, in as many slots as are documented.

    Raises:
        ValueError: more indices than there are slots.
    """
    selected = indices.shape[-1]
    slots = next((n for n in SLOTS if n >= selected), None)
    if slots is None:
        raise ValueError(f"npu_sparse_attn_shared_kv: {selected} indices a query; it takes up to {SLOTS[-1]}")
    ordered = indices.clamp(min=-1).to(torch.int32).sort(dim=-1, descending=True).values
    return F.pad(ordered, (0, slots - selected), value=-1)


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: None = None,
    *,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the op; NaN for its lse."""
    assert sinks is not None
    out = function()(
        q.permute(2, 0, 1, 3),
        kv.transpose(0, 1),
        None if compressed is None else compressed.transpose(0, 1),
        None if indices is None else valid_first(indices),
        sinks.to(accumulation_dtype(q.dtype)),
        scale,
        ratio or 1,
        ori_mask_mode=4,
        cmp_mask_mode=3,
        ori_win_left=window - 1,
        ori_win_right=0,
    )
    lse = q.new_full(q.shape[:3], float("nan"), dtype=accumulation_dtype(q.dtype))
    return packed(out.transpose(0, 1)).transpose(1, 2), lse
