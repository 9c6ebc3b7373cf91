"""``attention`` in plain PyTorch, a tile of queries against a range of keys at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kreg.kernels.tiles import (
    ALIGNMENT,
    LONGEST_RANGE,
    SCORES_PER_TILE,
    Band,
    RunningSoftmax,
    Workspace,
    absence,
    even_spans,
    product,
    softmax_,
    spans,
)
from kreg.registry.ops.attention import accumulation_dtype, documents_of_queries, empty_rows

ROWS_PER_PRODUCT = 256
"""Rows of one matrix product, where there are as many: a kv head's query heads times a tile's queries."""

LARGE_LSE = 1024.0
"""Above this, an lse in float32 is rounded by more than 6e-5, and so are probabilities computed from it."""


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
    """How scores [heads, tile, range] come from scaled products: soft cap, bias, masks."""

    work: Workspace
    band: Band
    bias: torch.Tensor | None
    mask: torch.Tensor | None
    padding: torch.Tensor | None
    documents: torch.Tensor | None
    softcap: float
    queries: int

    def __post_init__(self) -> None:
        self.spans_of_padding = None if self.padding is None else kept_spans(self.padding)
        self.in_order = False
        if self.documents is not None:
            self.documents = self.documents.long().contiguous()
            self.of_queries = documents_of_queries(self.documents, self.queries, self.band.offset)
            self.in_order = bool((self.documents.diff(dim=1) >= 0).all())

    def of_(self, tile: Tile, keys: slice, scores: torch.Tensor, slope: torch.Tensor | None = None) -> None:
        """Turn scaled products into scores in place; ``slope`` receives the soft cap's derivative."""
        if self.softcap:
            scores.div_(self.softcap).tanh_()
            if slope is not None:
                torch.mul(scores, scores, out=slope).neg_().add_(1.0)
            scores.mul_(self.softcap)
        if self.bias is not None:
            scores.add_(tile.of(self.bias, keys))
        self.mask_(tile, keys, scores)

    def mask_(self, tile: Tile, keys: slice, scores: torch.Tensor) -> None:
        """Add -inf where a query does not keep a key."""
        banded = self.band.bias(tile.queries.start, tile.queries.stop, keys.start, keys.stop, scores)
        if banded is not None:
            scores.add_(banded)
        if self.padding is not None:
            scores.add_(self.absence(self.padding[tile.batch, keys]))
        if self.documents is not None:
            own, others = self.of_queries[tile.batch, tile.queries], self.documents[tile.batch, keys]
            scores.add_(self.absence(own.unsqueeze(1) == others))
        if self.mask is not None:
            scores.add_(self.absence(tile.of(self.mask, keys)))

    def absence(self, kept: torch.Tensor) -> torch.Tensor:
        """What to add to the scores of keys that are ``kept`` or not."""
        return absence(kept, self.work.take("absence", *kept.shape))

    def stops(self, tile: Tile, keys: slice, empty: str, like: torch.Tensor) -> torch.Tensor:
        """Where a query that keeps no key passes no gradient on to its scores: at keys that the masks drop if it
        gives NaN, at those that the bias drops if it is shifted, and nowhere does it if its weights are constant.
        """
        dropped = torch.zeros_like(like)
        if empty == "uniform":
            return dropped == 0.0
        if empty == "nan":
            self.mask_(tile, keys, dropped)
        elif self.bias is not None:
            dropped += tile.of(self.bias, keys)
        return dropped.isneginf()

    def ranges(self, tile: Tile, every: bool = False) -> Iterator[slice]:
        """The ranges of keys that the tile sees, or ``every`` key, one after the other."""
        spans_seen = [(0, self.band.keys)] if every else self.seen(tile)
        for span in spans_seen:
            for first, last in even_spans(*span, LONGEST_RANGE):
                yield slice(first, last)

    def seen(self, tile: Tile) -> Iterator[tuple[int, int]]:
        """The band's spans without what padding and documents drop at their ends, in aligned steps."""
        low, high = 0, self.band.keys
        if self.spans_of_padding is not None:
            low, high = self.spans_of_padding[tile.batch]
        if self.in_order:
            assert self.documents is not None
            every, own = self.documents[tile.batch], self.of_queries[tile.batch, tile.queries]
            low = max(low, int(torch.searchsorted(every, own[:1])))
            high = min(high, int(torch.searchsorted(every, own[-1:], right=True)))
        for first, last in self.band.spans(tile.queries.start, tile.queries.stop):
            first += max(0, low - first) // ALIGNMENT * ALIGNMENT
            last -= max(0, last - high) // ALIGNMENT * ALIGNMENT
            if first < last:
                yield first, last


