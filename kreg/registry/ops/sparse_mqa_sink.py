"""``sparse_mqa_sink``: attention over selected slots of a paged cache shared by all heads, as servers call it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops.attention import accumulation_dtype, softmax_or_zero

SCHEMA = """(
    Tensor q, Tensor kv, Tensor topk_indices, Tensor? attn_sink=None, *, float scale
) -> Tensor out"""

TENSORS = {
    "q": "tokens heads head_dim",
    "kv": "blocks block head_dim",
    "topk_indices": "tokens selected",
    "attn_sink": "heads",
}


def reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    topk_indices: torch.Tensor,
    attn_sink: torch.Tensor | None = None,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """One softmax of each token and head over the slots that its token selects, and a sink.

    Args:
        q: [tokens, heads, head_dim], tokens of any requests.
        kv: [blocks, block, head_dim], both keys and values of every head: slot i of the cache is
            ``kv[i // block, i % block]``.
        topk_indices: int32 or int64 [tokens, selected]: the slots that a token sees, distinct, in any order;
            negative ones select nothing. A request's block table is applied already.
        attn_sink: [heads]: one more logit in the denominator.
        scale: factor on the scores.

    Returns:
        [tokens, heads, head_dim] in q's dtype, contiguous; 0 for a token that selects nothing.
    """
    acc = accumulation_dtype(q.dtype)
    absent = topk_indices < 0
    slots = kv.reshape(-1, kv.shape[-1])
    if not len(slots):
        slots = slots.new_zeros(1, kv.shape[-1])  # nothing can be selected: any key will do
    keys = slots[topk_indices.masked_fill(absent, 0).long()].to(acc)
    scores = (q.to(acc) @ keys.transpose(-1, -2)) * scale
    scores = scores.masked_fill(absent.unsqueeze(1), float("-inf"))
    if attn_sink is not None:
        sink = attn_sink.to(acc).view(1, -1, 1).expand(len(q), -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = softmax_or_zero(scores)[..., : keys.shape[1]]
    return ((weights @ keys).to(q.dtype),)


def fake(q: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Shape, dtype and strides of `reference`."""
    return (q.new_empty(q.shape),)


def random_slots(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Distinct slots of each token, about a fifth of them replaced by -1."""
    tokens, selected = shape
    slots = arguments["kv"].shape[0] * arguments["kv"].shape[1]
    order = torch.rand(tokens, max(slots, selected), generator=generator).argsort(-1)[..., :selected]
    dropped = (torch.rand(shape, generator=generator) < 0.2) | (order >= slots)
    return torch.where(dropped, -1, order).to(dtype)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Pages of one slot and of many, both index types, no sink, nothing selected, no tokens, blocks apart in memory."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def call(tokens: int, heads: int, dim: int, pages: tuple[int, int], selected: int, **rest: Any) -> dict[str, Any]:
        kv = make(*pages, dim)
        indices = random_slots((tokens, selected), torch.int32, generator, {"kv": kv})
        found = {"q": make(tokens, heads, dim), "kv": kv, "topk_indices": indices}
        return found | {"attn_sink": make(heads), "scale": dim**-0.5} | rest

    yield call(1, 1, 8, (1, 1), 1)
    yield call(5, 4, 16, (3, 7), 9)
    yield call(3, 8, 64, (40, 1), 33, attn_sink=None)
    wide = call(4, 12, 24, (5, 16), 40)
    yield wide | {"topk_indices": wide["topk_indices"].long(), "kv": make(5, 24, 24)[:, :16]}
    yield call(2, 3, 16, (2, 4), 3, topk_indices=torch.full((2, 3), -1))
    yield call(2, 3, 16, (2, 4), 3, topk_indices=torch.full((2, 3), -1), attn_sink=None)
    yield call(2, 3, 16, (2, 4), 0)
    yield call(2, 3, 16, (0, 4), 5)
    yield call(0, 3, 16, (2, 4), 3)


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """Two matrix products over what each token selects; q, out and the selected slots once."""
    rows = float(dims["tokens"]) * float(dims["heads"])
    selected, dim = float(dims["selected"]), float(dims["head_dim"])
    return 4 * rows * selected * dim, 4 * (2 * rows * dim + float(dims["tokens"]) * selected * dim)


SPARSE_MQA_SINK = Op(
    name="sparse_mqa_sink",
    summary="attention with a sink over selected slots of a paged cache that all heads share",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=(),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={"topk_indices": random_slots},
    source="AITER's sparse_mqa_sink (github.com/ROCm/aiter, pull request 2998), with slots for positions",
)
