"""Tiles of queries against ranges of keys: what the CPU attention kernels share.

A tile is a range of queries of one batch element with all its heads, head-major: rows are ``[heads, tile]``.
Its scores against a range of keys are ``[heads, tile, keys]`` and small enough for the cache; they are
overwritten by the next tile's, since on a CPU fresh memory costs page faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch

from kreg.registry.ops.attention import in_band

SCORES_PER_TILE = 1 << 18
"""Scores held at once (1 MB in float32), about one core's second-level cache."""

GATHERED_PER_TILE = 1 << 20
"""Elements of gathered keys held at once."""

LONGEST_RANGE = 256
"""Keys per range where no window bounds them."""


ALIGNMENT = 16
"""Keys per range are a multiple of this where possible: rows of scores that start at odd addresses cost the
matrix product a fifth of its rate and make row maxima three times slower."""


class Workspace:
    """Named buffers of one dtype that live as long as one kernel call and grow to the largest request."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised contiguous tensor on the buffer ``name``; the last one taken from it is void."""
        size = prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = self.like.new_empty(size, dtype=self.dtype)
        return buffer[:size].view(shape)

    def dense(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """``source`` itself if it is contiguous and of the workspace's dtype, else a copy. Read only."""
        return source if source.dtype is self.dtype and source.is_contiguous() else self.copy(name, source)

    def copy(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """``source``, contiguous and in the workspace's dtype, on the buffer ``name``."""
        return self.take(name, *source.shape).copy_(source)


def aligned(first: int, last: int, end: int) -> tuple[int, int]:
    """Widen a range within 0 to ``end`` to a multiple of `ALIGNMENT`, to the left first. Masks follow."""
    width = -(-(last - first) // ALIGNMENT) * ALIGNMENT
    first = max(0, last - width)
    return first, min(end, first + width)


@dataclass
class Band:
    """The masks by position: which keys the query at position ``s + offset`` sees, as `in_band` has it."""

    keys: int
    causal: bool
    window: int
    offset: int
    chunk: int = 0
    prefix: int = 0
    seen: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The range of keys, aligned, that queries ``start`` to ``stop`` see beside the prefix."""
        low, high = start + self.offset, stop + self.offset  # positions
        first, last = 0, self.keys
        if self.causal:
            last = min(last, high)
        if self.window:
            first, last = max(first, low - self.window + 1), min(last, high + self.window - 1)
        if self.chunk:
            chunks = low // self.chunk, (high - 1) // self.chunk + 1
            first, last = max(first, chunks[0] * self.chunk), min(last, chunks[1] * self.chunk)
        return aligned(first, last, self.keys) if first < last else (0, 0)

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of keys, aligned and disjoint, that queries ``start`` to ``stop`` see at all."""
        first, last = self.span(start, stop)
        if self.prefix <= 0:
            return [(first, last)]
        _, end = aligned(0, min(self.prefix, self.keys), self.keys)
        return [(0, max(end, last))] if end >= first else [(0, end), (first, last)]

    def whole(self, start: int, stop: int, first: int, last: int) -> bool:
        """Whether every query of the tile sees every key of the range."""
        if last <= self.prefix:
            return True
        low, high = start + self.offset, stop - 1 + self.offset
        if self.causal and last - 1 > low:
            return False
        if self.window and (first <= high - self.window or last - 1 >= low + self.window):
            return False
        return not self.chunk or len({at // self.chunk for at in (low, high, first, last - 1)}) == 1

    def bias(self, start: int, stop: int, first: int, last: int, like: torch.Tensor) -> torch.Tensor | None:
        """0 where a query of the tile sees a key of the range, -inf elsewhere: [tile, range]; None: all 0."""
        if self.whole(start, stop, first, last):
            return None
        position, prefix = start + self.offset, min(max(self.prefix - first, 0), last - first)
        phase = position % self.chunk if self.chunk else 0
        shape = stop - start, last - first
        relative = (*shape, position - first, phase, prefix)  # most tiles have the same relative position
        bias = self.seen.get(relative)
        if bias is None:
            if len(self.seen) >= 8:
                self.seen.clear()
            keep = in_band(
                torch.arange(position, position + shape[0]).unsqueeze(1),
                torch.arange(first, last),
                causal=self.causal,
                window=self.window,
                chunk=self.chunk,
                prefix=self.prefix,
            )
            bias = self.seen[relative] = like.new_zeros(shape).masked_fill_(~keep, float("-inf"))
        return bias


def absence(kept: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """0 where True, -inf where False; to make and add it is several times faster than to fill scores in place."""
    below = torch.sub(kept.view(torch.int8), 1, out=out)  # 0 or -1
    return torch.threshold_(below, -0.5, float("-inf"))


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``start`` to ``stop`` into ranges of ``size``, the last one smaller."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def even_spans(start: int, stop: int, largest: int) -> Iterator[tuple[int, int]]:
    """Cut ``start`` to ``stop`` into aligned ranges of about equal size, ``largest`` at most."""
    count = max(1, -(-(stop - start) // largest))
    share = -(-(stop - start) // count)
    yield from spans(start, stop, max(1, -(-share // ALIGNMENT) * ALIGNMENT))


def longest_range(rows: int) -> int:
    """Keys per range, aligned, so that scores of this many rows stay in cache."""
    return max(LONGEST_RANGE, SCORES_PER_TILE // rows // ALIGNMENT * ALIGNMENT)


class RunningSoftmax:
    """The softmax of one tile, part by part: each part's output and lse merge into those so far.

    With weights ``w = exp(lse_part - lse_all)`` the output is ``(1 - w) * before + w * part``, a lerp. The
    running lse starts at the sink, which has no value behind it.
    """

    def __init__(self, work: Workspace, target: torch.Tensor, sinks: torch.Tensor | None) -> None:
        """``target`` [heads, tile, dim] receives the output; it is accumulated there if its dtype allows."""
        self.target = target
        self.out = target if target.dtype is work.dtype else work.take("running out", *target.shape)
        self.lse = work.take("running lse", *target.shape[:2])
        if sinks is None:
            self.lse.fill_(float("-inf"))
        else:
            self.lse.copy_(sinks.unsqueeze(1).expand_as(self.lse))
        self.empty = True

    def merge(self, part: torch.Tensor, part_lse: torch.Tensor, start: int = 0, stop: int | None = None) -> None:
        """Merge a part's output [heads, rows, dim] and lse [heads, rows], for some of the tile's rows."""
        every = stop is None or (start == 0 and stop == self.lse.shape[1])
        if self.empty and not every:
            self.out.zero_()
        lse, out = self.lse[:, start:stop], self.out[:, start:stop]
        total = torch.logaddexp(lse, part_lse)
        weight = part_lse.sub(total).exp_().nan_to_num_(0.0).unsqueeze(-1)  # nan: nothing seen so far
        lse.copy_(total)
        if self.empty and every:
            torch.mul(part, weight, out=out)
        else:
            out.lerp_(part, weight)
        self.empty = False

    def finish(self) -> torch.Tensor:
        """Complete the target, 0 for rows that saw nothing, and return the lse [heads, tile]."""
        if self.empty:
            self.target.zero_()
        elif self.target is not self.out:
            self.target.copy_(self.out)
        return self.lse


def softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in place, 0 for rows of -inf only; returns each row's lse.

    ``softmax`` in one pass is faster than its steps, and its largest value is ``1 / sum(exp(scores - top))``.
    """
    top = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    if bool(torch.isneginf(top).any()):
        scores.masked_fill_(torch.isneginf(top).unsqueeze(-1), 0.0)
        return top - scores.amax(-1).log_().nan_to_num_(neginf=0.0)
    return top.sub_(scores.amax(-1).log_())


def product(name: str, work: Workspace, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` for batches of matrices, on the buffer ``name``."""
    return torch.bmm(a, b, out=work.take(name, a.shape[0], a.shape[1], b.shape[2]))
