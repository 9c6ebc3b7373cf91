"""``lightning_indexer``: which keys, or compressed entries of keys, each query should attend to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops.attention import accumulation_dtype
from kreg.registry.ops.sparse_attention import ready

SCHEMA = """(
    Tensor q, Tensor k, Tensor weights, Tensor? padding=None, Tensor? ends=None, *, float scale, SymInt topk,
    int ratio, SymInt offset=0, bool scored=False, bool sentinel=True
) -> (Tensor indices, Tensor scores)"""

TENSORS = {
    "q": "batch queries index_heads index_dim",
    "k": "batch entries index_dim",
    "weights": "batch queries index_heads",
    "padding": "batch entries",
    "ends": "batch entries",
}


def all_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """``sum_h weights[s, h] * relu(q[s, h] . k[j]) * scale``: [batch, queries, entries], before any mask."""
    acc = accumulation_dtype(q.dtype)
    products = torch.relu(q.to(acc) @ k.to(acc).transpose(-1, -2).unsqueeze(1)) * scale
    return (products * weights.to(acc).unsqueeze(-1)).sum(dim=2)


def masked(
    scores: torch.Tensor,
    padding: torch.Tensor | None,
    ends: torch.Tensor | None = None,
    *,
    ratio: int,
    offset: int,
) -> torch.Tensor:
    """Scores [batch, queries, entries] with -inf where an entry is not ready for a query, or padding."""
    if ratio:
        allowed = ready(*scores.shape[1:], ratio=ratio, offset=offset, device=scores.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if ends is not None:
        position = torch.arange(offset, offset + scores.shape[1], device=scores.device).unsqueeze(1)
        scores = scores.masked_fill(ends.unsqueeze(1) > position, float("-inf"))
    return scores if padding is None else scores.masked_fill(~padding.unsqueeze(1), float("-inf"))


def reference(
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
    """The ``topk`` best-scored entries among those that are ready: causally, and no padding.

    Args:
        q: [batch, queries, index_heads, index_dim].
        k: [batch, entries, index_dim], one shared key head.
        weights: [batch, queries, index_heads].
        padding: bool [batch, entries], True where an entry may be selected.
        ends: int64 [batch, entries], the last position of each entry, where entries are not of equally many
            positions from the first on: entry j is ready for the query at position p when ``ends[j] <= p``, and
            as ``ratio`` has it.
        scale: factor on the rectified products.
        topk: how many entries to select, at most ``entries``.
        ratio: positions in one entry; readiness as in ``sparse_attention``: entry j is ready for the query at
            position p when ``(j + 1) * ratio <= p + 1``; 1 is plainly causal. 0: every entry is ready, but for
            ``ends``.
        offset: query s stands at position ``s + offset``.
        scored: also return the selected scores.
        sentinel: what a slot holds that no ready entry is left for: -1, or, where False, any other entry that
            is in no other slot of the query.

    Returns:
        indices int64 [batch, queries, topk]: distinct entries in an order that is not part of the contract,
        those that are not ready at any place; equal scores are broken either way. scores
        [batch, queries, topk] in the accumulation dtype, -inf beside what is not ready, differentiable;
        [batch, queries, 0] unless ``scored``.
    """
    scores = masked(all_scores(q, k, weights, scale), padding, ends, ratio=ratio, offset=offset)
    best = scores.topk(topk, dim=-1)
    indices = best.indices.masked_fill(best.values.isneginf(), -1) if sentinel else best.indices
    return indices, best.values if scored else scores.new_empty(*scores.shape[:2], 0)


def fake(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, *more: Any, topk: int, scored: bool = False, **rest: Any
) -> tuple[torch.Tensor, ...]:
    """Shapes and dtypes of `reference`."""
    indices = q.new_empty(q.shape[0], q.shape[1], topk, dtype=torch.int64)
    return indices, q.new_empty(q.shape[0], q.shape[1], topk if scored else 0, dtype=accumulation_dtype(q.dtype))


def selected_score_error(arguments: Arguments, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """How far apart two selections are: the largest difference between their scores, best to worst, relative
    to the largest score (of size 1 at least).

    Selections that differ only among (nearly) equal scores are (nearly) equal. An index twice or out of range is
    an infinite error, and so is one that is not ready where it should be -1, or -1 where it should be an entry.
    """
    a, b = got[0], want[0]
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    scores = all_scores(
        arguments["q"].double(), arguments["k"].double(), arguments["weights"].double(), arguments["scale"]
    )
    entries, sentinel = scores.shape[-1], arguments.get("sentinel", True)
    masks = arguments.get("padding"), arguments.get("ends")
    scores = masked(scores, *masks, ratio=arguments["ratio"], offset=int(arguments.get("offset", 0)))
    padded = torch.cat([scores, scores.new_full((*scores.shape[:2], 1), float("-inf"))], dim=-1)

    def ranked(indices: torch.Tensor) -> torch.Tensor | None:
        if int(indices.max()) >= entries:
            return None
        slots = torch.where(indices < 0, entries, indices)
        counts = torch.zeros_like(padded, dtype=torch.int64).scatter_add_(-1, slots, torch.ones_like(slots))
        if counts[..., :entries].gt(1).any():
            return None
        values = padded.gather(-1, slots)
        if bool((values.isneginf() & (indices >= 0)).any() if sentinel else (indices < 0).any()):
            return None
        return values.sort(dim=-1, descending=True).values

    first, second = ranked(a), ranked(b)
    if first is None or second is None or not torch.equal(first.isneginf(), second.isneginf()):
        return float("inf")
    largest = float(scores.masked_fill(scores.isinf(), 0.0).abs().max())
    return float((first - second).abs().nan_to_num(nan=0.0).max()) / max(1.0, largest)


def random_ends(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Any positions of queries, in no order."""
    positions = arguments["q"].shape[1] + int(arguments.get("offset", 0))
    return torch.randint(0, max(1, positions), shape, generator=generator).to(dtype)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Fewer ready than asked, all asked, one query, none ready, no entries, decode with an offset, any ends."""

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
    some = torch.rand(2, 40, generator=generator) < 0.5
    none = some & torch.tensor([[False], [True]])
    for sentinel in (True, False):
        yield call(2, 40, 4, 16, 40, topk=7, ratio=1, sentinel=sentinel)
        yield call(2, 40, 2, 16, 40, topk=7, ratio=1, padding=some, sentinel=sentinel)
        yield call(2, 300, 2, 16, 40, topk=40, ratio=0, padding=none, sentinel=sentinel)
        yield call(2, 300, 2, 16, 40, topk=5, ratio=4, padding=none, sentinel=sentinel, scored=sentinel)
        ends = torch.randint(-2, 45, (2, 40), generator=generator)
        yield call(2, 40, 2, 16, 40, topk=7, ratio=0, ends=ends, sentinel=sentinel, scored=sentinel)
        yield call(2, 300, 4, 16, 40, topk=5, ratio=4, ends=ends, padding=none, sentinel=sentinel, scored=sentinel)
        yield call(2, 3, 2, 16, 40, topk=40, ratio=0, ends=ends, padding=some, offset=9, sentinel=sentinel)
    yield call(1, 5, 2, 8, 9, topk=3, ratio=1, offset=-3, sentinel=False)
    late = torch.full((1, 9), 7)
    yield call(1, 5, 2, 8, 9, topk=3, ratio=0, ends=late, scored=True)
    yield call(1, 3, 2, 8, 0, topk=0, ratio=0, ends=late[:, :0])


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """One matrix product over the ready entries; queries, keys and indices once."""
    rows = float(dims["batch"]) * float(dims["queries"])
    ready_entries = float(dims["entries"]) * (0.5 if attributes.get("ratio") else 1.0)
    width = float(dims["index_heads"]) * float(dims["index_dim"])
    return 2 * rows * ready_entries * width, 4 * (rows * width + float(dims["entries"]) * float(dims["index_dim"]))


LIGHTNING_INDEXER = Op(
    name="lightning_indexer",
    summary="relu-scored, head-weighted, causal top-k over keys or compressed entries",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("q", "k", "weights"),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={"ends": random_ends},
    error=selected_score_error,
    source="DeepSeek-V3.2-Exp, eq. 1; DeepSeek-V4 technical report, eqs. 13-17; ends: GLM-5.3's pools of keys",
)