def kept_spans(padding: torch.Tensor) -> list[tuple[int, int]]:
    """The first kept key of each batch element and the one after its last; where none is kept, an empty range."""
    keys = padding.shape[1]
    if not keys:
        return [(0, 0)] * len(padding)
    from_left = torch.arange(1, keys + 1, device=padding.device)
    last = padding.mul(from_left).amax(1)
    first = keys - padding.mul(from_left.flip(0)).amax(1)
    return list(zip(first.tolist(), last.tolist(), strict=True))


def tiles(q: torch.Tensor, k: torch.Tensor, band: Band) -> Iterator[Tile]:
    """Cut the work so that products have enough rows and scores stay in cache.

    Within a window or chunk, more queries score more keys in vain. Where kv heads are small, several make one
    tile.
    """
    (batch, heads, queries, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    rows, columns = max(16, ROWS_PER_PRODUCT // group), keys
    if band.window:
        reach = band.window if band.causal else 2 * band.window
        rows = min(rows, max(16, reach // 2))
        columns = min(columns, rows + reach)
    if band.chunk:
        rows = min(rows, max(16, band.chunk))
        columns = min(columns, rows + band.chunk)
    rows = max(1, min(rows, queries))
    columns = max(1, min(columns, LONGEST_RANGE))
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
    padding: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    empty: str = "zero",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op; the query heads of a kv head are the rows of one product.

    A tile with an lse too large to merge key ranges by is computed again, from scores less that lse.
    """
    empty = empty_rows(empty, sinks)
    acc = accumulation_dtype(q.dtype)
    (batch, heads, queries, dim), value_dim = q.shape, v.shape[3]
    k, v = k.to(acc), v.to(acc)
    work = Workspace(q, acc)
    band = Band(k.shape[2], causal, window, offset, chunk, prefix)
    scores_of = Scores(work, band, bias, mask, padding, documents, softcap, queries)
    out = q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=acc)

    def attend(tile: Tile, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Write the tile's output; the lse of its scores less ``shift`` [heads, tile]."""
        target = out[tile.batch, tile.heads, tile.queries]
        kv_heads, shape = tile.kv_heads.stop - tile.kv_heads.start, (*target.shape[:2], -1)
        rows = work.copy("q", q[tile.batch, tile.heads, tile.queries]).mul_(scale).view(kv_heads, -1, dim)
        running = RunningSoftmax(work, target, None if sinks is None else sinks[tile.heads])
        if shift is not None:
            running.lse.sub_(shift)
        for some in scores_of.ranges(tile):
            scores = product("scores", work, rows, k[tile.batch, tile.kv_heads, some].mT)
            scores_of.of_(tile, some, scores.view(shape))
            if shift is not None:
                scores.view(shape).sub_(shift.unsqueeze(-1))
            part_lse = softmax_(scores.view(shape))
            part = product("part", work, scores, v[tile.batch, tile.kv_heads, some])
            running.merge(part.view(shape), part_lse)
        return running.finish()

    for tile in tiles(q, k, band):
        lse[tile.batch, tile.heads, tile.queries] = attend(tile)
    for tile in tiles(q, k, band) if large(lse) else ():
        rounded = lse[tile.batch, tile.heads, tile.queries]
        if large(rounded):
            attend(tile, finite(rounded))
    answer_(out, lse, v, empty)
    return out, lse


def blank_rows(lse: torch.Tensor, empty: str, keys: int) -> torch.Tensor | None:
    """Which queries keep no key and yet have weights: bool [batch, heads, queries]; None: no query does."""
    if empty == "zero" or not keys:
        return None
    blank = lse.isneginf()
    return blank if bool(blank.any()) else None


def answer_(out: torch.Tensor, lse: torch.Tensor, v: torch.Tensor, empty: str) -> None:
    """Write what queries that keep no key give, where that is not 0: the mean of all values, or NaN."""
    blank = blank_rows(lse, empty, v.shape[2])
    if blank is None:
        return
    batch, head, _ = blank.nonzero(as_tuple=True)
    mean = v.to(lse.dtype).mean(2)[batch, head // (out.shape[1] // v.shape[1])]
    out[blank] = (mean.fill_(float("nan")) if empty == "nan" else mean).to(out.dtype)


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
    padding: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    empty: str = "zero",
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output and lse; the probabilities are computed again, tile by tile.

    With probabilities p the scores' gradient is ``d = p * (grad @ v^T - rowsum(grad * out))``. Queries that keep
    no key and yet have weights need their whole tile to read every key.
    """
    empty = empty_rows(empty, sinks)
    acc = accumulation_dtype(q.dtype)
    (_, _, queries, dim), (keys, value_dim) = q.shape, v.shape[2:]
    arguments = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    wanted = {name: value for name, value in arguments.items() if name in needs and value is not None}
    total = {name: torch.zeros(value.shape, dtype=acc, device=q.device) for name, value in wanted.items()}
    grad, (out, lse) = grads[0], outputs
    k, v = k.to(acc), v.to(acc)
    work = Workspace(q, acc)
    band = Band(keys, causal, window, offset, chunk, prefix)
    scores_of = Scores(work, band, bias, mask, padding, documents, softcap, queries)
    blanks, any_large = blank_rows(lse, empty, keys), large(lse)
    for tile in tiles(q, k, band) if grad is not None else ():
        assert grad is not None
        place = (tile.batch, tile.heads, tile.queries)
        q_tile = q[place]
        shape, kv_heads = (*q_tile.shape[:2], -1), tile.kv_heads.stop - tile.kv_heads.start
        rows = work.copy("q", q_tile).mul_(scale).view(kv_heads, -1, dim)
        grads_out = work.copy("grad", grad[place])
        inner = work.copy("out", out[place]).mul_(grads_out).sum(-1)
        log_total = finite(lse[place]).unsqueeze(-1)
        left = None
        if any_large and large(log_total):
            left = denominators(scores_of, tile, rows, k, log_total, sinks)
        if sinks is not None and "sinks" in total:
            share = (sinks[tile.heads].to(acc)[:, None, None] - log_total).exp_()
            share = share if left is None else share.div_(left)
            total["sinks"][tile.heads] -= share.squeeze(-1).mul_(inner).sum(-1)
        if total.keys() <= {"sinks"}:
            continue
        blank = None
        if blanks is not None and bool(blanks[place].any()):
            blank = blanks[place].unsqueeze(-1)
        by_kv = grads_out.view(kv_heads, -1, value_dim)
        grads_q = work.take("grad q", *rows.shape).zero_()
        for some in scores_of.ranges(tile, every=blank is not None):
            there = (tile.batch, tile.kv_heads, some)
            p = product("scores", work, rows, k[there].mT)
            slope = work.take("slope", *p.shape).view(shape) if softcap else None
            scores_of.of_(tile, some, p.view(shape), slope)
            p.view(shape).sub_(log_total).exp_()
            if left is not None:
                p.view(shape).div_(left)
            if blank is not None:
                p.view(shape).masked_fill_(blank, float("nan") if empty == "nan" else 1 / keys)
            if "v" in total:
                total["v"][there] += product("part", work, p.mT, by_kv)
            d = product("grad scores", work, by_kv, v[there].mT)
            d.view(shape).sub_(inner.unsqueeze(-1)).mul_(p.view(shape))
            if blank is not None:
                d.view(shape).masked_fill_(blank & scores_of.stops(tile, some, empty, d.view(shape)), 0.0)
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


def finite(lse: torch.Tensor) -> torch.Tensor:
    """0 in the place of -inf."""
    return lse.masked_fill(lse.isneginf(), 0.0)


def large(lse: torch.Tensor) -> bool:
    """Whether some lse is rounded too much to weigh keys by it: a row that an additive mask covers wholly has such.

    At the lowest number of a dtype the lse of n keys is that number, and n is lost.
    """
    return bool((finite(lse).abs() > LARGE_LSE).any())


def denominators(
    scores_of: Scores,
    tile: Tile,
    rows: torch.Tensor,
    k: torch.Tensor,
    log_total: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``sum(exp(scores - lse))`` [heads, tile, 1]: 1 but for what was lost when the lse was rounded."""
    left = torch.zeros_like(log_total)
    if sinks is not None:
        left += (sinks[tile.heads].to(left.dtype)[:, None, None] - log_total).exp_()
    for some in scores_of.ranges(tile):
        scores = product("scores", scores_of.work, rows, k[tile.batch, tile.kv_heads, some].mT)
        scores = scores.view(*log_total.shape[:2], -1)
        scores_of.of_(tile, some, scores)
        left += scores.sub_(log_total).exp_().sum(-1, keepdim=True)
    return left.clamp_(min=torch.finfo(left.dtype).tiny)  # 0 where there is no key
