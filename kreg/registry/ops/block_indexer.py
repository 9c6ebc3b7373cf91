"""``block_indexer``: which blocks of keys each query should attend to, by the best key of each block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops.attention import accumulation_dtype

SCHEMA = "(Tensor q, Tensor k, *, SymInt topk, int block, int local=0, SymInt offset=0) -> Tensor indices"

TENSORS = {
    "q": "batch index_heads queries index_dim",
    "k": "batch keys index_dim",
}


def block_scores(q: torch.Tensor, k: torch.Tensor, *, block: int, local: int, offset: int) -> torch.Tensor:
    """The largest ``q[s] . k[t]`` of each block: [batch, index_heads, queries, blocks].

    Keys ``t > s + offset`` count as -inf. The block that position ``s + offset`` is in, and the ``local - 1``
    before it, count as +inf; where there are not so many before it, the first one does.
    """
    acc = accumulation_dtype(q.dtype)
    position = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + offset
    key = torch.arange(k.shape[1], device=q.device)
    scores = (q.to(acc) @ k.to(acc).unsqueeze(1).transpose(-1, -2)).masked_fill(key > position, float("-inf"))
    blocks = -(-k.shape[1] // block)
    scores = F.pad(scores, (0, blocks * block - k.shape[1]), value=float("-inf"))
    best: torch.Tensor = scores.unflatten(-1, (blocks, block)).amax(-1)
    own = (position // block - torch.arange(local, device=q.device)).clamp(min=0)
    return best.scatter(-1, own.expand(*best.shape[:3], local), float("inf"))


def reference(
    q: torch.Tensor, k: torch.Tensor, *, topk: int, block: int, local: int = 0, offset: int = 0
) -> tuple[torch.Tensor, ...]:
    """The ``topk`` best blocks of keys for each query and index head.

    Args:
        q: [batch, index_heads, queries, index_dim].
        k: [batch, keys, index_dim], one shared key head.
        topk: how many blocks to select, at most ``ceil(keys / block)``.
        block: keys in one block; block j holds keys ``j * block`` to ``(j + 1) * block - 1``, as far as there are.
        local: how many blocks, up to the query's own, are selected whatever they score.
        offset: query s stands at position ``s + offset``, and sees keys up to it; the position is that of a key.

    Returns:
        int64 [batch, index_heads, queries, topk]: distinct blocks in an order that is not part of the contract, -1
        wherever fewer than ``topk`` have begun, at any place; equal scores are broken either way.
    """
    best = block_scores(q, k, block=block, local=local, offset=offset).topk(topk, dim=-1)
    return (best.indices.masked_fill(best.values.isneginf(), -1),)


def fake(q: torch.Tensor, k: torch.Tensor, *, topk: int, **rest: Any) -> tuple[torch.Tensor, ...]:
    """Shape and dtype of `reference`."""
    return (q.new_empty(*q.shape[:3], topk, dtype=torch.int64),)


def selected_block_error(arguments: Arguments, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """How far apart two selections are: the largest difference between their blocks' scores, best to worst,
    relative to the largest score (of size 1 at least).

    A block twice, out of range or not begun is an infinite error, and so is a local one that is missing.
    """
    a, b = got[0], want[0]
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    attributes = {name: int(arguments.get(name, 0)) for name in ("block", "local", "offset")}
    scores = block_scores(arguments["q"].double(), arguments["k"].double(), **attributes)
    blocks = scores.shape[-1]
    padded = F.pad(scores, (0, 1), value=float("-inf"))

    def ranked(indices: torch.Tensor) -> torch.Tensor | None:
        if int(indices.max()) >= blocks:
            return None
        slots = torch.where(indices < 0, blocks, indices)
        counts = torch.zeros_like(padded, dtype=torch.int64).scatter_add_(-1, slots, torch.ones_like(slots))
        values = padded.gather(-1, slots)
        if counts[..., :blocks].gt(1).any() or (values.isneginf() & (indices >= 0)).any():
            return None
        return values.sort(dim=-1, descending=True).values

    first, second = ranked(a), ranked(b)
    if first is None or second is None or not torch.equal(first.isinf(), second.isinf()):
        return float("inf")
    largest = float(scores.masked_fill(scores.isinf(), 0.0).abs().max())
    return float((first - second).abs().nan_to_num(nan=0.0).max()) / max(1.0, largest)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Blocks that divide the keys and not, local ones, all blocks, one query, decode with an offset."""

    def call(batch: int, heads: int, queries: int, keys: int, **more: Any) -> dict[str, Any]:
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return {"q": make(batch, heads, queries, 16), "k": make(batch, keys, 16)} | more

    yield call(1, 1, 1, 1, topk=1, block=1)
    yield call(2, 2, 48, 48, topk=3, block=5, local=1)
    yield call(2, 3, 48, 48, topk=4, block=6, local=3)
    yield call(1, 2, 48, 48, topk=2, block=5, local=4)
    yield call(1, 2, 37, 37, topk=10, block=4)
    yield call(1, 2, 300, 300, topk=7, block=8, local=2)
    yield call(2, 2, 3, 50, topk=5, block=4, local=1, offset=47)
    yield call(2, 2, 9, 50, topk=2, block=4, offset=11)
    yield call(1, 2, 5, 30, topk=2, block=4, offset=-3)
    yield call(1, 2, 3, 5, topk=0, block=2)


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """One matrix product over the keys that are past; queries, keys and indices once."""
    rows = float(dims["batch"]) * float(dims["index_heads"]) * float(dims["queries"])
    width, keys = float(dims["index_dim"]), float(dims["keys"])
    return rows * keys * width, 4 * (rows * width + float(dims["batch"]) * keys * width)


BLOCK_INDEXER = Op(
    name="block_indexer",
    summary="causal top-k over blocks of keys, each scored by its best key; the query's own blocks always among them",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=(),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    error=selected_block_error,
    source="MiniMax-M3's sparse attention; Yuan et al. 2025, Native Sparse Attention, section 3.3",
)
