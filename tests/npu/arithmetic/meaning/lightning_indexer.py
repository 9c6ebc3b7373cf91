"""`npu_lightning_indexer` and its gradient.

``score[s, j] = sum_n W[s, n] relu(Q[s, n] . K[j])``; the best ``sparse_count`` of each query. ``sparse_mode`` 3 sees
``j <= T - S + s``, 0 everything. The gradient, at given indices: ``dW = sum_j S dy``, ``dS = relu'(dy W)``,
``dQ = dS gather(K)``, ``dK = scatter_add(dS Q)``.
"""

from __future__ import annotations

from typing import Any

import torch

from . import demand, now, wide

DTYPES = (torch.float16, torch.bfloat16)
COUNTS = (*range(1, 2049), 3072, 4096, 5120, 6144, 7168, 8192)


def checked(query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor) -> None:
    """Shapes, dtypes and layout as the documentation has them."""
    (B, S, N, D), T = query.shape, key.shape[1]
    demand(key.shape == (B, T, 1, D) and weights.shape == (B, S, N), "key is [B, T, 1, D] and weights [B, S, N]")
    demand(query.dtype in DTYPES + now().dtypes, f"query is {query.dtype}")
    demand(query.dtype == key.dtype == weights.dtype, "query, key and weights are of one dtype")
    demand(all(x.is_contiguous() for x in (query, key, weights)), "query, key and weights are contiguous")
    demand(D == 128 and N <= 64, f"the dimension is 128 and there are at most 64 heads, not {D} and {N}")
    demand(B > 0 and S > 0 and T > 0, "nothing may be empty")


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    *,
    actual_seq_lengths_query: None = None,
    actual_seq_lengths_key: None = None,
    block_table: None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = 9223372036854775807,
    next_tokens: int = 9223372036854775807,
    return_value: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices int32 [B, S, 1, sparse_count], and values of that shape in the query's dtype if asked for."""
    checked(query, key, weights)
    demand(layout_query == layout_key == "BSND" and sparse_mode in (0, 3), "layouts BSND, sparse_mode 0 or 3")
    demand(sparse_count in COUNTS, f"sparse_count is {sparse_count}")
    (B, S, N, _), T, acc = query.shape, key.shape[1], wide(query.dtype)
    total = torch.zeros(B, S, T, dtype=acc)
    for n in range(N):
        product = (query[:, :, n].to(acc) @ key[:, :, 0].to(acc).mT).clamp(min=0)
        total += weights[:, :, n].to(acc).unsqueeze(-1) * product
    indices = torch.full((B, S, 1, sparse_count), {"-1": -1, "masked": -1, "zero": 0}[now().missing], dtype=torch.int32)
    values = torch.zeros(B, S, 1, sparse_count, dtype=acc)
    for b in range(B):
        for s in range(S):
            seen = min(T, max(0, T - S + s + 1)) if sparse_mode == 3 else T
            best = total[b, s, :seen].sort(descending=True, stable=True)
            count = min(seen, sparse_count)
            row = best.indices[:count]
            values[b, s, 0, :count] = best.values[:count]
            if now().missing == "masked":
                row = torch.cat([row, torch.arange(seen, T)])[:sparse_count]
            indices[b, s, 0, : len(row)] = row.to(torch.int32)
            if now().shuffled:
                mixed = torch.randperm(sparse_count)
                indices[b, s, 0], values[b, s, 0] = indices[b, s, 0, mixed], values[b, s, 0, mixed]
    return indices, values.to(query.dtype) if return_value else query.new_empty(0)


def gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    dy: torch.Tensor,
    sparse_indices: torch.Tensor,
    weights: torch.Tensor,
    actual_seq_lengths_query: None = None,
    actual_seq_lengths_key: None = None,
    layout: str | None = "BSND",
    sparse_mode: int | None = 3,
    pre_tokens: int | None = 9223372036854775807,
    next_tokens: int | None = 9223372036854775807,
) -> tuple[Any, ...]:
    """Gradients of query, key and weights."""
    checked(query, key, weights)
    (B, S, N, _), T, K, acc = query.shape, key.shape[1], dy.shape[-1], wide(query.dtype)
    demand(layout == "BSND" and sparse_mode in (0, 3), "layout BSND, sparse_mode 0 or 3")
    demand(dy.shape == sparse_indices.shape == (B, S, K), f"dy is {list(dy.shape)}, the indices {sparse_indices.shape}")
    demand(dy.dtype == query.dtype and sparse_indices.dtype == torch.int32, "dy is of the query's dtype, indices int32")
    demand(dy.is_contiguous() and sparse_indices.is_contiguous(), "dy and the indices are contiguous")
    demand((N == 64 and K == 2048 and T >= K) or now().dtypes != (), f"documented: 64 heads, top 2048; not {N}, {K}")
    demand(bool((sparse_indices >= 0).all() & (sparse_indices < T).all()), "what -1 means here is not documented")
    dq, dk, dw = (torch.zeros(x.shape, dtype=acc) for x in (query, key, weights))
    for b in range(B):
        for s in range(S):
            named = sparse_indices[b, s].long()
            gathered, up = key[b, named, 0].to(acc), dy[b, s].to(acc)
            product = query[b, s].to(acc) @ gathered.mT  # [N, K]
            dw[b, s] = (product.clamp(min=0) * up).sum(-1)
            ds = torch.where(product > 0, weights[b, s].to(acc).unsqueeze(-1) * up, 0.0)
            dq[b, s] = ds @ gathered
            dk[b, :, 0].index_add_(0, named, ds.mT @ query[b, s].to(acc))
    return tuple(x.to(query.dtype) for x in (dq, dk, dw))


OPERATORS = {"npu_lightning_indexer": forward, "npu_lightning_indexer_grad": gradient}
