"""``selected_attention``: attention of each query over the keys, or blocks of keys, that an index names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops.attention import EMPTY, accumulation_dtype, band, empty_rows, softmax_or

SCHEMA = """(
    Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? sinks=None, Tensor? padding=None, *,
    float scale, float softcap=0.0, bool causal=False, int window=0, SymInt offset=0, int block=1,
    str empty="zero"
) -> (Tensor out, Tensor lse)"""

TENSORS = {
    "q": "batch heads queries head_dim",
    "k": "batch kv_heads keys head_dim",
    "v": "batch kv_heads keys value_dim",
    "indices": "batch index_heads queries selected",
    "sinks": "heads",
    "padding": "batch keys",
}


def named(indices: torch.Tensor, keys: int, block: int) -> torch.Tensor:
    """Which keys the indices name: bool [batch, index_heads, queries, keys]; an index out of range names none."""
    blocks = -(-keys // block)
    found = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    found.scatter_(-1, torch.where((indices < 0) | (indices > blocks), blocks, indices).long(), True)
    return found[..., :blocks].repeat_interleave(block, dim=-1)[..., :keys]


def reference(
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
    """softmax(cap(scale * q @ k^T), over the keys that are named and kept, and the sink) @ v.

    Args:
        q: [batch, heads, queries, head_dim].
        k, v: [batch, kv_heads, keys, head_dim | value_dim]; query head h reads kv head
            ``h // (heads // kv_heads)``.
        indices: int32 or int64 [batch, index_heads, queries, selected]: index i names keys ``i * block`` to
            ``(i + 1) * block - 1``, as far as there are keys. Those out of range name nothing, and a key that is
            named twice counts once. Query head h reads index head ``h // (heads // index_heads)``.
        sinks: [heads]: one more logit in each softmax's denominator, with no value behind it.
        padding: bool [batch, keys], True where a key is kept.
        scale: factor on q @ k^T.
        softcap: c > 0 turns scores x into ``c * tanh(x / c)`` before the masks; 0 leaves them.
        causal, window, offset: keep keys by position as in ``attention``.
        empty: what a query gives that is left without keys, where there is no sink; see `attention.EMPTY`.

    Returns:
        out [batch, heads, queries, value_dim] in q's dtype, stored as [batch, queries, heads, value_dim];
        lse [batch, heads, queries], the log of the softmax's denominator in the accumulation dtype, -inf for a
        query that is left without keys, whatever ``empty`` says.
    """
    empty = empty_rows(empty, sinks)
    acc = accumulation_dtype(q.dtype)
    heads, (kv_heads, keys) = q.shape[1], k.shape[1:3]
    every_k, every_v = (x.to(acc).repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    unmasked = (q.to(acc) @ every_k.transpose(-1, -2)) * scale
    if softcap:
        unmasked = softcap * torch.tanh(unmasked / softcap)
    keep = named(indices, keys, block).repeat_interleave(heads // indices.shape[1], dim=1)
    near = band(q.shape[2], keys, causal=causal, window=window, offset=offset, device=q.device)
    if near is not None:
        keep = keep & near
    if padding is not None:
        keep = keep & padding[:, None, None, :]
    scores = unmasked.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    out = softmax_or(empty, scores, unmasked)[..., :keys] @ every_v
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Shapes, dtypes and strides of `reference`."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))


def random_indices(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Any keys or blocks, some of them twice, the first one always; none is negative: not all code knows such indices.

    With `first_kept` a causal mask leaves every query a key. Of one without, PyTorch's fused attention gets the
    gradient wrong where its mask is a large finite number, and so would not agree with itself.
    """
    count = -(-arguments["k"].shape[2] // arguments.get("block", 1))
    found = torch.randint(0, max(1, count), shape, generator=generator)
    found[..., :1] = 0
    return found.to(dtype)


def first_kept(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Keys kept with probability 0.8, the first one always."""
    kept = torch.rand(shape, generator=generator) < 0.8
    kept[:, :1] = True
    return kept.to(dtype)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Distinct and repeated indices, none, blocks that end past the last key, every mask, rows without keys."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def call(heads: tuple[int, int, int], queries: int, keys: int, selected: int, **more: Any) -> dict[str, Any]:
        (own, kv, index), batch = heads, more.pop("batch", 2)
        arguments = {
            "q": make(batch, own, queries, 16),
            "k": make(batch, kv, keys, 16),
            "v": make(batch, kv, keys, 12),
            "scale": 0.25,
        } | more
        if "indices" not in more:
            found = random_indices((batch, index, queries, selected), torch.int64, generator, arguments)
            absent = torch.rand(found.shape, generator=generator) < 0.2
            arguments["indices"] = found.masked_fill(absent, -1)
        return arguments

    some = torch.rand(2, 90, generator=generator) < 0.6
    yield call((1, 1, 1), 1, 1, 1, batch=1)
    yield call((4, 4, 1), 90, 90, 7, causal=True)
    yield call((4, 2, 1), 90, 90, 60, causal=True, sinks=make(4))
    yield call((4, 2, 2), 90, 88, 3, causal=True, block=5, offset=-2)
    yield call((4, 2, 4), 40, 90, 3, block=7, padding=some, softcap=2.0)
    yield call((4, 1, 2), 9, 90, 30, causal=True, offset=81, window=30, softcap=3.0)
    yield call((2, 2, 1), 90, 90, 5, causal=True, window=20, sinks=make(2), padding=some)
    yield call((2, 2, 1), 4, 9, 2, indices=torch.full((2, 1, 4, 2), -1, dtype=torch.int32), sinks=make(2))
    yield call((2, 1, 1), 40, 90, 3, indices=torch.full((2, 1, 40, 3), 8, dtype=torch.int32))
    for empty in EMPTY:
        yield call((4, 4, 1), 90, 90, 6, causal=True, empty=empty)
        yield call((4, 2, 2), 60, 90, 4, causal=True, padding=some, empty=empty, softcap=2.0)
        yield call((2, 2, 1), 70, 70, 50, causal=True, empty=empty)
        yield call((2, 1, 1), 5, 9, 0, empty=empty)
        yield call((2, 1, 1), 5, 0, 0, empty=empty)


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """Two matrix products over the keys that are named and kept; q, k, v and out once."""
    keys = float(dims["keys"])
    seen = keys * (0.5 if attributes.get("causal") else 1.0)
    if attributes.get("window"):
        seen = min(seen, float(attributes["window"]))
    seen = min(seen, float(dims["selected"]) * float(attributes.get("block") or 1))
    rows = float(dims["batch"]) * float(dims["heads"]) * float(dims["queries"])
    widths = float(dims["head_dim"]) + float(dims["value_dim"])
    stored = float(dims["batch"]) * float(dims["kv_heads"]) * keys
    return 2 * rows * seen * widths, 4 * (rows + stored) * widths


SELECTED_ATTENTION = Op(
    name="selected_attention",
    summary="attention of each query over the keys, or blocks of keys, that an index names; causal, padding, sinks",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("q", "k", "v", "sinks"),
    no_gradient=("lse",),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={"indices": random_indices, "padding": first_kept},
    source="DeepSeek-V3.2-Exp, section 2.1; blocks: MiniMax-M3",
)
