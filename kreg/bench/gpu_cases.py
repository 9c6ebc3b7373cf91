"""What ``kreg bench --device cuda`` measures: calls of single ops, at the sizes of DeepSeek-V4-Flash.

Sizes: transformers 5.23's ``DeepseekV4Config``. 64 heads of 512, a window of 128, 512 entries selected, 4 or 128
positions in an entry, an indexer of 64 heads of 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    """What a model fixes."""

    heads: int = 64
    head_dim: int = 512
    window: int = 128
    topk: int = 512
    index_heads: int = 64
    index_dim: int = 128


FLASH = Sizes()
TINY = Sizes(heads=4, head_dim=16, window=8, topk=4, index_heads=2, index_dim=16)

RATIOS = {"sliding": 0, "selected": 4, "compressed": 128}
"""Positions in one compressed entry, by kind of layer; 0: none."""


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: ``sparse_attention`` or ``lightning_indexer``.
        layer: "sliding", "selected" (top-k of entries, and the indexer that picks them) or "compressed" (all ready).
        step: "forward" and "backward" of a prompt, or "decode": one query behind ``context`` positions.
        batch: sequences.
        context: positions, all in all.
        sizes: of the model.
    """

    op: str
    layer: str
    step: str
    batch: int
    context: int
    sizes: Sizes = FLASH

    @property
    def label(self) -> str:
        """For people: "sparse_attention selected forward 1 x 16384"."""
        return f"{self.op} {self.layer} {self.step} {self.batch} x {self.context}"

    @property
    def decodes(self) -> bool:
        """Whether there is one query."""
        return self.step == "decode"

    @property
    def queries(self) -> int:
        """Queries of each sequence."""
        return 1 if self.decodes else self.context

    @property
    def ratio(self) -> int:
        """Positions in one compressed entry."""
        return RATIOS[self.layer]

    @property
    def entries(self) -> int:
        """Compressed entries of each sequence."""
        return self.context // self.ratio if self.ratio else 0

    @property
    def selected(self) -> int:
        """Entries that the indexer picks for each query."""
        return min(self.sizes.topk, self.entries)

    def ready(self) -> Iterator[tuple[int, int]]:
        """How many queries have how many entries ready."""
        first = self.context - self.queries
        if not self.ratio:
            yield self.queries, 0
            return
        for count in range((first + 1) // self.ratio, self.context // self.ratio + 1):
            low, high = max(first, count * self.ratio - 1), min(self.context, (count + 1) * self.ratio - 1)
            if high > low:
                yield high - low, count


def pairs(case: Case) -> int:
    """Pairs of a query and a key (or entry) that have to be multiplied, in one sequence; counted, not estimated."""
    if case.op == "lightning_indexer":
        return sum(queries * count for queries, count in case.ready())
    first, window = case.context - case.queries, case.sizes.window
    short = range(first + 1, min(window, case.context + 1))  # queries that the window's start is before
    band = sum(short) + window * (case.queries - len(short))
    most = case.selected if case.layer == "selected" else case.entries
    return band + sum(queries * min(count, most) for queries, count in case.ready())


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


PREFILL, DECODE = (1024, 4096, 16384, 65536), (4096, 65536, 1048576)


def cases(sizes: Sizes = FLASH, prefill: tuple[int, ...] = PREFILL, decode: tuple[int, ...] = DECODE) -> list[Case]:
    """Every case, those that say most first: a run that is cut short has them."""
    found: list[Case] = []
    by_weight = sorted(prefill, key=lambda n: abs(math.log(n / 16384)))
    for context in by_weight:
        found += [
            Case("sparse_attention", "selected", "forward", 1, context, sizes),
            Case("lightning_indexer", "selected", "forward", 1, context, sizes),
            Case("sparse_attention", "selected", "backward", 1, context, sizes),
        ]
    for context in decode:
        for batch in (1, 64):
            found += [
                Case("sparse_attention", "selected", "decode", batch, context, sizes),
                Case("lightning_indexer", "selected", "decode", batch, context, sizes),
            ]
    for context in by_weight:
        for layer in ("sliding", "compressed"):
            for step in ("forward", "backward"):
                found.append(Case("sparse_attention", layer, step, 1, context, sizes))
    found += [Case("sparse_attention", "compressed", "decode", 1, context, sizes) for context in decode]
    return found
