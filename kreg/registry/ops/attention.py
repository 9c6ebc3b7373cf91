"""``attention``: softmax attention with grouped heads, scale, soft cap, sinks, causal and window masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op

SCHEMA = """(
    Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? mask=None, Tensor? sinks=None, *,
    float scale, float softcap=0.0, bool causal=False, int window=0, SymInt offset=0
) -> (Tensor out, Tensor lse)"""

TENSORS = {
    "q": "batch heads queries head_dim",
    "k": "batch kv_heads keys head_dim",
    "v": "batch kv_heads keys value_dim",
    "bias": "1|batch 1|heads 1|queries 1|keys",
    "mask": "1|batch 1|heads 1|queries 1|keys",
    "sinks": "heads",
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def band(
    queries: int, keys: int, *, causal: bool, window: int, offset: int, device: torch.device
) -> torch.Tensor | None:
    """Which keys the causal and window masks keep: bool [queries, keys], or None for all.

    Query ``s`` stands at position ``s + offset``; causal keeps keys ``t <= s + offset``, a window of W keeps
    ``t > s + offset - W``.
    """
    if not causal and not window:
        return None
    position = torch.arange(queries, device=device).unsqueeze(1) + offset
    key = torch.arange(keys, device=device)
    keep = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        keep &= key <= position
    if window:
        keep &= key > position - window
    return keep


def softmax_or_zero(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; zeros for a row in which everything is -inf."""
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def reference(
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
    """softmax(cap(scale * q @ k^T) + bias, masked, over the keys and the sink) @ v.

    Args:
        q: [batch, heads, queries, head_dim].
        k, v: [batch, kv_heads, keys, head_dim | value_dim]; query head h reads kv head
            ``h // (heads // kv_heads)``.
        bias: additive, broadcastable to [batch, heads, queries, keys].
        mask: bool, broadcastable likewise, True where a key is kept.
        sinks: [heads]: one more logit in each softmax's denominator, with no value behind it.
        scale: factor on q @ k^T.
        softcap: c > 0 turns scores x into ``c * tanh(x / c)`` before bias and masks; 0 leaves them.
        causal, window, offset: see `band`.

    Returns:
        out [batch, heads, queries, value_dim] in q's dtype, stored as [batch, queries, heads, value_dim];
        lse [batch, heads, queries], the log of the softmax's denominator in the accumulation dtype. A query
        whose keys are all masked (``mask``, ``causal``, ``window``) gives 0; additive bias is plain addition.
    """
    acc = accumulation_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    keys = k.to(acc).repeat_interleave(groups, dim=1)
    values = v.to(acc).repeat_interleave(groups, dim=1)
    scores = (q.to(acc) @ keys.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(acc)
    keep = band(q.shape[2], k.shape[2], causal=causal, window=window, offset=offset, device=q.device)
    for dropped in (keep, mask):
        if dropped is not None:
            scores = scores.masked_fill(~dropped, float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = softmax_or_zero(scores)
    out = weights[..., : k.shape[2]] @ values
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Shapes, dtypes and strides of `reference`."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Grouped heads, cross attention, every mask, sinks, soft cap; one query, one key."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def qkv(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, value: int) -> dict[str, Any]:
        return {
            "q": make(batch, heads, queries, dim),
            "k": make(batch, kv_heads, keys, dim),
            "v": make(batch, kv_heads, keys, value),
            "scale": dim**-0.5,
        }

    yield qkv(1, 1, 1, 1, 1, 8, 8)
    yield qkv(2, 4, 2, 17, 17, 16, 16) | {"causal": True}
    yield qkv(2, 4, 1, 33, 33, 16, 8) | {"causal": True, "window": 5, "sinks": make(4)}
    yield qkv(1, 6, 2, 9, 30, 16, 16) | {"causal": True, "window": 7, "offset": 21, "softcap": 3.0}
    yield qkv(2, 2, 2, 10, 12, 16, 16) | {"bias": make(1, 2, 10, 12), "softcap": 5.0}
    yield qkv(2, 4, 4, 150, 150, 16, 16) | {
        "mask": torch.rand((2, 1, 1, 150), generator=generator) < 0.5,
        "causal": True,
        "window": 40,
        "sinks": make(4),
    }
    yield qkv(1, 4, 2, 8, 8, 16, 16) | {"mask": torch.zeros(1, 1, 8, 8, dtype=torch.bool), "sinks": make(4)}
    yield qkv(2, 3, 1, 7, 9, 16, 16) | {
        "mask": torch.rand((2, 3, 7, 9), generator=generator) < 0.6,
        "bias": make(2, 1, 7, 9),
    }


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """Two matrix products over the keys that the masks keep; q, k, v and out once."""
    keys = float(dims["keys"])
    if attributes.get("window"):
        keys = min(keys, float(attributes["window"]))
    elif attributes.get("causal"):
        keys = (keys + 1) / 2
    rows = float(dims["batch"]) * float(dims["heads"]) * float(dims["queries"])
    widths = float(dims["head_dim"]) + float(dims["value_dim"])
    shared = float(dims["batch"]) * float(dims["kv_heads"]) * float(dims["keys"])
    return 2 * rows * keys * widths, 4 * (rows + shared) * widths


ATTENTION = Op(
    name="attention",
    summary="softmax attention: grouped heads, scale, soft cap, sinks, causal, window, bias, boolean mask",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("q", "k", "v", "bias", "sinks"),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    source="Vaswani et al. 2017, eq. 1; sinks: gpt-oss; soft cap: Gemma 2",
)
