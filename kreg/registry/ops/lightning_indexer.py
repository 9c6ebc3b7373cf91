"""``lightning_indexer``: which compressed entries each query should attend to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops.attention import accumulation_dtype
from kreg.registry.ops.sparse_attention import ready

SCHEMA = """(
    Tensor q, Tensor k, Tensor weights, *, float scale, SymInt topk, int ratio, SymInt offset=0,
    bool scored=False
) -> (Tensor indices, Tensor scores)"""

TENSORS = {
    "q": "batch queries index_heads index_dim",
    "k": "batch entries index_dim",
    "weights": "batch queries index_heads",
}


def all_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """``sum_h weights[s, h] * relu(q[s, h] . k[j]) * scale``: [batch, queries, entries], before any mask."""
    acc = accumulation_dtype(q.dtype)
    products = torch.relu(q.to(acc) @ k.to(acc).transpose(-1, -2).unsqueeze(1)) * scale
    return (products * weights.to(acc).unsqueeze(-1)).sum(dim=2)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    scored: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``topk`` best-scored entries among those that are causally ready.

    Args:
        q: [batch, queries, index_heads, index_dim].
        k: [batch, entries, index_dim], one shared key head.
        weights: [batch, queries, index_heads].
        scale: factor on the rectified products.
        topk: how many entries to select, at most ``entries``.
        ratio: positions in one entry; readiness as in ``sparse_attention``: entry j is ready for the query at
            position p when ``(j + 1) * ratio <= p + 1``. 0: every entry is ready.
        offset: query s stands at position ``s + offset``.
        scored: also return the selected scores.

    Returns:
        indices int64 [batch, queries, topk]: distinct entries in an order that is not part of the contract,
        -1 wherever fewer than ``topk`` are ready, at any place; equal scores are broken either way. scores
        [batch, queries, topk] in the accumulation dtype, -inf beside a -1, differentiable;
        [batch, queries, 0] unless ``scored``.
    """
    scores = all_scores(q, k, weights, scale)
    if ratio:
        allowed = ready(q.shape[1], k.shape[1], ratio=ratio, offset=offset, device=q.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    best = scores.topk(topk, dim=-1)
    indices = torch.where(best.values == float("-inf"), -1, best.indices)
    return indices, best.values if scored else scores.new_empty(*scores.shape[:2], 0)


def fake(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, *, topk: int, scored: bool = False, **rest: Any
) -> tuple[torch.Tensor, ...]:
    """Shapes and dtypes of `reference`."""
    indices = q.new_empty(q.shape[0], q.shape[1], topk, dtype=torch.int64)
    return indices, q.new_empty(q.shape[0], q.shape[1], topk if scored else 0, dtype=accumulation_dtype(q.dtype))


def selected_score_error(arguments: Arguments, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """How far apart two selections are: the largest difference between their scores, best to worst, relative
    to the largest score (of size 1 at least).

    Selections that differ only among (nearly) equal scores are (nearly) equal. An index twice, out of range,
    or not ready is an infinite error.
    """
    a, b = got[0], want[0]
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    scores = all_scores(
        arguments["q"].double(), arguments["k"].double(), arguments["weights"].double(), arguments["scale"]
    )
    entries = scores.shape[-1]
    if arguments["ratio"]:
        allowed = ready(
            a.shape[1], entries, ratio=arguments["ratio"], offset=arguments.get("offset", 0), device=a.device
        )
        scores = scores.masked_fill(~allowed, float("-inf"))
    padded = torch.cat([scores, scores.new_full((*scores.shape[:2], 1), float("-inf"))], dim=-1)

    def ranked(indices: torch.Tensor) -> torch.Tensor | None:
        if int(indices.max()) >= entries:
            return None
        slots = torch.where(indices < 0, entries, indices)
        counts = torch.zeros_like(padded, dtype=torch.int64).scatter_add_(-1, slots, torch.ones_like(slots))
        if counts[..., :entries].gt(1).any():
            return None
        values = padded.gather(-1, slots)
        if (values.isneginf() & (indices >= 0)).any():
            return None
        return values.sort(dim=-1, descending=True).values

    first, second = ranked(a), ranked(b)
    if first is None or second is None or not torch.equal(first.isneginf(), second.isneginf()):
        return float("inf")
    largest = float(scores.masked_fill(scores.isinf(), 0.0).abs().max())
    return float((first - second).abs().nan_to_num(nan=0.0).max()) / max(1.0, largest)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Fewer ready than asked, all asked, one query, none ready, no entries, decode with an offset."""

    def call(batch: int, queries: int, heads: int, dim: int, entries: int, **rest: Any) -> dict[str, Any]:
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return {
            "q": make(batch, queries, heads, dim),
            "k": make(batch, entries, dim),
            "weights": make(batch, queries, heads),
            "scale": dim**-0.5,
            "ratio": 4,
        } | rest

    yield call(1, 1, 1, 8, 1, topk=1, ratio=1)
    yield call(2, 37, 4, 16, 9, topk=3)
    yield call(2, 37, 4, 16, 9, topk=9)
    yield call(1, 300, 2, 16, 75, topk=8, scored=True)
    yield call(2, 37, 4, 16, 9, topk=4, scored=True)
    yield call(1, 3, 2, 8, 0, topk=0)
    yield call(1, 3, 2, 8, 2, topk=2, ratio=8)
    yield call(2, 2, 2, 8, 20, topk=5, offset=78)
    yield call(2, 6, 2, 8, 20, topk=5, ratio=0)


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """One matrix product over the ready entries; queries, keys and indices once."""
    rows = float(dims["batch"]) * float(dims["queries"])
    ready_entries = float(dims["entries"]) * (0.5 if attributes.get("ratio") else 1.0)
    width = float(dims["index_heads"]) * float(dims["index_dim"])
    return 2 * rows * ready_entries * width, 4 * (rows * width + float(dims["entries"]) * float(dims["index_dim"]))


LIGHTNING_INDEXER = Op(
    name="lightning_indexer",
    summary="relu-scored, head-weighted, causal top-k over compressed entries",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("q", "k", "weights"),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    error=selected_score_error,
    source="DeepSeek-V3.2-Exp, eq. 1; DeepSeek-V4 technical report, eqs. 13-17",
)
