"""LI. Signature: MindSpeed core 0.17. Meaning and limits: CANN's documentation of LightningIndexer and of its gradient.

``score[s, j] = sum_n weights[s, n] * relu(query[s, n] . key[j])``; with ``sparse_mode`` 3 query s of S sees keys
``j < floor((T * cmp_ratio - S + s + 1) / cmp_ratio)``: the causal bound, counted back from the last key.
"""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

from ..readings import demand, now

COUNTS = (*range(1, 2049), 3072, 4096, 5120, 6144, 7168, 8192)


def npu_lightning_indexer(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: torch.Tensor,
    layout: str = "BSND",
    cu_seq_lens_q: None = None,
    cu_seq_lens_k: None = None,
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = 2**63 - 1,
    next_tokens: int = 2**63 - 1,
    cmp_ratio: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, S, N, D], key [B, T, 1, D], weights [B, S, N] to indices int32 and values, both [B, S, 1, K]."""
    demand(query.dim() == 4 and key.dim() == 4, "query is [B, S, N, D] and key [B, T, 1, D]")
    B, S, N, D = query.shape
    T = key.shape[1]
    demand(query.dtype in now().dtypes, f"query is {query.dtype}")
    demand(key.shape == (B, T, 1, D) and weights.shape == (B, S, N), "key is [B, T, 1, D] and weights [B, S, N]")
    demand(query.dtype == key.dtype == weights.dtype, "query, key and weights are of one dtype")
    demand(all(x.is_contiguous() for x in (query, key, weights)), "query, key and weights are contiguous")
    demand(D == 128 and N <= 64, f"the dimension is 128 and there are at most 64 heads, not {D} and {N}")
    demand(sparse_count in COUNTS, f"sparse_count is {sparse_count}")
    demand(layout == "BSND" and sparse_mode == 3, "layout is BSND and sparse_mode 3")
    demand(pre_tokens == next_tokens == 2**63 - 1, "pre_tokens and next_tokens are left as they are")
    demand(cu_seq_lens_q is None and cu_seq_lens_k is None, "there are no packed lengths")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    products = torch.einsum("bsnd,btd->bsnt", query.to(wide), key.squeeze(2).to(wide)).relu()
    scores = torch.einsum("bsnt,bsn->bst", products, weights.to(wide))
    bound = (torch.arange(S, device=query.device) + 1 + T * cmp_ratio - S) // cmp_ratio
    ready = torch.arange(T, device=query.device) < bound.unsqueeze(1)
    order = scores.masked_fill(~ready, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    picks = torch.cat([order, order.new_zeros(B, S, max(0, sparse_count - T))], dim=-1)[..., :sparse_count]
    values = scores.gather(-1, picks)
    here = (torch.arange(sparse_count, device=query.device) < bound.clamp(min=0).unsqueeze(1)).expand_as(picks)
    if now().missing != "masked":
        picks = torch.where(here, picks, -1 if now().missing == "-1" else 0)
    values = torch.where(here, values, 0.0)  # what it writes there is not documented either
    if now().shuffled and not isinstance(query, FakeTensor):
        mixed = torch.randperm(sparse_count, device=query.device)
        picks, values = picks[..., mixed], values[..., mixed]
    return picks.unsqueeze(2).to(torch.int32), values.unsqueeze(2).to(query.dtype)
