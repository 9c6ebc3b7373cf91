"""``attention`` in plain PyTorch, a tile of queries against a range of keys at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kreg.kernels.tiles import (
    LONGEST_RANGE,
    SCORES_PER_TILE,
    Band,
    RunningSoftmax,
    Workspace,
    even_spans,
    product,
    softmax_,
    spans,
)
from kreg.registry.ops.attention import accumulation_dtype

ROWS_PER_PRODUCT = 256
"""Rows of one matrix product, where there are as many: a kv head's query heads times a tile's queries."""


@dataclass
class Tile:
    """Some heads and queries of one batch element."""

    batch: int
    heads: slice
    kv_heads: slice
    queries: slice

    def of(self, tensor: torch.Tensor, keys: slice) -> torch.Tensor:
        """Its part of a broadcastable [batch, heads, queries, keys] tensor, a view: [heads, tile, keys]."""
        wanted = (self.heads, self.queries, keys)
        tensor = tensor[self.batch if tensor.shape[0] > 1 else 0]
        sizes = zip(wanted, tensor.shape, strict=True)
        return tensor[tuple(some if size > 1 else slice(None) for some, size in sizes)]


@dataclass
class Scores:
    """How scores [heads, tile, range] come from products: scale, soft cap, bias, masks."""

    band: Band
    bias: torch.Tensor | None
    mask: torch.Tensor | None
    softcap: float

    def of_(self, tile: Tile, keys: slice, scores: torch.Tensor, slope: torch.Tensor | None = None) -> None:
        """Turn scaled products into scores in place; ``slope`` receives the soft cap's derivative."""
        if self.softcap:
            scores.div_(self.softcap).tanh_()
            if slope is not None:
                torch.mul(scores, scores, out=slope).neg_().add_(1.0)
            scores.mul_(self.softcap)
        if self.bias is not None:
            scores.add_(tile.of(self.bias, keys))
        banded = self.band.bias(tile.queries.start, tile.queries.stop, keys.start, keys.stop, scores)
        if banded is not None:
            scores.add_(banded)
        if self.mask is not None:
            scores.masked_fill_(~tile.of(self.mask, keys), float("-inf"))

    def keys(self, tile: Tile) -> Iterator[slice]:
        """The ranges of keys that the tile sees, one after the other."""
        for first, last in even_spans(*self.band.span(tile.queries.start, tile.queries.stop), LONGEST_RANGE):
            yield slice(first, last)


def tiles(q: torch.Tensor, k: torch.Tensor, window: int) -> Iterator[Tile]:
    """Cut the work so that products have enough rows and scores stay in cache.

    Within a window, more queries score more keys in vain. Where kv heads are small, several make one tile.
    """
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    rows = max(16, ROWS_PER_PRODUCT // group)
    if window:
        rows = min(rows, max(16, window // 2))
    rows = max(1, min(rows, queries))
    columns = max(1, min(keys, rows + window if window else LONGEST_RANGE, LONGEST_RANGE))
    together = max(1, SCORES_PER_TILE // (rows * columns * group))
    for b in range(batch):
        for first, last in spans(0, kv_heads, together):
            for start, stop in spans(0, queries, rows):
                yield Tile(b, slice(first * group, last * group), slice(first, last), slice(start, stop))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op; the query heads of a kv head are the rows of one product."""
    acc = accumulation_dtype(q.dtype)
    (batch, heads, queries, dim), value_dim = q.shape, v.shape[3]
    k, v = k.to(acc), v.to(acc)
    work = Workspace(q, acc)
    scores_of = Scores(Band(k.shape[2], causal, window, offset), bias, mask, softcap)
    out = q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=acc)
    for tile in tiles(q, k, window):
        q_tile = q[tile.batch, tile.heads, tile.queries]
        shape, kv_heads = (*q_tile.shape[:2], -1), tile.kv_heads.stop - tile.kv_heads.start
        rows = work.copy("q", q_tile).mul_(scale).view(kv_heads, -1, dim)
        running = RunningSoftmax(
            work, out[tile.batch, tile.heads, tile.queries], None if sinks is None else sinks[tile.heads]
        )
        for some in scores_of.keys(tile):
            scores = product("scores", work, rows, k[tile.batch, tile.kv_heads, some].mT)
            scores_of.of_(tile, some, scores.view(shape))
            part_lse = softmax_(scores.view(shape))
            part = product("part", work, scores, v[tile.batch, tile.kv_heads, some])
            running.merge(part.view(shape), part_lse)
        lse[tile.batch, tile.heads, tile.queries] = running.finish()
    return out, lse


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output and lse; the probabilities are computed again, tile by tile."""
    acc = accumulation_dtype(q.dtype)
    dim, value_dim = q.shape[3], v.shape[3]
    arguments = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    wanted = {name: value for name, value in arguments.items() if name in needs and value is not None}
    total = {name: torch.zeros(value.shape, dtype=acc, device=q.device) for name, value in wanted.items()}
    grad, (out, lse) = grads[0], outputs
    k, v = k.to(acc), v.to(acc)
    work = Workspace(q, acc)
    scores_of = Scores(Band(k.shape[2], causal, window, offset), bias, mask, softcap)
    for tile in tiles(q, k, window) if grad is not None else ():
        assert grad is not None
        place = (tile.batch, tile.heads, tile.queries)
        q_tile = q[place]
        shape, kv_heads = (*q_tile.shape[:2], -1), tile.kv_heads.stop - tile.kv_heads.start
        rows = work.copy("q", q_tile).mul_(scale).view(kv_heads, -1, dim)
        grads_out = work.copy("grad", grad[place])
        inner = work.copy("out", out[place]).mul_(grads_out).sum(-1)
        log_total = lse[place]
        if sinks is not None and "sinks" in total:
            share = (sinks[tile.heads].to(acc).unsqueeze(1) - log_total).exp_()
            total["sinks"][tile.heads] -= share.mul_(inner).nan_to_num_(0.0).sum(-1)
        if total.keys() <= {"sinks"}:
            continue
        log_total = log_total.masked_fill(log_total.isneginf(), 0.0).unsqueeze(-1)
        by_kv = grads_out.view(kv_heads, -1, value_dim)
        grads_q = work.take("grad q", *rows.shape).zero_()
        for some in scores_of.keys(tile):
            there = (tile.batch, tile.kv_heads, some)
            p = product("scores", work, rows, k[there].mT)
            slope = work.take("slope", *p.shape).view(shape) if softcap else None
            scores_of.of_(tile, some, p.view(shape), slope)
            p.view(shape).sub_(log_total).exp_()
            if "v" in total:
                total["v"][there] += product("part", work, p.mT, by_kv)
            d = product("grad scores", work, by_kv, v[there].mT)
            d.view(shape).sub_(inner.unsqueeze(-1)).mul_(p.view(shape))
            if "bias" in total:
                part = tile.of(total["bias"], some)
                part += d.view(shape).sum_to_size(part.shape)
            if slope is not None:
                d.view(shape).mul_(slope)
            if "q" in total:
                grads_q.baddbmm_(d, k[there])
            if "k" in total:
                total["k"][there] += product("part", work, d.mT, rows)
        if "q" in total:
            torch.mul(grads_q.view(shape), scale, out=total["q"][place])
    return {name: total[name].to(value.dtype) for name, value in wanted.items()}
