"""``selected_attention`` in plain PyTorch, a tile of queries at a time.

Where few of the visible keys are selected, a tile's scores are a sparse matrix, as many a row as there are indices:
products are sampled at the selected keys, and weighted sums read the selected rows, so no key is copied. Where many
are selected, or a query is left without keys, the tile is dense attention under the selection as a mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kreg.kernels.attention import cpu as dense
from kreg.kernels.tiles import Band, softmax_, spans
from kreg.registry.ops.attention import accumulation_dtype, empty_rows, in_band
from kreg.registry.ops.selected_attention import named

PAIRS_PER_TILE = 1 << 18
"""Pairs of a query and a selected key that are scored together."""

FLAGS_PER_TILE = 1 << 22
"""Pairs of a query and a key, selected or not, that a tile may have: a dense one holds a flag for each."""

SPARSE_ABOVE = 3
"""A selected key costs as much as this many that are scored densely."""


@dataclass
class Tile:
    """Some queries of one batch element, and the heads that share one index head."""

    batch: int
    index_head: int
    heads: slice
    kv_heads: slice
    queries: slice

    def kv_of(self, head: int) -> int:
        """The kv head of the tile's query head number ``head``."""
        share: int = (self.heads.stop - self.heads.start) // (self.kv_heads.stop - self.kv_heads.start)
        first: int = self.kv_heads.start
        return first + head // share


