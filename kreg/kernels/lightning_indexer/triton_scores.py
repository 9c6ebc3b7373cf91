"""Scores of an indexer's keys in Triton: one matrix product of keys and the heads of a few queries, summed over heads.

A program takes ``BLOCK_N`` columns, which are the heads of ``BLOCK_N / BLOCK_H`` queries, and runs over keys. Keys are
the rows of the product: so the sum over heads stays within a thread and its three neighbours, and a program's queries
stay where they are while keys stream by. Nothing of size queries times heads times keys leaves the program.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (parameters of Triton functions are Triton values)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kreg.kernels.gpu import Table, current_target, launch

PROGRAMS_PER_PROCESSOR = 8
"""With fewer tiles of queries than this, keys are split between programs too: two or three programs run at once on a
multiprocessor, and the last of several turns is what may find nothing to do."""

CHANGING = ("entries", "first_position")
"""Arguments of no use to a compiler: not specialised, so that a growing cache compiles little anew."""

PROCESSORS = 132
"""Multiprocessors of a device that cannot be asked."""


@dataclass(frozen=True)
class Packed:
    """Queries of several requests one after the other, as in serving; without it they are [batch, queries].

    Attributes:
        positions: int [queries].
        requests: int [queries], the request of each query, or None: all of request 0.
        lengths: int [requests], the entries of each, or None: all that there is room for.
        table: int [requests, pages], where the pages of each request's keys lie, or None: keys are [requests, entries].
    """

    positions: torch.Tensor
    requests: torch.Tensor | None
    lengths: torch.Tensor | None
    table: torch.Tensor | None

    def part(self, start: int, stop: int) -> Packed:
        """Some of the queries."""
        requests = None if self.requests is None else self.requests[start:stop]
        return Packed(self.positions[start:stop], requests, self.lengths, self.table)


def within_32_bits(x: torch.Tensor, first: int) -> torch.Tensor:
    """``x``, copied where an offset along its dimensions from ``first`` on does not fit the kernels' 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[first:], x.stride()[first:], strict=True))
    return x if reach < 1 << 31 else x.contiguous()


@triton.jit
def request_of(requests, row, inside):
    """The request of each query, 0 where there is one only."""
    request = row * 0
    if requests is not None:
        request = tl.load(requests + row, mask=inside, other=0).to(tl.int32)
    return request


