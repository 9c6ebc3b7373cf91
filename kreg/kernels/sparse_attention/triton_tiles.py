"""What the Triton kernels of ``sparse_attention`` share: rows of (query, head), tiles of keys, which keys are seen.

A program holds ``BLOCK_M`` rows: ``BLOCK_M // BLOCK_H`` queries with ``BLOCK_H`` heads each. Channels are held in a
first part of ``BLOCK_D`` and a second of ``BLOCK_E``, both powers of two, so that 576 costs 512 + 64 and not 1024;
``BLOCK_E`` is 0 where one part is enough, and whatever belongs to the second part is then a placeholder.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (parameters of Triton functions are Triton values)

from __future__ import annotations

import triton
import triton.language as tl

CHANGING = (
    "window",
    "offset",
    "queries",
    "keys",
    "entries",
    "selected",
    "count",
    "batch",
    "splits",
    "padding_batch",
    "lse_batch",
    "lse_head",
)
"""Arguments of no use to a compiler: not specialised, so that a growing cache compiles nothing anew."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(tile, head_tile, queries, heads, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """Query and head of each row, and whether there is such a one."""
    row = tl.arange(0, BLOCK_M)
    if BLOCK_H == BLOCK_M:
        query = tile + tl.zeros([BLOCK_M], tl.int32)
        head = head_tile * BLOCK_H + row
        return query, head, head < heads
    query = tile * (BLOCK_M // BLOCK_H) + row // BLOCK_H
    head = head_tile * BLOCK_H + row % BLOCK_H
    return query, head, (query < queries) & (head < heads)


@triton.jit
def load_rows(base, offsets, there, START: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[rows, BLOCK] from channel START on; 0 where there is no such row or channel."""
    channel = START + tl.arange(0, BLOCK)
    if START + BLOCK <= HEAD_DIM:
        return tl.load(base + offsets[:, None] + channel[None, :], mask=there[:, None], other=0.0)
    mask = there[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(base + offsets[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, offsets, there, value, START: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The inverse of `load_rows`."""
    channel = START + tl.arange(0, BLOCK)
    mask = there[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] + channel[None, :], value.to(base.dtype.element_ty), mask=mask)


# Triton's interpreter keeps bfloat16 as its bits, and multiplies those; wider, the products are the same.
WIDEN = tl.constexpr(not isinstance(rows_of, triton.JITFunction))


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr):
    """``sum + a @ b``, in float32."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def products(a, a_e, b, b_e, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr):
    """``a @ b^T`` over all channels."""
    found = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), PRECISION)
    if BLOCK_E > 0:
        found = dot(a_e, tl.trans(b_e), found, PRECISION)
    return found


@triton.jit
def window_span(first_query, last_query, keys, window, offset):
    """The keys ``start`` to ``stop`` that some query from ``first_query`` to ``last_query`` sees."""
    start = tl.maximum(0, first_query + offset - window + 1)
    return start, tl.minimum(keys, last_query + offset + 1)


@triton.jit
def in_window(key, position, window):
    """Whether a query at ``position`` sees ``key``; the two broadcast."""
    return (key <= position) & (key > position - window)


@triton.jit
def ready_count(position, entries, RATIO: tl.constexpr):
    """How many entries are ready at ``position``: those with ``(j + 1) * RATIO <= position + 1``."""
    if RATIO > 0:
        return tl.minimum(entries, tl.maximum(0, position + 1) // RATIO)
    return tl.where(position >= -1, entries, 0)


@triton.jit
def share(start, stop, split, splits, BLOCK_N: tl.constexpr):
    """The part of a range that one of ``splits`` programs takes: whole tiles, as even as they come."""
    each = tl.cdiv(tl.cdiv(stop - start, BLOCK_N), splits) * BLOCK_N
    first = start + split * each
    return first, tl.minimum(stop, first + each)


@triton.jit
def used_slots(indices, selected, SCAN: tl.constexpr):
    """One more than the last slot that selects an entry: top-k leaves what is not ready at the end."""
    used = 0
    for start in range(0, selected, SCAN):
        slot = start + tl.arange(0, SCAN)
        entry = tl.load(indices + slot, mask=slot < selected, other=-1)
        used = tl.maximum(used, tl.max(tl.where(entry >= 0, slot + 1, 0), axis=0))
    return used


@triton.jit
def selected_entries(indices, start, stop, entries, BLOCK_N: tl.constexpr):
    """The entries in the slots from ``start`` on, and whether they are any."""
    slot = start + tl.arange(0, BLOCK_N)
    entry = tl.load(indices + slot, mask=slot < stop, other=-1).to(tl.int64)
    there = (entry >= 0) & (entry < entries)
    return tl.where(there, entry, 0), there


@triton.jit
def entry_offsets(entry, stride, page_stride, PAGE: tl.constexpr):
    """Where entries lie: evenly, or ``PAGE`` of them in each block of ``page_stride`` elements."""
    if PAGE > 0:
        return (entry // PAGE) * page_stride + (entry % PAGE) * stride
    return entry * stride


@triton.jit
def weights(more, scores, product, lse, delta, seen, scale, UNCHAIN: tl.constexpr):
    """``p`` and ``scale * d`` of a tile; ``lse`` in base 2, and like ``delta`` it broadcasts."""
    if UNCHAIN:  # see triton_forward.attend
        p, d = scores, product
        if more:
            p = tl.where(seen, tl.exp2(scores * (scale * LOG2E) - lse), 0.0)
            d = p * (product - delta) * scale
    else:
        p = tl.where(seen, tl.exp2(scores * (scale * LOG2E) - lse), 0.0)
        d = p * (product - delta) * scale
    return p, d


@triton.jit
def key_step(p, d, q, g, acc, PRECISION: tl.constexpr):
    """Adds a tile's gradient of its keys, ``g^T @ p + q^T @ d`` [channels, keys].

    Channels are the rows: there are many of them, so that no warp computes what another one does, and no tile of keys
    is too small for the tensor cores.
    """
    acc = dot(tl.trans(g), p, acc, PRECISION)
    return dot(tl.trans(q), d, acc, PRECISION)
