"""`npu_sparse_flash_attention` and its gradient, in the one attention_mode there is: keys that are the values too.

``softmax(scale [Q, Q_rope] [K, K_rope]^T) K`` over the entries that a row of indices names; one that is named twice is
gathered twice. -1 behind them is documented forward and not backward: it is not taken here. ``sparse_mode`` 0 adds no
causal mask. Limits of A2 and A3: no sinks, heads a power of two to 128, D 512 and 64; of the gradient (CANN's
aclnnSparseFlashAttentionGrad): 2048 indices a row.
"""

from __future__ import annotations

from typing import Any

import torch

from . import demand, now, wide

DTYPES = (torch.float16, torch.bfloat16)


def rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sparse_indices: torch.Tensor,
    query_rope: torch.Tensor | None,
    key_rope: torch.Tensor | None,
    sparse_block_size: int,
    sparse_mode: int | None,
    attention_mode: int | None,
) -> list[tuple[int, int, torch.Tensor]]:
    """(batch, position, the entries it names), after the checks."""
    (B, S, N, D), T = query.shape, key.shape[1]
    demand((sparse_mode, attention_mode, sparse_block_size) == (0, 2, 1), "the mode that is read here")
    demand(D == 512 and N in (1, 2, 4, 8, 16, 32, 64, 128), f"D is 512 and N a power of two to 128, not {D} and {N}")
    demand(key.shape == (B, T, 1, D) and value is not None and torch.equal(key, value), "one head, keys = values")
    assert query_rope is not None and key_rope is not None
    demand(query_rope.shape == (B, S, N, 64) and key_rope.shape == (B, T, 1, 64), "the rope parts are 64 wide")
    demand(query.dtype in DTYPES + now().dtypes, f"query is {query.dtype}")
    tensors = (query, key, query_rope, key_rope)
    demand(len({x.dtype for x in tensors}) == 1, "queries, keys and their rope parts are of one dtype")
    demand(all(x.is_contiguous() for x in (*tensors, sparse_indices)), "everything is contiguous")
    demand(sparse_indices.dtype == torch.int32, f"indices are int32, not {sparse_indices.dtype}")
    demand(sparse_indices.shape == (B, S, 1, 2048), f"indices are [B, S, 1, 2048], not {list(sparse_indices.shape)}")
    found = []
    for b in range(B):
        for s in range(S):
            row = sparse_indices[b, s, 0]
            demand(bool((row >= 0).all() & (row < T).all()), f"an index is not in 0 to {T - 1}")
            found.append((b, s, row.long()))
    return found


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sparse_indices: torch.Tensor,
    scale_value: float,
    *,
    block_table: None = None,
    actual_seq_lengths_query: None = None,
    actual_seq_lengths_kv: None = None,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = 9223372036854775807,
    next_tokens: int = 9223372036854775807,
    attention_mode: int = 0,
    return_softmax_lse: bool = False,
    sinks: None = None,
) -> tuple[torch.Tensor, ...]:
    """Output [B, S, N, D], and the softmax's maximum and sum [B, 1, S, N]."""
    demand(layout_query == layout_kv == "BSND" and return_softmax_lse, "layouts BSND, with the softmax's numbers")
    demand(sinks is None, "A2 and A3 take no sinks")
    named = rows(
        query, key, value, sparse_indices, query_rope, key_rope, sparse_block_size, sparse_mode, attention_mode
    )
    assert query_rope is not None and key_rope is not None
    (B, S, N, _), acc = query.shape, wide(query.dtype)
    out = query.new_empty(query.shape)
    largest, total = torch.empty(2, B, 1, S, N, dtype=acc)
    for b, s, entries in named:
        q = torch.cat([query[b, s], query_rope[b, s]], dim=-1).to(acc)
        k = torch.cat([key[b, entries, 0], key_rope[b, entries, 0]], dim=-1).to(acc)
        scores = scale_value * (q @ k.mT)
        largest[b, 0, s] = scores.amax(-1)
        p = (scores - largest[b, 0, s].unsqueeze(-1)).exp()
        total[b, 0, s] = p.sum(-1)
        out[b, s] = ((p / p.sum(-1, keepdim=True)) @ key[b, entries, 0].to(acc)).to(out.dtype)
    return out, largest, total


def gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    sparse_indices: torch.Tensor,
    d_out: torch.Tensor,
    out: torch.Tensor,
    softmax_max: torch.Tensor,
    softmax_sum: torch.Tensor,
    scale_value: float,
    sparse_block_size: int,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    actual_seq_qlen: None = None,
    actual_seq_kvlen: None = None,
    layout: str | None = "BSND",
    sparse_mode: int | None = 3,
    pre_tokens: int | None = 9223372036854775807,
    next_tokens: int | None = 9223372036854775807,
    attention_mode: int | None = 0,
) -> tuple[Any, ...]:
    """Of queries, of keys as keys, of keys as values, and of the rope parts."""
    named = rows(
        query, key, value, sparse_indices, query_rope, key_rope, sparse_block_size, sparse_mode, attention_mode
    )
    assert query_rope is not None and key_rope is not None
    (B, S, N, D), acc = query.shape, wide(query.dtype)
    for x in (softmax_max, softmax_sum):
        demand(
            x.shape == (B, 1, S, N) and x.dtype == acc and x.is_contiguous(), "the softmax's are float32 [B, 1, S, N]"
        )
    demand(d_out.shape == out.shape == query.shape and d_out.dtype == out.dtype == query.dtype, "d_out and out")
    full = torch.zeros(B, S, N, D + 64, dtype=acc), torch.zeros(B, key.shape[1], 1, D + 64, dtype=acc)
    (dq, dk), dv = full, torch.zeros(key.shape, dtype=acc)
    for b, s, entries in named:
        q = torch.cat([query[b, s], query_rope[b, s]], dim=-1).to(acc)
        k = torch.cat([key[b, entries, 0], key_rope[b, entries, 0]], dim=-1).to(acc)
        p = (scale_value * (q @ k.mT) - softmax_max[b, 0, s].unsqueeze(-1)).exp() / softmax_sum[b, 0, s].unsqueeze(-1)
        up = d_out[b, s].to(acc)
        ds = p * (up @ key[b, entries, 0].to(acc).mT - (up * out[b, s].to(acc)).sum(-1, keepdim=True))
        dq[b, s] = scale_value * (ds @ k)
        dk[b, :, 0].index_add_(0, entries, scale_value * (ds.mT @ q))
        dv[b, :, 0].index_add_(0, entries, p.mT @ up)
    parts = (dq[..., :D], dk[..., :D], dv, dq[..., D:], dk[..., D:])
    return tuple(x.to(query.dtype).contiguous() for x in parts)


OPERATORS = {"npu_sparse_flash_attention": forward, "npu_sparse_flash_attention_grad": gradient}
