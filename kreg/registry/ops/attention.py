"""``attention``: softmax attention with grouped heads, scale, soft cap, sinks, and the masks that models have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op

SCHEMA = """(
    Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? mask=None, Tensor? sinks=None,
    Tensor? padding=None, Tensor? documents=None, *, float scale, float softcap=0.0, bool causal=False,
    int window=0, int chunk=0, SymInt prefix=0, SymInt offset=0, str empty="zero"
) -> (Tensor out, Tensor lse)"""

TENSORS = {
    "q": "batch heads queries head_dim",
    "k": "batch kv_heads keys head_dim",
    "v": "batch kv_heads keys value_dim",
    "bias": "1|batch 1|heads 1|queries 1|keys",
    "mask": "1|batch 1|heads 1|queries 1|keys",
    "sinks": "heads",
    "padding": "batch keys",
    "documents": "batch keys",
}

EMPTY = {
    "zero": "weights 0: what a boolean mask of scaled_dot_product_attention gives",
    "nan": "NaN, and in the gradient of v: what a softmax over nothing but -inf gives; q and k are given none",
    "uniform": "constant weights 1 / keys over all keys: what filling with a large finite number gives",
    "shifted": "weights 1 / keys over all keys, their gradient that of a softmax: what adding such a number gives",
}
"""What a query gives that keeps no key, by the value of ``empty``."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def in_band(
    position: torch.Tensor, key: torch.Tensor, *, causal: bool, window: int, chunk: int, prefix: int
) -> torch.Tensor:
    """Whether the query at ``position`` sees ``key`` by where they stand; the two broadcast."""
    keep = torch.ones((), dtype=torch.bool, device=key.device)
    if causal:
        keep = keep & (key <= position)
    if window:
        keep = keep & (key > position - window) & (key < position + window)
    if chunk:
        keep = keep & (key // chunk == position // chunk)
    return keep | (key < prefix)


def band(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int,
    offset: int,
    device: torch.device,
    chunk: int = 0,
    prefix: int = 0,
) -> torch.Tensor | None:
    """Which keys the causal, window, chunk and prefix masks keep: bool [queries, keys], or None for all.

    Query ``s`` stands at position ``p = s + offset``. Causal keeps keys ``t <= p``; a window of W keeps
    ``p - W < t < p + W``; chunks of C keep ``t // C == p // C``, rounded down. What all of them keep is seen,
    and so are keys ``t < prefix``.
    """
    if not causal and not window and not chunk:
        return None
    position = torch.arange(queries, device=device).unsqueeze(1) + offset
    key = torch.arange(keys, device=device)
    return in_band(position, key, causal=causal, window=window, chunk=chunk, prefix=prefix)


def documents_of_queries(documents: torch.Tensor, queries: int, offset: int) -> torch.Tensor:
    """The documents of the queries' positions: [batch, queries].

    Raises:
        ValueError: a query stands where there is no key.
    """
    keys = documents.shape[1]
    if offset < 0 or offset + queries > keys:
        raise ValueError(
            f"attention: documents are given for positions 0 to {keys - 1}, "
            f"and the queries stand at {offset} to {offset + queries - 1}"
        )
    return documents[:, offset : offset + queries]


def empty_rows(empty: str, sinks: torch.Tensor | None) -> str:
    """``empty``, or "zero" where a sink takes part in every softmax.

    Raises:
        ValueError: there is no such value.
    """
    if empty not in EMPTY:
        raise ValueError(f"attention: empty is one of {', '.join(EMPTY)}, not {empty!r}")
    return "zero" if sinks is not None else empty


def softmax_or_zero(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; zeros for a row in which everything is -inf."""
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def softmax_or(empty: str, scores: torch.Tensor, unmasked: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; a row in which everything is -inf gives what ``empty`` says.

    Args:
        empty: see `EMPTY`.
        scores: with -inf where a key is masked.
        unmasked: the same before masking: what the gradient of "shifted" flows to, but for infinities.
    """
    if empty == "zero":
        return softmax_or_zero(scores)
    if empty == "nan":
        return torch.softmax(scores, dim=-1)
    rows = (scores == float("-inf")).all(dim=-1, keepdim=True)
    level = torch.zeros_like(unmasked)
    if empty == "shifted":  # zero, with the gradient of what it is made from
        level = torch.where(unmasked.isinf(), 0.0, unmasked - unmasked.detach())
    return torch.softmax(torch.where(rows, level, scores), dim=-1)


def reference(
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
    """softmax(cap(scale * q @ k^T) + bias, masked, over the keys and the sink) @ v.

    A key is kept where `band`, ``padding``, ``documents`` and ``mask`` all keep it; the others have weight 0 and
    pass no gradient.

    Args:
        q: [batch, heads, queries, head_dim].
        k, v: [batch, kv_heads, keys, head_dim | value_dim]; query head h reads kv head
            ``h // (heads // kv_heads)``.
        bias: additive, broadcastable to [batch, heads, queries, keys]. A finite number is plain addition, however
            large; a row whose kept keys are all at -inf counts as one that keeps none. NaN and +inf are not
            allowed, even for a key that is dropped.
        mask: bool, broadcastable likewise, True where a key is kept.
        sinks: [heads]: one more logit in each softmax's denominator, with no value behind it.
        padding: bool [batch, keys], True where a key is kept.
        documents: integer [batch, keys]: the query at position p keeps keys t with
            ``documents[p] == documents[t]``. Queries then stand at positions of keys:
            ``0 <= offset`` and ``offset + queries <= keys``.
        scale: factor on q @ k^T.
        softcap: c > 0 turns scores x into ``c * tanh(x / c)`` before bias and masks; 0 leaves them.
        causal, window, chunk, prefix, offset: see `band`.
        empty: what a query gives that keeps no key, where there is no sink; see `EMPTY`. With a sink it gives 0.

    Returns:
        out [batch, heads, queries, value_dim] in q's dtype, stored as [batch, queries, heads, value_dim];
        lse [batch, heads, queries], the log of the softmax's denominator in the accumulation dtype, -inf for a
        query that keeps no key, whatever ``empty`` says.
    """
    empty = empty_rows(empty, sinks)
    acc = accumulation_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    keys = k.to(acc).repeat_interleave(groups, dim=1)
    values = v.to(acc).repeat_interleave(groups, dim=1)
    scores = (q.to(acc) @ keys.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(acc)
    unmasked, queries = scores, q.shape[2]
    kept = [
        mask,
        band(
            queries,
            k.shape[2],
            causal=causal,
            window=window,
            offset=offset,
            device=q.device,
            chunk=chunk,
            prefix=prefix,
        ),
    ]
    if padding is not None:
        kept.append(padding[:, None, None, :])
    if documents is not None:
        of_queries = documents_of_queries(documents, queries, offset)
        kept.append(of_queries[:, None, :, None] == documents[:, None, None, :])
    for keep in kept:
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = softmax_or(empty, scores, unmasked)
    out = weights[..., : k.shape[2]] @ values
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Shapes, dtypes and strides of `reference`."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))


def random_padding(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Keys kept with probability 0.8, at any place."""
    return (torch.rand(shape, generator=generator) < 0.8).to(dtype)


def random_documents(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Up to five documents a row, one after the other, of any length."""
    return torch.randint(0, 5, shape, generator=generator).sort(dim=-1).values.to(dtype)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Grouped heads, cross attention, every mask and their mixtures, rows without keys, one query, one key."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    def qkv(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, value: int) -> dict[str, Any]:
        return {
            "q": make(batch, heads, queries, dim),
            "k": make(batch, kv_heads, keys, dim),
            "v": make(batch, kv_heads, keys, value),
            "scale": dim**-0.5,
        }

    def documents(batch: int, keys: int) -> torch.Tensor:
        return random_documents((batch, keys), torch.int64, generator, {})

    yield qkv(1, 1, 1, 1, 1, 8, 8)
    yield qkv(2, 4, 2, 17, 17, 16, 16) | {"causal": True}
    yield qkv(2, 4, 1, 33, 33, 16, 8) | {"causal": True, "window": 5, "sinks": make(4)}
    yield qkv(1, 6, 2, 9, 30, 16, 16) | {"causal": True, "window": 7, "offset": 21, "softcap": 3.0}
    yield qkv(2, 2, 2, 10, 12, 16, 16) | {"bias": make(1, 2, 10, 12), "softcap": 5.0}
    yield qkv(2, 4, 4, 150, 150, 16, 16) | {"mask": some(2, 1, 1, 150), "causal": True, "window": 40, "sinks": make(4)}
    yield qkv(1, 4, 2, 8, 8, 16, 16) | {"mask": torch.zeros(1, 1, 8, 8, dtype=torch.bool), "sinks": make(4)}
    yield qkv(2, 3, 1, 7, 9, 16, 16) | {"mask": some(2, 3, 7, 9), "bias": make(2, 1, 7, 9)}

    yield qkv(1, 2, 2, 40, 50, 16, 16) | {"window": 6}
    yield qkv(2, 2, 1, 37, 37, 16, 16) | {"chunk": 16, "causal": True}
    yield qkv(1, 2, 1, 20, 45, 16, 16) | {"chunk": 9, "offset": 23, "window": 7}
    yield qkv(1, 2, 2, 300, 300, 8, 8) | {"prefix": 270, "causal": True, "window": 30}
    yield qkv(1, 4, 2, 30, 60, 16, 16) | {"prefix": 5, "causal": True, "offset": 30, "chunk": 8}
    yield qkv(2, 2, 2, 41, 41, 16, 16) | {"documents": documents(2, 41), "causal": True}
    yield qkv(2, 2, 1, 9, 41, 16, 16) | {"documents": documents(2, 41), "offset": 30, "sinks": make(2)}
    yield qkv(2, 2, 2, 12, 23, 16, 16) | {"padding": some(2, 23)}

    late = torch.arange(37).expand(2, -1) >= torch.tensor([[11], [0]])
    lost = {"causal": True, "padding": late}
    for empty in EMPTY:
        yield qkv(2, 4, 2, 37, 37, 16, 16) | lost | {"empty": empty}
        yield qkv(1, 2, 2, 30, 20, 16, 16) | {"causal": True, "offset": -10, "empty": empty, "softcap": 2.0}
        shut = make(2, 2, 37, 37).masked_fill(~some(1, 1, 1, 37), float("-inf"))
        yield qkv(2, 2, 1, 37, 37, 16, 16) | lost | {"documents": documents(2, 37), "bias": shut, "empty": empty}
        yield qkv(1, 2, 1, 5, 7, 16, 16) | {"padding": torch.zeros(1, 7, dtype=torch.bool), "empty": empty}
        yield qkv(1, 2, 1, 5, 7, 8, 8) | {"mask": some(1, 2, 5, 1), "empty": empty, "sinks": make(2)}
        yield qkv(1, 2, 1, 5, 0, 8, 8) | {"empty": empty}
    if dtype is not torch.float16:  # its lowest number does not swallow a score
        for lowest in (torch.finfo(dtype).min, -1e30):
            bias = torch.zeros(2, 1, 45, 300, dtype=dtype).masked_fill(~some(2, 1, 45, 1), lowest)
            yield qkv(2, 4, 2, 45, 300, 16, 16) | {"bias": bias}
            yield qkv(2, 4, 2, 45, 300, 16, 16) | {"bias": bias, "causal": True, "offset": 255, "sinks": make(4)}


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """Two matrix products over the keys that the masks keep; q, k, v and out once."""
    keys = seen = float(dims["keys"])
    window, chunk, causal = (float(attributes.get(name) or 0) for name in ("window", "chunk", "causal"))
    if chunk:
        seen = min(seen, chunk)
    if causal:
        seen = (seen + 1) / 2
    if window:
        seen = min(seen, window if causal else 2 * window - 1)
    prefix = min(float(attributes.get("prefix") or 0), keys)
    if prefix:  # as much of the prefix as of all keys is seen anyway
        seen += prefix * (1 - seen / keys)
    rows = float(dims["batch"]) * float(dims["heads"]) * float(dims["queries"])
    widths = float(dims["head_dim"]) + float(dims["value_dim"])
    shared = float(dims["batch"]) * float(dims["kv_heads"]) * keys
    return 2 * rows * seen * widths, 4 * (rows + shared) * widths


ATTENTION = Op(
    name="attention",
    summary="softmax attention: grouped heads, scale, soft cap, sinks, bias; masks by position, input or document",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("q", "k", "v", "bias", "sinks"),
    no_gradient=("lse",),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={"padding": random_padding, "documents": random_documents},
    source="Vaswani et al. 2017, eq. 1; sinks: gpt-oss; soft cap: Gemma 2; chunks: Llama 4; prefix: PaliGemma",
)