@triton.jit
def ready_count(row, request, inside, positions, lengths, first_position, entries, RATIO: tl.constexpr):
    """How many entries are ready for each query by its position and its request's length, 0 for no query."""
    position = first_position + row
    if positions is not None:
        position = tl.load(positions + row, mask=inside, other=-1)
    count = entries + row * 0
    if RATIO > 0:
        count = tl.minimum(entries, tl.maximum(position + 1, 0) // RATIO).to(tl.int32)
    if lengths is not None:
        count = tl.minimum(count, tl.load(lengths + request, mask=inside, other=0).to(tl.int32))
    return tl.where(inside, count, 0)


@triton.jit
def heads_of(q, row, head, dims, inside, q_row, q_head, q_dim, heads, dim):
    """The heads of some queries, [BLOCK_N, BLOCK_D], zeros beside them."""
    at = row.to(tl.int64) * q_row + head * q_head
    kept = inside & (head < heads)
    return tl.load(q + at[:, None] + dims[None, :] * q_dim, mask=kept[:, None] & (dims[None, :] < dim), other=0.0)


@triton.jit
def weights_of(weights, row, head, inside, w_row, w_head, heads):
    """The weights of some queries' heads, float32 [BLOCK_N], zeros beside them."""
    at = row.to(tl.int64) * w_row + head * w_head
    return tl.load(weights + at, mask=inside & (head < heads), other=0.0).to(tl.float32)


# Triton's interpreter keeps bfloat16 as its bits, and would multiply those; wider, the products are the same.
WIDEN = tl.constexpr(not isinstance(request_of, triton.JITFunction))


@triton.jit
def dot(a, b):
    """``a @ b`` in float32; of float32 without rounding to fewer bits."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def weighted_sum(keys, queries, weight, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr):
    """``sum_h weight[q, h] * relu(keys . queries[q, h])``: float32 [BLOCK_T, BLOCK_Q]."""
    products = dot(keys, tl.trans(queries))
    products = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
    return tl.sum(tl.reshape(products, (BLOCK_T, BLOCK_Q, BLOCK_H)), axis=2)


@triton.jit(do_not_specialize=CHANGING)
def scores_kernel(
    out,
    q,
    k,
    weights,
    positions,
    requests,
    lengths,
    table,
    out_batch,
    out_row,
    q_batch,
    q_row,
    q_head,
    q_dim,
    k_batch,
    k_entry,
    k_dim,
    w_batch,
    w_row,
    w_head,
    table_row,
    rows,
    heads,
    dim,
    entries,
    page,
    first_position,
    span,
    unscored,
    scale,
    RATIO: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the scores of the entries that are ready for any query of a tile; programs: tiles, spans, batch.

    A tile of queries for which ``unscored`` entries are ready at most writes nothing.
    """
    BLOCK_Q: tl.constexpr = BLOCK_N // BLOCK_H
    batch = tl.program_id(2).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most entries first
    low = tl.program_id(1) * span

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    request = request_of(requests, row, row < rows)
    counts = ready_count(row, request, row < rows, positions, lengths, first_position, entries, RATIO)
    if tl.max(counts, 0) > unscored:
        column = tl.arange(0, BLOCK_N)
        column_row = tile * BLOCK_Q + column // BLOCK_H
        head = column % BLOCK_H
        dims = tl.arange(0, BLOCK_D)
        inside = column_row < rows
        q += batch * q_batch
        weights += batch * w_batch
        to = out + batch * out_batch + row.to(tl.int64)[None, :] * out_row
        queries = heads_of(q, column_row, head, dims, inside, q_row, q_head, q_dim, heads, dim)
        weight = weights_of(weights, column_row, head, inside, w_row, w_head, heads)

        first_request = tl.min(tl.where(row < rows, request, 2147483647), 0)
        last_request = tl.max(tl.where(row < rows, request, 0), 0)
        for each in range(first_request, last_request + 1):
            mine = (row < rows) & (request == each)
            high = tl.minimum(low + span, tl.max(tl.where(mine, counts, 0), 0))
            for start in range(low, high, BLOCK_T):
                entry = start + tl.arange(0, BLOCK_T)
                if table is not None:
                    pages = table + tl.cast(each, tl.int64) * table_row
                    block = tl.load(pages + entry // page, mask=entry < high, other=0)
                    at = block.to(tl.int64) * k_batch + (entry % page) * k_entry
                else:
                    at = (batch + each) * k_batch + entry.to(tl.int64) * k_entry
                near = (entry[:, None] < high) & (dims[None, :] < dim)
                keys = tl.load(k + at[:, None] + dims[None, :] * k_dim, mask=near, other=0.0)
                total = weighted_sum(keys, queries, weight, BLOCK_T, BLOCK_Q, BLOCK_H)
                for more in tl.static_range(1, HEAD_BLOCKS):  # more heads than columns
                    after = head + more * BLOCK_H
                    others = heads_of(q, column_row, after, dims, inside, q_row, q_head, q_dim, heads, dim)
                    by = weights_of(weights, column_row, after, inside, w_row, w_head, heads)
                    total += weighted_sum(keys, others, by, BLOCK_T, BLOCK_Q, BLOCK_H)
                tl.store(to + entry[:, None], total * scale, mask=mine[None, :] & (entry[:, None] < high))


def scores_into(
    table: Table,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    first_position: int,
    entries: int,
    unscored: int,
    ratio: int,
    scale: float,
    packed: Packed | None = None,
) -> None:
    """Write the scores of ready entries to ``out``; what is not ready for a query is left as it is, or written.

    Args:
        table: the tuning table.
        out: float32 [batch, rows, at least ``entries``].
        q: [batch, rows, heads, dim].
        k: [batch, entries, dim]; [requests, entries, dim] or [pages, page, dim] where packed.
        weights: [batch, rows, heads].
        first_position: the position of the first row, where not packed.
        entries: the first so many are scored.
        unscored: tiles of queries for which so many entries are ready at most may be left out; -1: none.
        ratio: positions in one entry; 0: every entry is ready.
        scale: factor on the scores.
        packed: the requests of the rows; batch is 1.
    """
    batch, rows, heads, dim = q.shape
    q, weights, k = within_32_bits(q, 2), within_32_bits(weights, 2), within_32_bits(k, 2)
    padded = triton.next_power_of_2(heads)
    # One query for each request, as in decoding: a tile of several would score every key for all of its queries.
    requests = packed is not None and packed.requests is not None
    alone = packed is not None and requests and rows <= _requests(packed, k)
    config = table.pick(
        "scores_kernel",
        current_target(q.device),
        bytes=q.element_size(),
        index_dim=dim,
        columns=padded if alone else padded * rows,
        requests=requests,
    )
    block_h = config["BLOCK_N"] if alone else min(padded, config["BLOCK_N"])
    tiles = triton.cdiv(rows, config["BLOCK_N"] // block_h)
    splits = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(q.device), tiles * batch)
    span = triton.cdiv(triton.cdiv(entries, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    launch(
        scores_kernel,
        (tiles, triton.cdiv(entries, span) if entries else 0, batch),
        config,
        out=out,
        q=q,
        k=k,
        weights=weights,
        positions=None if packed is None else packed.positions,
        requests=None if packed is None else packed.requests,
        lengths=None if packed is None else packed.lengths,
        table=None if packed is None else packed.table,
        out_batch=out.stride(0),
        out_row=out.stride(1),
        q_batch=q.stride(0),
        q_row=q.stride(1),
        q_head=q.stride(2),
        q_dim=q.stride(3),
        k_batch=k.stride(0),
        k_entry=k.stride(1),
        k_dim=k.stride(2),
        w_batch=weights.stride(0),
        w_row=weights.stride(1),
        w_head=weights.stride(2),
        table_row=0 if packed is None or packed.table is None else packed.table.stride(0),
        rows=rows,
        heads=heads,
        dim=dim,
        entries=entries,
        page=0 if packed is None or packed.table is None else k.shape[1],
        first_position=first_position,
        span=span,
        unscored=unscored,
        scale=scale,
        RATIO=ratio,
        HEAD_BLOCKS=triton.cdiv(heads, block_h),
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_H=block_h,
    )


def _requests(packed: Packed, k: torch.Tensor) -> int:
    return k.shape[0] if packed.table is None else packed.table.shape[0]


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
