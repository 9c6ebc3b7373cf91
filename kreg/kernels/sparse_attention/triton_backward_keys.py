"""The backward of ``sparse_attention`` in Triton, by keys: what a tile of them receives from all queries."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (parameters of Triton functions are Triton values)

from __future__ import annotations

import triton
import triton.language as tl

from kreg.kernels.sparse_attention.triton_tiles import (
    CHANGING,
    LOG2E,
    in_window,
    key_step,
    load_rows,
    products,
    ready_count,
    share,
    store_rows,
    weights,
)


@triton.jit(do_not_specialize=CHANGING)
def key_kernel(
    q,
    keys,  # [batch, count, HEAD_DIM]: kv, or where READY compressed
    padding,
    grad,
    lse,
    delta,
    grad_keys,  # [(splits,) batch, count, HEAD_DIM]
    scale,
    window,
    offset,
    queries,
    heads,
    count,
    batch,
    splits,
    q_batch,
    q_head,
    q_query,
    keys_batch,
    keys_key,
    padding_batch,
    grad_batch,
    grad_head,
    grad_query,
    lse_batch,
    lse_head,
    HEAD_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    READY: tl.constexpr,
    PADDING: tl.constexpr,
    UNCHAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",  # of float32, as tl.dot has it
):
    """The gradient of a tile of neighbouring keys: of the window, or of entries that are seen once ready."""
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_H
    tiles = tl.cdiv(count, BLOCK_N)
    program = tl.program_id(0)
    first_key = (program % tiles) * BLOCK_N
    b = (program // tiles).to(tl.int64)
    split = tl.program_id(1)

    key = first_key + tl.arange(0, BLOCK_N)
    inside = key < count
    keys += b * keys_batch
    key_rows = key.to(tl.int64) * keys_key
    k = load_rows(keys, key_rows, inside, 0, BLOCK_D, HEAD_DIM)
    k_e = k
    acc = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if BLOCK_E > 0:
        k_e = load_rows(keys, key_rows, inside, BLOCK_D, BLOCK_E, HEAD_DIM)
        acc_e = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    kept = inside
    if PADDING:
        kept = tl.load(padding + b * padding_batch + key, mask=inside, other=0) != 0

    # The queries that see some key of the tile; their tiles, and for each of those all tiles of heads.
    if READY:
        start = tl.maximum(0, (first_key + 1) * RATIO - 1 - offset)
        stop = queries
    else:
        start = tl.maximum(0, first_key - offset)
        stop = tl.minimum(queries, tl.minimum(first_key + BLOCK_N, count) - 1 + window - offset)
    start = tl.minimum(start, queries)
    head_tiles = tl.cdiv(heads, BLOCK_H)
    tiles_of_rows = tl.maximum(0, tl.cdiv(stop - start, BLOCK_Q)) * head_tiles
    first, last = share(0, tiles_of_rows, split, splits, 1)

    q += b * q_batch
    grad += b * grad_batch
    lse += b * lse_batch
    delta += b * lse_batch
    for step in tl.range(first, last, 1):
        row = tl.arange(0, BLOCK_M)
        query = start + (step // head_tiles) * BLOCK_Q + row // BLOCK_H
        head = (step % head_tiles) * BLOCK_H + row % BLOCK_H
        there = (query < stop) & (head < heads)
        position = query + offset
        wide_query, wide_head = query.to(tl.int64), head.to(tl.int64)
        q_rows = wide_query * q_query + wide_head * q_head
        g_rows = wide_query * grad_query + wide_head * grad_head
        lse_rows = wide_head * lse_head + wide_query
        q_d = load_rows(q, q_rows, there, 0, BLOCK_D, HEAD_DIM)
        g_d = load_rows(grad, g_rows, there, 0, BLOCK_D, HEAD_DIM)
        q_e, g_e = q_d, g_d
        if BLOCK_E > 0:
            q_e = load_rows(q, q_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM)
            g_e = load_rows(grad, g_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM)
        row_lse = tl.load(lse + lse_rows, mask=there, other=0.0)
        row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)
        row_delta = tl.load(delta + lse_rows, mask=there, other=0.0)
        if READY:
            seen = key[None, :] < ready_count(position, count, RATIO)[:, None]
        else:
            seen = in_window(key[None, :], position[:, None], window)
        seen = seen & kept[None, :] & there[:, None]
        scores = products(q_d, q_e, k, k_e, PRECISION, BLOCK_E)
        product = products(g_d, g_e, k, k_e, PRECISION, BLOCK_E)
        p, d = weights(step < last, scores, product, row_lse[:, None], row_delta[:, None], seen, scale, UNCHAIN)
        p = p.to(k.dtype)
        d = d.to(k.dtype)
        acc = key_step(p, d, q_d, g_d, acc, PRECISION)
        if BLOCK_E > 0:
            acc_e = key_step(p, d, q_e, g_e, acc_e, PRECISION)

    rows = ((split.to(tl.int64) * batch + b) * count + key) * HEAD_DIM
    store_rows(grad_keys, rows, inside, tl.trans(acc), 0, BLOCK_D, HEAD_DIM)
    if BLOCK_E > 0:
        store_rows(grad_keys, rows, inside, tl.trans(acc_e), BLOCK_D, BLOCK_E, HEAD_DIM)


@triton.jit
def segment_kernel(
    pairs,  # float32 [parts, pairs, HEAD_DIM]: gradients of what each query selected
    order,  # int64 [pairs]: sorted by (batch, entry)
    starts,  # int64 [batch * entries + 1]: where each entry's pairs are in order
    grad_entries,  # float32 [batch * entries, HEAD_DIM], added to
    parts,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the pairs of each entry, in a fixed order."""
    entry = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < HEAD_DIM
    start, stop = tl.load(starts + entry), tl.load(starts + entry + 1)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for low in range(start, stop, BLOCK_P):
        place = low + tl.arange(0, BLOCK_P)
        inside = place < stop
        pair = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & known[None, :]
        for _ in range(parts):
            acc += tl.load(pairs + pair[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
            pair += count
    target = grad_entries + entry * HEAD_DIM + channel
    before = tl.load(target, mask=known, other=0.0)
    tl.store(target, before + tl.sum(acc, axis=0), mask=known)
