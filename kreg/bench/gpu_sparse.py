"""``sparse_attention`` and ``lightning_indexer`` in ``kreg bench --device cuda``: their work and their arguments."""

from __future__ import annotations

from typing import Any

import torch

from kreg.bench.gpu_case import Case, band


def pairs(case: Case) -> int:
    """Pairs of a query and a key (or entry) that have to be multiplied, in one sequence; counted, not estimated."""
    if case.op == "lightning_indexer":
        return sum(queries * count for queries, count in case.ready())
    most = case.selected if case.layer == "selected" else case.entries
    return band(case, case.sizes.window) + sum(queries * min(count, most) for queries, count in case.ready())


def work(case: Case, element: int) -> tuple[float, float]:
    """Floating-point operations that cannot be avoided, and bytes that have to be read or written once.

    A forward has two products for each pair that is kept, a backward five; an indexer has one. Queries are read and
    results written; keys, entries and indices are read once, those that are seen. A backward reads the results too,
    and writes the gradients of what was read.

    Args:
        element: bytes of one number.
    """
    s, batch = case.sizes, case.batch
    if case.op == "lightning_indexer":
        operations = 2.0 * batch * s.index_heads * s.index_dim * pairs(case)
        rows = case.queries * s.index_heads * (s.index_dim + 1) * element
        return operations, float(
            batch * (rows + case.entries * s.index_dim * element + case.queries * case.selected * 8)
        )
    products = 5 if case.step == "backward" else 2
    operations = 2.0 * products * batch * s.heads * s.head_dim * pairs(case)
    row = case.queries * s.heads * s.head_dim * element
    seen = min(case.entries, case.queries * case.selected) if case.layer == "selected" else case.entries
    keys = (min(case.context, case.queries + s.window - 1) + seen) * s.head_dim * element
    picks = case.queries * case.selected * 8 if case.layer == "selected" else 0
    rows_moved, keys_moved = (4, 2) if case.step == "backward" else (2, 1)
    return operations, float(batch * (rows_moved * row + keys_moved * keys + picks))


def arguments(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Random arguments of the case's op, standard normal; indices are distinct and ready.

    In a decoding step ``kv`` holds the window alone, as a cache does, unless the op has to count positions from the
    first to know which entries are ready.
    """
    g = torch.Generator(device).manual_seed(seed)
    s, batch, queries = case.sizes, case.batch, case.queries

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    if case.op == "lightning_indexer":
        return {
            "q": normal(batch, queries, s.index_heads, s.index_dim),
            "k": normal(batch, case.entries, s.index_dim),
            "weights": normal(batch, queries, s.index_heads),
            "scale": s.index_dim**-0.5,
            "topk": case.selected,
            "ratio": case.ratio,
            "offset": case.context - queries,
        }
    whole = not case.decodes or case.layer == "compressed"
    keys = case.context if whole else min(case.context, s.window)
    made: dict[str, Any] = {
        "q": normal(batch, queries, s.heads, s.head_dim).transpose(1, 2),
        "kv": normal(batch, keys, s.head_dim),
        "sinks": normal(s.heads),
        "scale": s.head_dim**-0.5,
        "window": s.window,
        "ratio": case.ratio if whole else 0,  # a position in the window says nothing about which entries are ready
        "offset": keys - queries,
    }
    if case.ratio:
        made["compressed"] = normal(batch, case.entries, s.head_dim)
    if case.layer == "selected":
        made["indices"] = picks(case, g, device)
    return made


def picks(case: Case, g: torch.Generator, device: str) -> torch.Tensor:
    """Random distinct ready entries, int64 [batch, queries, selected], ascending as if sorted, -1 where too few are."""
    first, parts = case.context - case.queries, []
    step = max(1, 2**24 // max(1, case.entries))
    entry = torch.arange(case.entries, device=device)
    for start in range(0, case.queries, step):
        position = torch.arange(start, min(case.queries, start + step), device=device) + first
        is_ready = (entry + 1) * case.ratio <= position.unsqueeze(1) + 1
        for _ in range(case.batch):
            drawn = torch.rand(is_ready.shape, generator=g, device=device).masked_fill(~is_ready, -1.0)
            best = drawn.topk(case.selected, dim=-1)
            parts.append(best.indices.masked_fill(best.values < 0, -1).sort(dim=-1).values)
    rows = [torch.cat(parts[b :: case.batch]) for b in range(case.batch)]
    return torch.stack(rows)
