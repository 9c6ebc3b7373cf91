"""Calls of the sizes that only some kernels take: a head dimension of 512, indexers of 128."""

from __future__ import annotations

from typing import Any

import torch

from kreg.registry.ops.sparse_attention import random_indices, ready

from .judge import generator


def sparse(
    queries: int,
    ratio: int = 0,
    *,
    selected: int = 0,
    heads: int = 64,
    dtype: torch.dtype = torch.float64,
    batch: int = 1,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A call of `sparse_attention` as DeepSeek-V4's layers make it: entries of whole ratios, indices of ready ones.

    Of the ready entries a fifth is not named, and the slots for those are anywhere in the row.
    """
    g, dim = generator(seed), 512

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    arguments = {
        "q": make(batch, heads, queries, dim),
        "kv": make(batch, queries, dim),
        "sinks": make(heads),
        "scale": dim**-0.5,
        "window": 128,
        "ratio": ratio,
    }
    if ratio:
        entries = queries // ratio
        arguments["compressed"] = make(batch, entries, dim)
        if selected:
            shape = (batch, queries, selected)
            indices = random_indices(shape, torch.int64, g, arguments)
            known = torch.cat([ready(queries, entries, ratio=ratio, offset=0, device=indices.device)], -1)
            known = torch.cat([known, known.new_zeros(queries, 1)], dim=-1).expand(batch, -1, -1)
            arguments["indices"] = indices.masked_fill(~known.gather(-1, indices % (entries + 1)), -1)
    return arguments | more


def indexer(
    queries: int,
    entries: int,
    topk: int,
    ratio: int = 1,
    *,
    heads: int = 3,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A call of `lightning_indexer` over keys of dimension 128."""
    g = generator(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "q": make(batch, queries, heads, 128),
        "k": make(batch, entries, 128),
        "weights": make(batch, queries, heads),
        "scale": 128**-0.5,
        "topk": topk,
        "ratio": ratio,
    } | more
