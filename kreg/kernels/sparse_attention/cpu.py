"""``sparse_attention`` in plain PyTorch, a tile of queries at a time.

All heads share the keys, so a tile's products are single matrix products with ``heads * tile`` rows. A tile
scores densely the window and the entries that are ready, joined into one list of keys; selected entries are
gathered for each query, or scored densely and masked where few are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch

from kreg.kernels.tiles import (
    ALIGNMENT,
    GATHERED_PER_TILE,
    Band,
    RunningSoftmax,
    Workspace,
    even_spans,
    longest_range,
    product,
    softmax_,
    spans,
)
from kreg.registry.ops.attention import accumulation_dtype

GATHER_ABOVE = 2
"""Gather when there are this many times more entries than selected ones: a gathered key serves one query, a
masked one the whole tile at the matrix product's full rate."""


TILE_OPERATIONS = 1 << 23
"""A tile's fixed cost, counted in operations ``queries**2 * heads * dim`` on keys outside the window."""


@dataclass
class Dense:
    """Keys that a whole tile scores: ``kv[first:last]``, ``compressed[:entries]``; bias is [tile, keys]."""

    first: int
    last: int
    entries: int
    bias: torch.Tensor | None

    def keys(self, work: Workspace, kv: torch.Tensor, compressed: torch.Tensor | None) -> torch.Tensor:
        """The keys [keys, dim], joined."""
        if compressed is None or not self.entries:
            return kv[self.first : self.last]
        joined = work.take("joined", self.last - self.first + self.entries, kv.shape[1])
        return torch.cat([kv[self.first : self.last], compressed[: self.entries]], out=joined)


@dataclass
class Gather:
    """Entries that the tile's queries ``start`` to ``stop`` read: [rows, selected]; bias likewise."""

    start: int
    stop: int
    entries: torch.Tensor
    bias: torch.Tensor | None

    def keys(self, work: Workspace, compressed: torch.Tensor) -> torch.Tensor:
        """The keys [rows, selected, dim], one copy per query."""
        keys = work.take("gathered", self.entries.numel(), compressed.shape[1])
        torch.index_select(compressed, 0, self.entries.flatten(), out=keys)
        return keys.view(*self.entries.shape, -1)


