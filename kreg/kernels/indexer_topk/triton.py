"""``indexer_topk`` by the Triton kernels of ``lightning_indexer``: a row of the grid knows its request and position."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kreg.kernels.gpu import Launch, Target, record
from kreg.kernels.lightning_indexer.triton import DTYPES, TABLE, different, select_into
from kreg.kernels.lightning_indexer.triton_scores import Packed

BORROWED = (TABLE,)


def forward(
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
) -> torch.Tensor:
    """Selected entries, as the op has them; nothing is scored where a request has no more entries than ``topk``.

    Tiles are of tokens that follow each other: requests in order are fast, in any order right.
    """
    entries = kv.shape[1] if block_table is None else block_table.shape[1] * kv.shape[1]
    indices = q.new_empty(q.shape[0], min(topk, entries), dtype=torch.int32)
    select_into(
        indices.unsqueeze(0),
        None,
        q.unsqueeze(0),
        kv,
        weights.unsqueeze(0),
        scale=1.0,
        ratio=ratio,
        offset=0,
        entries=entries,
        sentinel=True,
        added=offset,
        packed=Packed(positions.contiguous(), _dense(requests), _dense(lengths), _dense(block_table)),
    )
    return indices


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


# What is launched differs by tokens, requests, entries of one, and the page that they lie in, 0 for none.
SHAPES = ((8192, 4, 16384, 0), (64, 64, 1 << 20, 64), (64, 64, 512, 64), (4096, 1, 4096, 0))


def builds(target: Target) -> Iterator[Launch]:
    """The launches of prefill and of decoding, with and without pages; equal ones once."""
    return different(launch for dtype in DTYPES for shape in SHAPES for launch in _launches(target, dtype, *shape))


def _launches(
    target: Target, dtype: torch.dtype, tokens: int, requests: int, entries: int, page: int
) -> Iterator[Launch]:
    def make(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = (requests * entries // page, page) if page else (requests, entries)
    yield from record(
        target,
        forward,
        make(tokens, 64, 128, dtype=dtype),
        make(*blocks, 128, dtype=dtype),
        make(tokens, 64, dtype=torch.float32),
        make(tokens),
        make(tokens) if requests > 1 else None,
        make(requests) if requests > 1 else None,
        make(requests, entries // page) if page else None,
        topk=512,
        ratio=4,
        offset=128,
    )
