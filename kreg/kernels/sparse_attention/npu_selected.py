"""``sparse_attention`` by torch_npu's ``npu_sparse_flash_attention`` (SFA): only what a query sees is read.

SFA attends to entries of one shared head of dimension 512 that its indices name, and adds the scores of a further
part of dimension 64, which it requires. Here the window's keys and the compressed entries are the shared head, one
after the other, the indices name the window's positions and the selected entries, and the further part is 0.

What torch_npu's documentation leaves open is not relied on:

- Where -1 may stand among indices, and whether the gradient knows it. None is given: what names nothing names one more
  entry, of zeros, whose further part makes its score so low that its weight is 0 (`NOWHERE`), once or many times.
- How many indices a row may have. The gradient is documented for 2048; that many are given, forward and backward.
- Sinks, which A2 and A3 do not take: the output is scaled by their share of the softmax's denominator. The gradient's
  operator computes ``exp(s - maximum) / sum`` with what it is given, and so is given the whole denominator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kreg.kernels.attention.npu import zeros
from kreg.kernels.attention.npu_fusion import laid_out, operators, packed
from kreg.kernels.attention.npu_masked import NEVER
from kreg.kernels.sparse_attention.npu import every_key, gathered
from kreg.registry.ops.attention import accumulation_dtype
from kreg.registry.ops.sparse_attention import ready

SLOTS = 2048
"""Indices of a row."""

ROPE = 64
"""Dimension of the further part of queries and keys."""

NOWHERE = (64.0, -32768.0)
"""First numbers of a query's further part and of that of the entry that stands for none: exact in 16 bits, and with a
scale of 0.001 a score of -2097, whose weight beside any other is 0 in float32."""

MODE = {"sparse_mode": 0, "attention_mode": 2}
"""Indices as they are, with no causal mask on top; keys that are the values too."""


def named(
    queries: int,
    kv: torch.Tensor,
    compressed: torch.Tensor | None,
    indices: torch.Tensor | None,
    padding: torch.Tensor | None,
    *,
    window: int,
    ratio: int,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query sees, as places in the shared head, int32 [batch, queries, 1, 2048], the place behind its end for
    nothing; and which queries see nothing, bool [batch, queries].
    """
    batch, keys, device = kv.shape[0], kv.shape[1], kv.device
    position = torch.arange(offset, offset + queries, device=device).unsqueeze(1)
    near = position - torch.arange(min(window, queries + max(offset, 0)), device=device)
    valid = (near >= 0) & (near < keys)
    near, valid = near.expand(batch, -1, -1), valid.expand(batch, -1, -1)
    if padding is not None:
        kept = padding.unsqueeze(1).expand(-1, queries, -1)
        valid = valid & kept.gather(2, near.clamp(0, keys - 1))
    parts = [torch.where(valid, near, -1)]
    if compressed is not None:
        if indices is None:
            entries = torch.arange(compressed.shape[1], device=device).expand(batch, queries, -1)
            far = ready(queries, compressed.shape[1], ratio=ratio, offset=offset, device=device)
            parts.append(torch.where(far, entries + keys, -1))
        else:
            parts.append(torch.where(indices >= 0, indices + keys, -1))
    found = torch.cat(parts, dim=-1)
    absent, end = found < 0, keys + (0 if compressed is None else compressed.shape[1])
    found = F.pad(torch.where(absent, end, found), (0, SLOTS - found.shape[-1]), value=end)
    return found.to(torch.int32).unsqueeze(2), absent.all(-1)


def halves(q: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries and keys, with the entry that stands for none behind them, and their further parts."""
    query, key = laid_out(q), F.pad(laid_out(keys), (0, 0, 0, 0, 0, 1))
    query_rope, key_rope = (x.new_zeros(*x.shape[:3], ROPE) for x in (query, key))
    query_rope[..., 0], key_rope[:, -1, :, 0] = NOWHERE
    return {"query": query, "key": key, "value": key, "query_rope": query_rope, "key_rope": key_rope}


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    *,
    scale: float,
    **places: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    names, blank = named(q.shape[2], kv, compressed, indices, padding, **places)
    tensors = halves(q, every_key(kv, compressed))
    out, largest, total = operators().npu_sparse_flash_attention(
        **tensors,
        sparse_indices=names,
        scale_value=scale,
        sparse_block_size=1,
        return_softmax_lse=True,
        **MODE,
    )
    lse = (largest + total.log()).squeeze(1).transpose(1, 2)  # of [batch, 1, queries, heads]
    rows = blank.unsqueeze(1)
    lse = lse.masked_fill(rows, float("-inf"))
    out = out.transpose(1, 2)
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_((lse - whole).exp().unsqueeze(-1).to(accumulation_dtype(out.dtype)))
        lse = whole
    return out.masked_fill_(rows.unsqueeze(-1), 0.0), packed(lse)


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
    padding: torch.Tensor | None = None,
    scale: float,
    **places: Any,
) -> dict[str, torch.Tensor]:
    """Gradients by ``npu_sparse_flash_attention_grad``, from the saved output and lse."""
    (out, lse), grad = outputs, grads[0]
    if grad is None:
        return zeros({"q": q, "kv": kv, "compressed": compressed, "sinks": sinks}, needs)
    results: dict[str, torch.Tensor] = {}
    if "sinks" in needs and sinks is not None:
        share = (sinks.to(lse.dtype)[:, None] - lse).exp()
        results["sinks"] = -(share * (grad.to(lse.dtype) * out).sum(-1)).sum((0, 2))
    if not needs - {"sinks"}:
        return results
    names, blank = named(q.shape[2], kv, compressed, indices, padding, **places)
    largest = lse.masked_fill(blank.unsqueeze(1), NEVER).transpose(1, 2).unsqueeze(1).contiguous()
    tensors = halves(q, every_key(kv, compressed))
    dq, dk, dv, *_ = operators().npu_sparse_flash_attention_grad(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        names,
        laid_out(grad),
        laid_out(out),
        largest,
        torch.ones_like(largest),
        scale,
        1,
        tensors["query_rope"],
        tensors["key_rope"],
        layout="BSND",
        **MODE,
    )
    found = {"q": dq.transpose(1, 2), "k": dk[:, :-1].transpose(1, 2), "v": dv[:, :-1].transpose(1, 2)}
    return results | gathered(found, needs - {"sinks"}, kv)