def tiles(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, block: int) -> Iterator[Tile]:
    """The work, cut by index head and by queries."""
    (batch, heads, queries, _), (kv_heads, keys), index_heads = q.shape, k.shape[1:3], indices.shape[1]
    own, kv = heads // index_heads, max(1, kv_heads // index_heads)
    rows = min(PAIRS_PER_TILE // max(1, indices.shape[3] * block), FLAGS_PER_TILE // max(1, keys))
    for b in range(batch):
        for i in range(index_heads):
            first = i * kv_heads // index_heads
            for start, stop in spans(0, queries, max(16, rows)):
                yield Tile(b, i, slice(i * own, (i + 1) * own), slice(first, first + kv), slice(start, stop))


@dataclass
class Pairs:
    """The keys of a tile's queries: ``keys`` [rows, selected] with ``absence``, -inf beside what is none and 0 else."""

    keys: torch.Tensor
    absence: torch.Tensor

    def sampled(self, rows: torch.Tensor, columns: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """``factor * rows @ columns^T`` at the pairs, from [rows, dim] and [keys, dim]."""
        count, selected = self.keys.shape
        ends = torch.arange(0, count * selected + 1, selected, device=self.keys.device)
        values = rows.new_zeros(self.keys.numel())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # this layout is in beta
            pattern = torch.sparse_csr_tensor(
                ends, self.keys.flatten(), values, (count, len(columns)), check_invariants=False
            )
        found: torch.Tensor = torch.sparse.sampled_addmm(pattern, rows, columns.mT, alpha=factor).values()
        return found.view(count, selected)

    def by_row(self, weights: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """``weights @ columns`` for weights of the pairs: [rows, dim]."""
        return F.embedding_bag(self.keys, columns, mode="sum", per_sample_weights=weights)

    def transposed(self, columns: int) -> Transposed:
        """The pairs, by key."""
        places = torch.where(self.absence.isneginf(), columns, self.keys).flatten()
        ordered, order = places.sort()
        starts = torch.searchsorted(ordered, torch.arange(columns + 1, device=places.device))
        order = order[: int(starts[-1])]
        return Transposed(order, order // self.keys.shape[1], starts[:-1])


@dataclass
class Transposed:
    """Pairs by key: their places in the tile, the row of each, and where each key's begin."""

    order: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor

    def by_key(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``weights^T @ rows`` for weights of the pairs: [keys, dim]."""
        some = weights.flatten()[self.order]
        return F.embedding_bag(self.rows, rows, self.starts, mode="sum", per_sample_weights=some)


@dataclass
class Selection:
    """Which keys each query sees, and how."""

    indices: torch.Tensor
    padding: torch.Tensor | None
    keys: int
    block: int
    empty: str
    causal: bool
    window: int
    offset: int

    def pairs(self, tile: Tile, dtype: torch.dtype) -> Pairs | None:
        """The tile's pairs; None where it is better scored densely, or has to be."""
        chosen = self.indices[tile.batch, tile.index_head, tile.queries].long()
        first, last = Band(self.keys, self.causal, self.window, self.offset).span(tile.queries.start, tile.queries.stop)
        if not chosen.numel() or chosen.shape[1] * self.block * SPARSE_ABOVE > last - first:
            return None
        chosen = chosen.sort(-1).values
        kept = chosen >= 0
        kept[:, 1:] &= chosen[:, 1:] != chosen[:, :-1]  # of equal ones, one counts
        keys = chosen.mul(self.block).unsqueeze(-1) + torch.arange(self.block, device=chosen.device)
        kept = (kept.unsqueeze(-1) & (keys < self.keys)).flatten(1)
        keys = keys.flatten(1).clamp_(0, self.keys - 1)
        position = torch.arange(tile.queries.start, tile.queries.stop, device=keys.device).unsqueeze(1) + self.offset
        kept &= in_band(position, keys, causal=self.causal, window=self.window, chunk=0, prefix=0)
        if self.padding is not None:
            kept &= self.padding[tile.batch][keys]
        if self.empty != "zero" and not bool(kept.any(1).all()):
            return None
        absence = torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill_(~kept, float("-inf"))
        return Pairs(keys, absence)

    def dense(
        self, tile: Tile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> dict[str, Any]:
        """The tile as arguments of dense attention."""
        b = slice(tile.batch, tile.batch + 1)
        index_head = slice(tile.index_head, tile.index_head + 1)
        return {
            "q": q[b, tile.heads, tile.queries],
            "k": k[b, tile.kv_heads],
            "v": v[b, tile.kv_heads],
            "mask": named(self.indices[b, index_head, tile.queries], self.keys, self.block),
            "sinks": None if sinks is None else sinks[tile.heads],
            "padding": None if self.padding is None else self.padding[b],
            "causal": self.causal,
            "window": self.window,
            "offset": self.offset + tile.queries.start,
            "empty": self.empty,
        }


@dataclass
class Weights:
    """The softmax of one head over a tile's pairs.

    Attributes:
        p: [rows, selected].
        lse: [rows], with the sink.
        slope: the soft cap's derivative, or None.
    """

    p: torch.Tensor
    lse: torch.Tensor
    slope: torch.Tensor | None

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: float,
        softcap: float,
        sink: torch.Tensor | None,
    ) -> Weights:
        """From queries [rows, dim] and keys [keys, dim]."""
        scores, slope = pairs.sampled(rows, columns, scale), None
        if softcap:
            scores.div_(softcap).tanh_()
            slope = 1.0 - scores * scores
            scores.mul_(softcap)
        scores.add_(pairs.absence)
        lse = softmax_(scores)
        if sink is not None:
            every = torch.logaddexp(lse, sink.to(lse.dtype))
            scores.mul_((lse - every).exp_().unsqueeze(1))
            lse = every
        return cls(scores, lse, slope)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    offset: int = 0,
    block: int = 1,
    empty: str = "zero",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    empty = empty_rows(empty, sinks)
    acc = accumulation_dtype(q.dtype)
    batch, heads, queries, _ = q.shape
    k, v = k.to(acc).contiguous(), v.to(acc).contiguous()
    selection = Selection(indices, padding, k.shape[2], block, empty, causal, window, offset)
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=acc)
    for tile in tiles(q, k, indices, block):
        target, total = (x[tile.batch, tile.heads, tile.queries] for x in (out, lse))
        pairs = selection.pairs(tile, acc)
        if pairs is None:
            found = dense.forward(**selection.dense(tile, q, k, v, sinks), scale=scale, softcap=softcap)
            target.copy_(found[0][0])
            total.copy_(found[1][0])
            continue
        rows = q[tile.batch, tile.heads, tile.queries].to(acc).contiguous()
        for head in range(len(rows)):
            kv = tile.kv_of(head)
            sink = None if sinks is None else sinks[tile.heads][head]
            weights = Weights.of(pairs, rows[head], k[tile.batch, kv], scale, softcap, sink)
            target[head] = pairs.by_row(weights.p, v[tile.batch, kv])
            total[head] = weights.lse
    return out, lse


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    offset: int = 0,
    block: int = 1,
    empty: str = "zero",
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output; the probabilities are computed again, tile by tile.

    With probabilities p the scores' gradient is ``d = p * (grad @ v^T - rowsum(grad * out))``.
    """
    empty = empty_rows(empty, sinks)
    acc = accumulation_dtype(q.dtype)
    arguments = {"q": q, "k": k, "v": v, "sinks": sinks}
    wanted = {name: value for name, value in arguments.items() if name in needs and value is not None}
    total = {name: torch.zeros(value.shape, dtype=acc, device=q.device) for name, value in wanted.items()}
    grad, (out, lse) = grads[0], outputs
    k, v = k.to(acc).contiguous(), v.to(acc).contiguous()
    keys = k.shape[2]
    selection = Selection(indices, padding, keys, block, empty, causal, window, offset)
    for tile in tiles(q, k, indices, block) if grad is not None else ():
        assert grad is not None
        place = (tile.batch, tile.heads, tile.queries)
        kv = (tile.batch, tile.kv_heads)
        of: dict[str, Any] = {"q": place, "k": kv, "v": kv, "sinks": tile.heads}
        pairs = selection.pairs(tile, acc)
        if pairs is None:
            call = selection.dense(tile, q, k, v, sinks)
            results = out[place].unsqueeze(0), lse[place].unsqueeze(0)
            parts = dense.backward(
                (grad[place].unsqueeze(0), None), results, needs, **call, scale=scale, softcap=softcap
            )
            for name, part in parts.items():
                total[name][of[name]] += part if name == "sinks" else part[0]
            continue
        rows, grads_out = (x[place].to(acc).contiguous() for x in (q, grad))
        inner = (out[place] * grads_out).sum(-1)
        by_key = pairs.transposed(keys)
        for head in range(len(rows)):
            head_kv, own = (tile.batch, tile.kv_of(head)), (tile.batch, tile.heads.start + head, tile.queries)
            sink = None if sinks is None else sinks[tile.heads][head]
            weights = Weights.of(pairs, rows[head], k[head_kv], scale, softcap, sink)
            if sink is not None and "sinks" in total:
                share = (sink.to(acc) - weights.lse).exp_()
                total["sinks"][own[1]] -= share.mul_(inner[head]).sum()
            if "v" in total:
                total["v"][head_kv] += by_key.by_key(weights.p, grads_out[head])
            if not {"q", "k"} & total.keys():
                continue
            d = pairs.sampled(grads_out[head], v[head_kv])
            d.sub_(inner[head].unsqueeze(1)).mul_(weights.p).mul_(scale)
            if weights.slope is not None:
                d.mul_(weights.slope)
            if "q" in total:
                total["q"][own] = pairs.by_row(d, k[head_kv])
            if "k" in total:
                total["k"][head_kv] += by_key.by_key(d, rows[head])
    return {name: total[name].to(value.dtype) for name, value in wanted.items()}
