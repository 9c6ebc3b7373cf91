"""``indexer_topk``: the lightning indexer as serving calls it, tokens of many requests in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op
from kreg.registry.ops import lightning_indexer

SCHEMA = """(
    Tensor q, Tensor kv, Tensor weights, Tensor positions, Tensor? requests=None, Tensor? lengths=None,
    Tensor? block_table=None, *, SymInt topk, int ratio, SymInt offset=0
) -> Tensor indices"""

TENSORS = {
    "q": "tokens index_heads index_dim",
    "kv": "blocks block index_dim",
    "weights": "tokens index_heads",
    "positions": "tokens",
    "requests": "tokens",
    "lengths": "requests",
    "block_table": "requests pages",
}


def entries_of(kv: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """How many entries a request may have."""
    return kv.shape[1] if block_table is None else block_table.shape[1] * kv.shape[1]


def selection(arguments: Arguments) -> dict[str, Any]:
    """The same call of ``lightning_indexer``: each token is a batch element of one query, with its request's keys."""
    q, kv, positions = arguments["q"], arguments["kv"], arguments["positions"].long()
    requests, lengths, table = (arguments.get(name) for name in ("requests", "lengths", "block_table"))
    entries, ratio = entries_of(kv, table), arguments["ratio"]
    each = torch.zeros_like(positions) if requests is None else requests.long()
    # Pages that a request does not use may hold any number.
    keys = kv if table is None else kv[table.long().clamp(0, max(0, len(kv) - 1))].flatten(1, 2)
    entry = torch.arange(entries, device=q.device)
    ready = torch.ones(len(q), entries, dtype=torch.bool, device=q.device)
    if ratio:
        ready = (entry + 1) * ratio <= positions.unsqueeze(1) + 1
    if lengths is not None:
        ready = ready & (entry < lengths.long()[each].unsqueeze(1))
    return {
        "q": q.unsqueeze(1),
        "k": keys[each],
        "weights": arguments["weights"].unsqueeze(1),
        "padding": ready,
        "scale": 1.0,
        "topk": min(arguments["topk"], entries),
        "ratio": 0,
    }


def reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    topk: int,
    ratio: int,
    offset: int = 0,
) -> tuple[torch.Tensor, ...]:
    """The ``topk`` entries of each token's request that ``sum_h relu(q[t, h] . key) * weights[t, h]`` ranks highest.

    Args:
        q: [tokens, index_heads, index_dim].
        kv: [requests, entries, index_dim], or with ``block_table`` the pages [blocks, block, index_dim] that
            requests share. Of one request, ``kv.unsqueeze(0)``.
        weights: [tokens, index_heads], with the model's scale in them.
        positions: int [tokens], the position of each token in its request.
        requests: int [tokens], the request of each token, in any order; None: all are of request 0.
        lengths: int [requests], how many entries each request has; None: as many as there is room for.
        block_table: int [requests, pages]: entry j of a request lies in page ``j // block``, at ``j % block``. Pages
            beyond a request's length are not read.
        topk: how many entries to select.
        ratio: positions in one entry: entry j is ready at position p when ``(j + 1) * ratio <= p + 1``. 0: always.
        offset: added to each selected entry's number, as where a window's keys stand before the entries.

    Returns:
        int32 [tokens, min(topk, entries)]: distinct entries in an order that is not part of the contract, -1 in
        slots that no ready entry is left for, at any place; equal scores are broken either way.
    """
    call = selection(
        {
            "q": q,
            "kv": kv,
            "weights": weights,
            "positions": positions,
            "requests": requests,
            "lengths": lengths,
            "block_table": block_table,
            "topk": topk,
            "ratio": ratio,
        }
    )
    indices = lightning_indexer.reference(**call)[0].squeeze(1)
    return (torch.where(indices < 0, -1, indices + offset).to(torch.int32),)


def fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    weights: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    topk: int,
    **rest: Any,
) -> tuple[torch.Tensor, ...]:
    """Shape and dtype of `reference`."""
    return (q.new_empty(q.shape[0], torch.sym_min(topk, entries_of(kv, block_table)), dtype=torch.int32),)