@dataclass
class Layout:
    """Which keys the tiles of queries see."""

    band: Band
    padding: torch.Tensor | None
    entries: int
    indices: torch.Tensor | None
    ratio: int
    dim: int
    like: torch.Tensor

    def tile(self, batch: int, start: int, stop: int) -> tuple[Dense, list[Gather]]:
        """The keys of the queries ``start`` to ``stop``, each of them once."""
        if self.indices is None:
            return self.joined(batch, start, stop, self.ready_count(stop), None), []
        chosen = self.indices[batch, start:stop]
        used = int(chosen.max()) + 1 if self.entries and chosen.numel() else 0
        if used > GATHER_ABOVE * chosen.shape[1]:
            return self.joined(batch, start, stop, 0, None), self.gathers(chosen)
        return self.joined(batch, start, stop, used, chosen), []

    def ready_count(self, stop: int) -> int:
        """How many entries are ready for the query before ``stop``."""
        if not self.ratio:
            return self.entries
        return min(self.entries, max(0, stop + self.band.offset) // self.ratio)

    def joined(self, batch: int, start: int, stop: int, entries: int, chosen: torch.Tensor | None) -> Dense:
        """Window and first ``entries``, of which the queries see the ``chosen``; None: the ready ones."""
        first, last = self.band.span(start, stop)
        first = max(0, first - -(last - first + entries) % ALIGNMENT)
        masks = self.band.bias(start, stop, first, last, self.like)
        some_late = entries and chosen is None and entries > self.ready_count(start + 1)
        if masks is None and self.padding is None and not some_late and chosen is None:
            return Dense(first, last, entries, None)
        window = last - first
        bias = self.like.new_zeros(stop - start, window + entries)
        if masks is not None:
            bias[:, :window] = masks
        if self.padding is not None:
            bias[:, :window].masked_fill_(~self.padding[batch, first:last], float("-inf"))
        if chosen is not None:
            absent = self.like.new_full((stop - start, entries + 1), float("-inf"))
            absent.scatter_(1, torch.where(chosen < 0, entries, chosen).long(), 0.0)
            bias[:, window:] = absent[:, :entries]
        elif some_late:
            positions = torch.arange(start, stop, device=bias.device).add_(self.band.offset + 1).unsqueeze(1)
            ends = torch.arange(1, entries + 1, device=bias.device).mul_(self.ratio)
            bias[:, window:].masked_fill_(ends > positions, float("-inf"))
        return Dense(first, last, entries, bias)

    def gathers(self, chosen: torch.Tensor) -> list[Gather]:
        """The ``chosen`` entries [tile, selected], for as many queries at a time as the buffer can hold."""
        absent = chosen < 0
        bias = None
        if bool(absent.any()):
            bias = self.like.new_zeros(chosen.shape).masked_fill_(absent, float("-inf"))
            chosen = chosen.clamp(min=0)
        rows = max(1, GATHERED_PER_TILE // (chosen.shape[1] * self.dim))
        return [
            Gather(start, stop, chosen[start:stop], None if bias is None else bias[start:stop])
            for start, stop in spans(0, len(chosen), rows)
        ]


def layout_of(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None,
    indices: torch.Tensor | None,
    padding: torch.Tensor | None,
    window: int,
    ratio: int,
    offset: int,
) -> Layout:
    """The layout of a call of the op."""
    entries = 0 if compressed is None else compressed.shape[1]
    like = q.new_empty(0, dtype=accumulation_dtype(q.dtype))
    return Layout(Band(kv.shape[1], True, window, offset), padding, entries, indices, ratio, q.shape[3], like)


def queries_per_tile(heads: int, dim: int) -> int:
    """The power of two that costs least.

    A tile of n queries has a fixed cost, and scores n keys a query outside its window, at ``heads * dim``
    operations each: least in all at n ~ ``1 / sqrt(heads * dim)``.
    """
    return 1 << min(8, max(3, isqrt(TILE_OPERATIONS // (heads * dim)).bit_length() - 1))


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    acc = accumulation_dtype(q.dtype)
    batch, heads, queries, dim = q.shape
    layout = layout_of(q, kv, compressed, indices, padding, window, ratio, offset)
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=acc)
    work = Workspace(q, acc)
    for b in range(batch):
        kv_b = kv[b].to(acc).contiguous()
        compressed_b = None if compressed is None else compressed[b].to(acc).contiguous()
        for start, stop in spans(0, queries, queries_per_tile(heads, dim)):
            rows = work.copy("q", q[b, :, start:stop]).mul_(scale)
            running = RunningSoftmax(work, out[b, :, start:stop], sinks)
            dense, gathers = layout.tile(b, start, stop)
            keys = dense.keys(work, kv_b, compressed_b)
            for low, high in even_spans(0, len(keys), longest_range(heads * (stop - start))):
                some = keys[low:high]
                scores = work.take("scores", heads, stop - start, high - low)
                torch.mm(rows.view(-1, dim), some.mT, out=scores.view(-1, high - low))
                if dense.bias is not None:
                    scores.add_(dense.bias[:, low:high])
                part_lse = softmax_(scores)
                part = work.take("part", heads, stop - start, dim)
                torch.mm(scores.view(-1, high - low), some, out=part.view(-1, dim))
                running.merge(part, part_lse)
            for gather in gathers:
                assert compressed_b is not None
                keys = gather.keys(work, compressed_b)
                scores = product("scores", work, rows[:, gather.start : gather.stop].transpose(0, 1), keys.mT)
                if gather.bias is not None:
                    scores.add_(gather.bias.unsqueeze(1))
                part_lse = softmax_(scores)
                part = product("part", work, scores, keys)
                running.merge(part.transpose(0, 1), part_lse.mT, gather.start, gather.stop)
            lse[b, :, start:stop] = running.finish()
    return out, lse


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
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output and lse; the probabilities are computed again, tile by tile.

    With probabilities p the scores' gradient is ``d = p * (grad @ keys^T - rowsum(grad * out))``; the keys
    get one part as keys, ``d^T @ q``, and one as values, ``p^T @ grad``.
    """
    acc = accumulation_dtype(q.dtype)
    batch, heads, queries, dim = q.shape
    layout = layout_of(q, kv, compressed, indices, padding, window, ratio, offset)
    arguments = {"q": q, "kv": kv, "compressed": compressed, "sinks": sinks}
    wanted = {name: value for name, value in arguments.items() if name in needs and value is not None}
    total = {name: torch.zeros(value.shape, dtype=acc, device=q.device) for name, value in wanted.items()}
    grad, (out, lse) = grads[0], outputs
    work = Workspace(q, acc)
    for b in range(batch if grad is not None else 0):
        assert grad is not None
        kv_b = kv[b].to(acc).contiguous()
        compressed_b = None if compressed is None else compressed[b].to(acc).contiguous()
        for start, stop in spans(0, queries, queries_per_tile(heads, dim)):
            rows = work.copy("q", q[b, :, start:stop]).mul_(scale)
            grads_out = work.copy("grad", grad[b, :, start:stop])
            inner = work.copy("grad q", out[b, :, start:stop]).mul_(grads_out).sum(-1)
            log_total = lse[b, :, start:stop]
            if "sinks" in total:
                assert sinks is not None
                share = (sinks.to(acc).unsqueeze(1) - log_total).exp_()
                total["sinks"] -= share.mul_(inner).nan_to_num_(0.0).sum(-1)
            if total.keys() <= {"sinks"}:
                continue
            log_total = log_total.masked_fill(log_total.isneginf(), 0.0)
            grads_q = work.take("grad q", heads, stop - start, dim).zero_()
            dense, gathers = layout.tile(b, start, stop)
            keys = dense.keys(work, kv_b, compressed_b)
            grads_keys = work.take("grad keys", *keys.shape)
            flat, flat_grads = rows.view(-1, dim), grads_out.view(-1, dim)
            for low, high in even_spans(0, len(keys), longest_range(heads * (stop - start))):
                some, columns = keys[low:high], high - low
                p = work.take("scores", heads, stop - start, columns)
                torch.mm(flat, some.mT, out=p.view(-1, columns))
                if dense.bias is not None:
                    p.add_(dense.bias[:, low:high])
                p.sub_(log_total.unsqueeze(-1)).exp_()
                d = work.take("grad scores", heads, stop - start, columns)
                torch.mm(flat_grads, some.mT, out=d.view(-1, columns))
                d.sub_(inner.unsqueeze(-1)).mul_(p)
                if "q" in total:
                    grads_q.view(-1, dim).addmm_(d.view(-1, columns), some)
                if "kv" in total or "compressed" in total:
                    torch.mm(d.view(-1, columns).mT, flat, out=grads_keys[low:high])
                    grads_keys[low:high].addmm_(p.view(-1, columns).mT, flat_grads)
            if "kv" in total:
                total["kv"][b, dense.first : dense.last] += grads_keys[: dense.last - dense.first]
            if "compressed" in total:
                total["compressed"][b, : dense.entries] += grads_keys[dense.last - dense.first :]
            for gather in gathers:
                assert compressed_b is not None
                some_rows = slice(gather.start, gather.stop)
                keys = gather.keys(work, compressed_b)
                by_query, grads_by_query = (x[:, some_rows].transpose(0, 1) for x in (rows, grads_out))
                p = product("scores", work, by_query, keys.mT)
                if gather.bias is not None:
                    p.add_(gather.bias.unsqueeze(1))
                p.sub_(log_total[:, some_rows].mT.unsqueeze(-1)).exp_()
                d = product("grad scores", work, grads_by_query, keys.mT)
                d.sub_(inner[:, some_rows].mT.unsqueeze(-1)).mul_(p)
                if "q" in total:
                    grads_q[:, some_rows] += product("part", work, d, keys).transpose(0, 1)
                if "compressed" in total:
                    found = product("gathered", work, d.mT, by_query).baddbmm_(p.mT, grads_by_query)
                    total["compressed"][b].index_add_(0, gather.entries.flatten(), found.view(-1, dim))
            if "q" in total:
                torch.mul(grads_q, scale, out=total["q"][b, :, start:stop])
    return {name: total[name].to(value.dtype) for name, value in wanted.items()}
