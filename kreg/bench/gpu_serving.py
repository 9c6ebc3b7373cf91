"""``sparse_mqa_sink`` and ``indexer_topk`` in ``kreg bench --device cuda``: decoding steps of several requests."""

from __future__ import annotations

from typing import Any

import torch

from kreg.bench.gpu_case import Case


def slots(case: Case) -> int:
    """Slots that a token selects: its window, and the entries that the indexer picks for it."""
    return min(case.sizes.window, case.context) + case.selected


def pairs(case: Case) -> int:
    """Pairs of one token and a slot, or an entry that is scored."""
    return slots(case) if case.op == "sparse_mqa_sink" else case.entries


def work(case: Case, element: int) -> tuple[float, float]:
    """Floating-point operations that cannot be avoided, and bytes that have to be read or written once.

    Queries are read and results written; of the pages, only slots that are selected, or entries that are scored.

    Args:
        element: bytes of one number; indices are of 4.
    """
    s, tokens = case.sizes, case.batch
    if case.op == "indexer_topk":
        row = s.index_heads * (s.index_dim + 1) * element
        moved = tokens * (row + case.entries * s.index_dim * element + case.selected * 4)
        return 2.0 * tokens * s.index_heads * s.index_dim * pairs(case), float(moved)
    row = 2 * s.heads * s.head_dim * element
    moved = tokens * (row + slots(case) * (s.head_dim * element + 4))
    return 4.0 * tokens * s.heads * s.head_dim * pairs(case), float(moved)


def arguments(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Random arguments, standard normal: a token of each request, whose pages lie anywhere."""
    g = torch.Generator(device).manual_seed(seed)
    s, tokens = case.sizes, case.batch

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    if case.op == "indexer_topk":
        pages = -(-case.entries // s.page)
        order = torch.randperm(tokens * pages, generator=g, device=device)
        return {
            "q": normal(tokens, s.index_heads, s.index_dim),
            "kv": normal(tokens * pages, s.page, s.index_dim),
            "weights": normal(tokens, s.index_heads) * s.index_dim**-0.5,
            "positions": torch.full((tokens,), case.context - 1, dtype=torch.int32, device=device),
            "requests": torch.arange(tokens, dtype=torch.int32, device=device),
            "lengths": torch.full((tokens,), case.entries, dtype=torch.int32, device=device),
            "block_table": order.to(torch.int32).view(tokens, pages),
            "topk": case.selected,
            "ratio": case.ratio,
        }
    pages = -(-(min(s.window, case.context) + case.entries) // s.page)
    drawn = torch.rand(tokens, pages * s.page, generator=g, device=device)
    own = drawn.topk(slots(case), dim=-1).indices.sort(dim=-1).values
    first = torch.arange(tokens, device=device).unsqueeze(1) * pages * s.page
    return {
        "q": normal(tokens, s.heads, s.head_dim),
        "kv": normal(tokens * pages, s.page, s.head_dim),
        "topk_indices": (own + first).to(torch.int32),
        "attn_sink": normal(s.heads),
        "scale": s.head_dim**-0.5,
    }