def error(arguments: Arguments, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """As of ``lightning_indexer``: the largest difference of the selected scores, best to worst."""

    def numbers(indices: torch.Tensor) -> torch.Tensor:
        return torch.where(indices < 0, -1, indices.long() - int(arguments.get("offset", 0))).unsqueeze(1)

    call = selection(arguments)
    return lightning_indexer.selected_score_error(call, (numbers(got[0]),), (numbers(want[0]),))


def _below(high: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, max(1, high), shape, generator=generator).to(dtype)


def random_positions(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Positions at which some entries are ready and some are not."""
    return _below(4 * arguments["kv"].shape[1], shape, dtype, generator)


def random_requests(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Request 0, which there is in any call."""
    return torch.zeros(shape, dtype=dtype)


def random_lengths(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Anything from no entry to one block of them."""
    return _below(arguments["kv"].shape[1] + 1, shape, dtype, generator)


def random_table(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Any pages."""
    return _below(arguments["kv"].shape[0], shape, dtype, generator)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """One request, many, decoding, pages out of order, unused pages, none ready, no entries, more asked than there."""

    def call(tokens: int, blocks: int, block: int, heads: int = 4, dim: int = 16, **rest: Any) -> dict[str, Any]:
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return {
            "q": make(tokens, heads, dim),
            "kv": make(blocks, block, dim),
            "weights": make(tokens, heads).float(),
            "positions": torch.arange(tokens),
            "ratio": 4,
        } | rest

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    yield call(33, 1, 9, topk=3, offset=128)
    yield call(33, 1, 9, topk=20)
    three = torch.arange(3).repeat_interleave(ints(10, 1, 12))
    some = torch.cat([torch.arange(30, 40), torch.tensor([50]), torch.arange(12)])
    yield call(23, 3, 14, topk=4, requests=three, positions=some, lengths=ints(10, 12, 3))
    yield call(23, 3, 14, topk=14, requests=three.int(), positions=some.int(), lengths=ints(10, 12, 3), offset=7)
    yield call(23, 3, 14, topk=4, requests=three.flip(0), positions=some, ratio=1)
    pages = torch.tensor([[4, 0, 2], [1, 6, 5], [3, -1, 99]], dtype=torch.int32)
    paged: dict[str, Any] = {
        "requests": three,
        "positions": some + 20,
        "lengths": ints(12, 11, 4),
        "block_table": pages,
    }
    yield call(23, 7, 4, topk=5, **paged)
    yield call(23, 7, 4, topk=40, **paged, offset=3)
    decode: dict[str, Any] = {
        "requests": torch.arange(3),
        "positions": torch.tensor([47, 3, 2]),
        "lengths": ints(12, 11, 4),
    }
    yield call(3, 7, 4, topk=6, **decode, block_table=pages)
    yield call(3, 3, 100, topk=6, heads=2, dim=8, **(decode | {"lengths": ints(100, 0, 50)}), ratio=0)
    yield call(3, 2, 0, topk=6, requests=torch.tensor([0, 1, 1]), lengths=ints(0, 0))


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """One matrix product over half of what there is room for; queries, keys and indices once."""
    entries = float(dims["block"]) * float(dims.get("pages", 1))
    width = float(dims["index_heads"]) * float(dims["index_dim"])
    tokens = float(dims["tokens"])
    ready = entries * (0.5 if attributes.get("ratio") else 1.0)
    keys = float(dims["blocks"]) * float(dims["block"]) * float(dims["index_dim"])
    return 2 * tokens * ready * width, 2 * (tokens * width + keys)


INDEXER_TOPK = Op(
    name="indexer_topk",
    summary="the lightning indexer for serving: packed tokens of many requests, lengths, pages of keys",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=(),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={
        "positions": random_positions,
        "requests": random_requests,
        "lengths": random_lengths,
        "block_table": random_table,
    },
    error=error,
    source="AITER, aiter.ops.triton.attention.dsv4_indexer.dsv4_indexer_topk: its layout and results",
)
