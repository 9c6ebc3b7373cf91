"""``sparse_attention`` by MindSpeed's ``npu_sparse_attn_shared_kv`` (SAS), a function that differentiates itself.

It takes positions before batch, [S, B, N, D]; inside it turns them to [B, S, N, D], so a transposed view costs nothing.

What its documentation leaves open is not relied on, or found out:

- Where -1 may stand among the indices ("invalid places are filled with -1"). They stand behind the valid ones, so the
  output is right whether a kernel skips them or ends a row at the first.
- Whether the gradient's kernel knows -1 (it is reported to read out of range). It gets none: see `backward`.
- Whether the causal bound of the compressed entries (``cmp_mask_mode=3``) holds for entries that are named, too.
  The op's indices come from an indexer of the same ratio, which names none that is not ready: the output is the same.
  The gradient needs the bound, as CANN's formula has it, and is NaN rather than wrong where a kernel has it not.
- How many indices a row may have: CANN documents 512 and 1024, so that many are given.

It has the lse, and keeps it. The op's second result is NaN here; nothing in kreg reads it but a kernel's own gradient,
and that of this one is autograd's, through the function run again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kreg.kernels.attention.npu import zeros
from kreg.kernels.attention.npu_fusion import packed
from kreg.registry.ops.attention import accumulation_dtype
from kreg.registry.ops.sparse_attention import reference

SLOTS = (512, 1024)
"""Indices of a row."""

SAME = 1 / 16
"""How far two runs of the function may be apart, of the largest output: much more than 16 bits round, much less than an
entry that should not be seen changes the first rows."""


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
    return F.pad(ordered, (0, slots - selected), value=-1).contiguous()


def called(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None,
    indices: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    window: int,
    ratio: int,
) -> torch.Tensor:
    """The function's output as the op has it: [batch, heads, queries, head_dim], stored by position."""
    assert sinks is not None
    out = function()(
        q.permute(2, 0, 1, 3),
        kv.transpose(0, 1),
        None if compressed is None else compressed.transpose(0, 1),
        indices,
        sinks.to(accumulation_dtype(q.dtype)).contiguous(),
        scale,
        ratio or 1,
        ori_mask_mode=4,
        cmp_mask_mode=3,
        ori_win_left=window - 1,
        ori_win_right=0,
    )
    if out.requires_grad:  # what its gradient's kernel takes of strides is not documented
        out.register_hook(torch.Tensor.contiguous)
    return packed(out.transpose(0, 1)).transpose(1, 2)


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
    named = None if indices is None else valid_first(indices)
    out = called(q, kv, compressed, named, sinks, scale=scale, window=window, ratio=ratio)
    return out, q.new_full(q.shape[:3], float("nan"), dtype=accumulation_dtype(q.dtype))


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: None = None,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Autograd's gradients of the function, run again with indices of which none is -1.

    Query s < S - 1 has an entry that is not ready, the first such is number ``(s + 1) // ratio``: it is named instead,
    and the causal bound drops it. That the bound does is seen by the output, which has to be what it was. For the last
    query every entry is ready; its gradient is that of the op's reference, one row, and the function's is 0 there.
    """
    grad = grads[0]
    tensors: dict[str, Any] = {"q": q, "kv": kv, "compressed": compressed, "sinks": sinks}
    if grad is None:
        return zeros(tensors, needs)
    attributes: dict[str, Any] = {"scale": scale, "window": window, "ratio": ratio}
    with torch.enable_grad():
        leaves: dict[str, Any] = {n: x.detach().requires_grad_(n in needs) for n, x in tensors.items() if x is not None}
        wanted = [leaves[name] for name in sorted(needs)]
        if indices is None:
            again = called(**(tensors | leaves), indices=None, **attributes)
            return dict(zip(sorted(needs), torch.autograd.grad(again, wanted, grad), strict=True))
        again = called(**(tensors | leaves), indices=without_minus_one(indices, ratio), **attributes)
        end: dict[str, Any] = leaves | {"q": leaves["q"][:, :, -1:], "indices": indices[:, -1:]}
        last, _ = reference(**end, **attributes, offset=q.shape[2] - 1)
        of_last = torch.arange(q.shape[2], device=q.device).unsqueeze(1) == q.shape[2] - 1
        found = torch.autograd.grad([again, last], wanted, [grad.masked_fill(of_last, 0.0), grad[:, :, -1:]])
    difference = (again.detach() - outputs[0]).masked_fill(of_last, 0.0).abs().amax()
    bounded = difference <= SAME * outputs[0].abs().amax()
    return {n: torch.where(bounded, x, float("nan")) for n, x in zip(sorted(needs), found, strict=True)}


def without_minus_one(indices: torch.Tensor, ratio: int) -> torch.Tensor:
    """The indices as `valid_first` has them, with the first entry that is not ready for -1, and 0 in the last row."""
    row = torch.arange(1, indices.shape[1] + 1, device=indices.device).unsqueeze(1)
    unready = torch.where(row == indices.shape[1], 0, row // ratio).to(torch.int32)
    named = valid_first(indices)
    return torch.where(named < 0, unready, named)
