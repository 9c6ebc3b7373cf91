"""One call of an op that ``kreg bench --device cuda`` measures, and the sizes that models fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What a model fixes."""

    heads: int = 64
    head_dim: int = 512
    window: int = 128
    topk: int = 512
    index_heads: int = 64
    index_dim: int = 128
    kv_heads: int = 1
    page: int = 64


FLASH = Sizes()
"""DeepSeek-V4-Flash: transformers 5.23's ``DeepseekV4Config``; pages of 64 slots as servers have them."""
GROUPED = Sizes(heads=32, kv_heads=8, head_dim=128, window=4096)
"""Mistral-7B-v0.1's ``config.json``; without its window, Llama-3-8B's attention."""
SMALL_HEADS = Sizes(heads=64, kv_heads=8, head_dim=64, window=128)
"""gpt-oss' ``config.json``: layers with a window and without take turns, all have sinks."""
TINY = Sizes(heads=4, kv_heads=2, head_dim=16, window=8, topk=4, index_heads=2, index_dim=16, page=4)

RATIOS = {"selected": 4, "compressed": 128}
"""Positions in one compressed entry, by kind of layer; elsewhere there are none."""


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: its name.
        layer: "sliding", "selected" (top-k of entries, and the indexer that picks them) or "compressed" (all ready);
            of ``attention`` "causal", "window" or "sinks" (causal).
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
        return RATIOS.get(self.layer, 0)

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


def band(case: Case, window: int) -> int:
    """Pairs of a query and a key that a causal window of this width keeps, in one sequence."""
    first = case.context - case.queries
    short = range(first + 1, min(window, case.context + 1))  # queries that the window's start is before
    return sum(short) + window * (case.queries - len(short))
