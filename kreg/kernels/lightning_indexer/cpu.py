"""``lightning_indexer`` in plain PyTorch, a tile of queries at a time."""

from __future__ import annotations

import torch

from kreg.kernels.tiles import GATHERED_PER_TILE, Workspace, product, spans
from kreg.registry.ops.attention import accumulation_dtype

PRODUCTS_PER_TILE = 1 << 20
"""Products of all heads held at once: past the cache, but their matrix product has rows enough."""

GATHER_ABOVE = 2
"""The backward pass gathers selected keys when there are this many times more entries than selected ones."""

ROWS_PER_SELECTION = 256
"""Queries whose scores are selected from together: enough of them for ``topk`` to share between threads."""


def ready_count(position: int, entries: int, ratio: int) -> int:
    """How many entries are ready for the query at ``position``."""
    return min(entries, max(0, position + 1) // ratio) if ratio else entries


def scores_into(scores: torch.Tensor, work: Workspace, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> None:
    """Write ``sum_h weights[s, h] * relu(q[s, h] . k[j])`` to scores [rows, entries]; k is [entries, dim]."""
    _, heads, dim = q.shape
    step = max(1, PRODUCTS_PER_TILE // (heads * max(1, len(k))))
    for start, stop in spans(0, len(q), step):
        rows = work.dense("q", q[start:stop]).view(-1, dim)
        products = torch.mm(rows, k.mT, out=work.take("products", len(rows), len(k))).relu_()
        by_head = work.dense("weights", weights[start:stop]).unsqueeze(1)
        torch.bmm(by_head, products.view(stop - start, heads, -1), out=scores[start:stop].unsqueeze(1))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    padding: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    *,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    scored: bool = False,
    sentinel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected entries and their scores; nothing is scored where every ready entry is selected anyway."""
    acc = accumulation_dtype(q.dtype)
    batch, queries = q.shape[:2]
    entries = k.shape[1]
    indices = q.new_empty(batch, queries, topk, dtype=torch.int64)
    best = q.new_empty(batch, queries, topk if scored else 0, dtype=acc)
    work = Workspace(q, acc)
    order = torch.arange(max(topk, entries), device=q.device)
    for start, stop in spans(0, queries, ROWS_PER_SELECTION):
        position = torch.arange(start + offset, stop + offset, device=q.device).unsqueeze(1)
        counts = (position + 1) // ratio if ratio else torch.full_like(position, entries)
        most = ready_count(stop - 1 + offset, entries, ratio)
        unready = order >= counts.clamp(max=entries)
        for b in range(batch):
            late = unready
            if padding is not None:
                late = late[:, :entries] | ~padding[b]
            if ends is not None:
                late = late[:, :entries] | (ends[b] > position)
            if most <= topk:
                first = order[:topk]
                indices[b, start:stop] = first.masked_fill(late[:, :topk], -1) if sentinel else first
                if not scored:
                    continue
            scores = work.take("scores", stop - start, most)
            scores_into(scores, work, q[b, start:stop], k[b, :most].to(acc), weights[b, start:stop])
            scores.mul_(scale).masked_fill_(late[:, :most], float("-inf"))
            if most <= topk:
                best[b, start:stop, :most] = scores
                best[b, start:stop, most:] = float("-inf")
                continue
            values, places = scores.topk(topk, dim=-1, sorted=False)
            indices[b, start:stop] = places.masked_fill_(values.isneginf(), -1) if sentinel else places
            if scored:
                best[b, start:stop] = values
    return indices, best


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    padding: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    scored: bool = False,
    sentinel: bool = True,
) -> dict[str, torch.Tensor]:
    """Gradients of the selected scores: ``weights * relu(q . k)`` again, for the selected entries only."""
    acc = accumulation_dtype(q.dtype)
    (batch, queries, heads, dim), entries = q.shape, k.shape[1]
    arguments = {"q": q, "k": k, "weights": weights}
    wanted = {name: value for name, value in arguments.items() if name in needs}
    total = {name: torch.zeros(value.shape, dtype=acc, device=q.device) for name, value in wanted.items()}
    grad, (indices, best) = grads[1], outputs
    work = Workspace(q, acc)
    gather = entries > GATHER_ABOVE * topk
    columns = topk if gather else entries
    size = PRODUCTS_PER_TILE // (heads * max(1, columns))
    if gather:
        size = min(size, GATHERED_PER_TILE // max(1, topk * dim))
    nothing = grad is None or not scored or not columns
    for b in range(0 if nothing else batch):
        assert grad is not None
        keys_b = k[b].to(acc).contiguous()
        for start, stop in spans(0, queries, max(1, size)):
            chosen = indices[b, start:stop]
            by_score = work.take("by score", stop - start, topk).copy_(grad[b, start:stop]).mul_(scale)
            by_score.masked_fill_(best[b, start:stop].isneginf(), 0.0)  # not ready
            if gather:
                chosen = chosen.clamp(min=0)
                keys = work.take("keys", chosen.numel(), dim)
                torch.index_select(keys_b, 0, chosen.flatten(), out=keys)
                keys = keys.view(stop - start, topk, dim)
            else:
                everywhere = work.take("everywhere", stop - start, entries + 1).zero_()
                by_score = everywhere.scatter_(1, chosen.remainder(entries + 1), by_score)[:, :entries]
                keys = keys_b.unsqueeze(0)
            # One batch of matrices per query when gathered, one in all when the keys are the tile's.
            shape = (len(keys), -1, dim)
            rows = work.dense("q", q[b, start:stop]).view(shape)
            x = product("products", work, rows, keys.mT).relu_()
            by_head = x.view(stop - start, heads, columns)
            if "weights" in total:
                torch.bmm(by_head, by_score.unsqueeze(-1), out=total["weights"][b, start:stop].unsqueeze(-1))
            by_head.gt_(0.0).mul_(by_score.unsqueeze(1)).mul_(weights[b, start:stop].to(acc).unsqueeze(-1))
            if "q" in total:
                torch.bmm(x, keys, out=total["q"][b, start:stop].view(shape))
            if "k" in total and gather:
                found = product("keys", work, x.mT, rows).view(-1, dim)
                total["k"][b].index_add_(0, chosen.flatten(), found)
            elif "k" in total:
                total["k"][b].addmm_(x[0].mT, rows[0])
    return {name: total[name].to(value.dtype) for name, value in wanted.items()}
