"""``sparse_attention``: shared-KV attention over a sliding window and compressed entries, with sinks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops.attention import accumulation_dtype, band, softmax_or_zero

SCHEMA = """(
    Tensor q, Tensor kv, Tensor? compressed=None, Tensor? indices=None, Tensor? sinks=None,
    Tensor? padding=None, *, float scale, int window, int ratio=0, SymInt offset=0
) -> (Tensor out, Tensor lse)"""

TENSORS = {
    "q": "batch heads queries head_dim",
    "kv": "batch keys head_dim",
    "compressed": "batch entries head_dim",
    "indices": "batch queries selected",
    "sinks": "heads",
    "padding": "batch keys",
}


def ready(queries: int, entries: int, *, ratio: int, offset: int, device: torch.device) -> torch.Tensor:
    """Which compressed entries are causally ready: bool [queries, entries].

    Entry ``j`` summarises positions ``j * ratio`` to ``(j + 1) * ratio - 1``; query ``s`` at position
    ``s + offset`` may read it once its last position is not in the future: ``(j + 1) * ratio <= s + offset + 1``.
    """
    position = torch.arange(queries, device=device).unsqueeze(1) + offset
    return (torch.arange(entries, device=device) + 1) * ratio <= position + 1


def selection(indices: torch.Tensor, entries: int) -> torch.Tensor:
    """Selected entries as a bool mask [batch, queries, entries]; indices below 0 select nothing."""
    chosen = torch.zeros(*indices.shape[:2], entries + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, torch.where(indices < 0, entries, indices).long(), True)
    return chosen[..., :entries]


def reference(
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
    """One softmax over a causal window of ``kv``, some entries of ``compressed``, and a sink.

    Args:
        q: [batch, heads, queries, head_dim].
        kv: [batch, keys, head_dim], both key and value of every head. Query s, at position ``s + offset``,
            sees keys t with ``s + offset - window < t <= s + offset``.
        compressed: [batch, entries, head_dim], further keys and values, each standing for ``ratio`` positions.
        indices: int32 or int64 [batch, queries, selected]: the entries a query sees, distinct, in any order;
            negative ones select nothing. Where ``ratio`` is given, each is `ready`: a kernel may hold them to that
            again. None: every entry that is `ready`.
        sinks: [heads]: one more logit in the denominator.
        padding: bool [batch, keys], True where a key of ``kv`` is kept.
        scale: factor on the scores.
        window: width of the sliding window, at least 1.
        ratio: positions in one compressed entry; needed unless ``compressed`` is None or ``indices`` given.

    Returns:
        out [batch, heads, queries, head_dim] in q's dtype, stored as [batch, queries, heads, head_dim], 0 for
        a query that sees nothing; lse [batch, heads, queries] in the accumulation dtype.
    """
    acc = accumulation_dtype(q.dtype)
    batch, _, queries, _ = q.shape
    keep = band(queries, kv.shape[1], causal=True, window=window, offset=offset, device=q.device)
    assert keep is not None
    keep = keep.expand(batch, -1, -1)
    if padding is not None:
        keep = keep & padding.unsqueeze(1)
    keys = kv
    if compressed is not None:
        entries = compressed.shape[1]
        keys = torch.cat([kv, compressed], dim=1)
        if indices is not None:
            seen = selection(indices, entries)
        else:
            seen = ready(queries, entries, ratio=ratio, offset=offset, device=q.device).expand(batch, -1, -1)
        keep = torch.cat([keep, seen], dim=-1)
    keys = keys.to(acc).unsqueeze(1)
    scores = (q.to(acc) @ keys.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~keep.unsqueeze(1), float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc).view(1, -1, 1, 1).expand(batch, -1, queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = softmax_or_zero(scores)
    out = weights[..., : keys.shape[2]] @ keys
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def fake(q: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Shapes, dtypes and strides of `reference`."""
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))


def random_indices(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Distinct entries per query, ready ones where there is a ratio; about a fifth of them replaced by -1."""
    batch, queries, selected = shape
    entries, ratio = arguments["compressed"].shape[1], int(arguments.get("ratio") or 0)
    order = torch.rand(batch, queries, max(entries, selected), generator=generator).argsort(-1)[..., :selected]
    dropped = (torch.rand(shape, generator=generator) < 0.2) | (order >= entries)
    if ratio:
        position = torch.arange(queries).unsqueeze(1) + int(arguments.get("offset", 0))
        dropped |= (order + 1) * ratio > position + 1
    return torch.where(dropped, -1, order).to(dtype)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Window only, all ready entries, top-k; none ready, none selected, one key, padding, sizes off the ratio."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def call(batch: int, heads: int, queries: int, dim: int, **rest: Any) -> dict[str, Any]:
        return {
            "q": make(batch, heads, queries, dim),
            "kv": make(batch, queries, dim),
            "sinks": make(heads),
            "scale": dim**-0.5,
            "window": 8,
        } | rest

    yield call(1, 1, 1, 8)
    yield call(2, 4, 19, 16)
    yield call(1, 2, 19, 16, sinks=None, window=1)
    yield call(2, 4, 37, 16, compressed=make(2, 9, 16), ratio=4)
    yield call(1, 3, 150, 16, compressed=make(1, 2, 16), ratio=70, window=128)
    yield call(2, 2, 5, 16, compressed=make(2, 0, 16), ratio=8)
    for selected in (3, 9):
        compressed = make(2, 9, 16)
        indices = random_indices((2, 37, selected), torch.int64, generator, {"compressed": compressed, "ratio": 4})
        yield call(2, 4, 37, 16, compressed=compressed, indices=indices, ratio=4)
    compressed = make(2, 40, 16)
    indices = random_indices((2, 160, 12), torch.int32, generator, {"compressed": compressed, "ratio": 4})
    yield call(2, 4, 160, 16, compressed=compressed, indices=indices, ratio=4, window=33)
    yield call(1, 2, 6, 16, compressed=make(1, 3, 16), indices=torch.full((1, 6, 2), -1), ratio=2)
    yield call(1, 2, 6, 16, compressed=make(1, 0, 16), indices=torch.empty(1, 6, 0, dtype=torch.int64), ratio=8)
    keep = torch.ones(2, 37, dtype=torch.bool)
    keep[0, :11] = False
    keep[1, 20:] = False
    yield call(2, 4, 37, 16, compressed=make(2, 9, 16), ratio=4, padding=keep)
    yield call(2, 4, 37, 16, sinks=None, padding=keep)
    yield call(2, 2, 3, 16, kv=make(2, 20, 16), offset=17, compressed=make(2, 5, 16), ratio=4)


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """Two matrix products over the keys a query sees; q, keys and out once, selected entries gathered."""
    rows = float(dims["batch"]) * float(dims["heads"]) * float(dims["queries"])
    dim = float(dims["head_dim"])
    entries = float(dims.get("entries", 0))
    seen = min(entries, float(dims["selected"])) if "selected" in dims else entries / 2
    keys = min(float(attributes["window"]), float(dims["keys"])) + seen
    gathered = float(dims["batch"]) * (float(dims["keys"]) + entries) * dim
    return 4 * rows * keys * dim, 4 * (2 * rows * dim + gathered)


SPARSE_ATTENTION = Op(
    name="sparse_attention",
    summary="shared-KV attention over a sliding window plus selected or all ready compressed entries, with sinks",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("q", "kv", "compressed", "sinks"),
    no_gradient=("lse",),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={"indices": random_indices},
    source="DeepSeek-V4 technical report, sections 2.3.1 and 2.3.2; sinks: gpt-oss",
)
