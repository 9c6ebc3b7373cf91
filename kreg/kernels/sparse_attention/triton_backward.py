"""The backward of ``sparse_attention`` in Triton.

With probabilities ``p``, computed again from the saved lse, the scores' gradient is ``d = p * (grad @ k^T - delta)``,
``delta = rowsum(grad * out) - grad_lse``. `query_kernel` goes through a query's keys once, for its own gradient and,
where entries are selected, for theirs; what neighbouring keys receive is in `triton_backward_keys`. Everything is added
in a fixed order, but for atomic additions to selected entries where these are asked for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (parameters of Triton functions are Triton values)

from __future__ import annotations

import triton
import triton.language as tl

from kreg.kernels.sparse_attention.triton_tiles import (
    CHANGING,
    LOG2E,
    dot,
    entry_offsets,
    in_window,
    key_step,
    load_rows,
    products,
    ready_count,
    rows_of,
    selected_entries,
    store_rows,
    used_slots,
    weights,
    window_span,
)


@triton.jit
def delta_kernel(
    out,  # [batch, heads, queries, HEAD_DIM] by its strides
    grad,  # likewise
    grad_lse,  # [batch, heads, queries] by its strides, or None
    delta,  # float32 [batch, heads, queries]
    queries,
    heads,
    out_batch,
    out_head,
    out_query,
    grad_batch,
    grad_head,
    grad_query,
    lse_batch,
    lse_head,
    lse_query,
    HEAD_DIM: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """rowsum(grad * out) - grad_lse."""
    tile, head_tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, head, there = rows_of(tile, head_tile, queries, heads, BLOCK_M, BLOCK_H)
    query = query.to(tl.int64)
    out_rows = b * out_batch + query * out_query + head.to(tl.int64) * out_head
    grad_rows = b * grad_batch + query * grad_query + head.to(tl.int64) * grad_head
    o = load_rows(out, out_rows, there, 0, BLOCK_D, HEAD_DIM).to(tl.float32)
    g = load_rows(grad, grad_rows, there, 0, BLOCK_D, HEAD_DIM).to(tl.float32)
    found = tl.sum(o * g, axis=1)
    if BLOCK_E > 0:
        o = load_rows(out, out_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM).to(tl.float32)
        g = load_rows(grad, grad_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM).to(tl.float32)
        found += tl.sum(o * g, axis=1)
    if LSE:
        rows = b * lse_batch + query * lse_query + head.to(tl.int64) * lse_head
        found -= tl.load(grad_lse + rows, mask=there, other=0.0).to(tl.float32)
    tl.store(delta + (b * heads + head) * queries + query, found, mask=there)


@triton.jit
def query_step(
    more,
    q,
    q_e,
    g,
    g_e,
    k,
    k_e,
    seen,
    lse,
    delta,
    scale,
    acc,
    acc_e,
    PRECISION: tl.constexpr,
    UNCHAIN: tl.constexpr,
    DQ: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One more tile of keys in the gradient of the queries; also ``p`` and ``scale * d`` of the tile."""
    scores = products(q, q_e, k, k_e, PRECISION, BLOCK_E)
    product = products(g, g_e, k, k_e, PRECISION, BLOCK_E)
    p, d = weights(more, scores, product, lse[:, None], delta[:, None], seen, scale, UNCHAIN)
    p = p.to(k.dtype)
    d = d.to(k.dtype)
    if DQ:
        acc = dot(d, k, acc, PRECISION)
        if BLOCK_E > 0:
            acc_e = dot(d, k_e, acc_e, PRECISION)
    return acc, acc_e, p, d


@triton.jit
def give(
    p,
    d,
    q,
    g,
    target,
    offsets,
    there,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile's gradient of its keys, added or stored in one part of the channels."""
    found = tl.trans(key_step(p, d, q, g, tl.zeros([BLOCK, p.shape[1]], tl.float32), PRECISION))
    if SCATTER == "add":
        channel = START + tl.arange(0, BLOCK)
        mask = there[:, None] & (channel < HEAD_DIM)[None, :]
        tl.atomic_add(target + offsets[:, None] + channel[None, :], found, mask=mask, sem="relaxed")
    else:
        store_rows(target, offsets, there, found, START, BLOCK, HEAD_DIM)


@triton.jit(do_not_specialize=CHANGING)
def query_kernel(
    q,
    kv,
    compressed,
    indices,
    padding,
    grad,
    lse,
    delta,
    grad_q,  # [batch, heads, queries, HEAD_DIM], or None
    # float32; "add": [batch, entries, HEAD_DIM]; "store": [head tiles, batch, queries, selected, HEAD_DIM]
    grad_entries,
    scale,
    window,
    offset,
    queries,
    heads,
    keys,
    entries,
    selected,
    batch,
    q_batch,
    q_head,
    q_query,
    kv_batch,
    kv_key,
    compressed_batch,
    compressed_entry,
    compressed_page,
    indices_batch,
    indices_query,
    padding_batch,
    grad_batch,
    grad_head,
    grad_query,
    lse_batch,
    lse_head,
    gq_batch,
    gq_head,
    gq_query,
    HEAD_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDING: tl.constexpr,
    PAGE: tl.constexpr,
    DQ: tl.constexpr,
    FUSED: tl.constexpr,  # for the host: whether DQ and SCATTER may be in one launch
    SCATTER: tl.constexpr,  # what is done with the gradient of selected entries: "", "add" or "store"
    UNCHAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",  # of float32, as tl.dot has it
):
    """The gradient of queries, and of the entries that they select."""
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_H
    head_tiles = tl.cdiv(heads, BLOCK_H)
    tiles = tl.cdiv(queries, BLOCK_Q)
    program = tl.program_id(0)
    head_tile = program % head_tiles
    tile = tiles - 1 - (program // head_tiles) % tiles
    b = (program // head_tiles // tiles).to(tl.int64)

    query, head, there = rows_of(tile, head_tile, queries, heads, BLOCK_M, BLOCK_H)
    position = query + offset
    first_query = tile * BLOCK_Q
    last_query = tl.minimum(first_query + BLOCK_Q, queries) - 1
    query, head = query.to(tl.int64), head.to(tl.int64)

    q_rows = b * q_batch + query * q_query + head * q_head
    g_rows = b * grad_batch + query * grad_query + head * grad_head
    lse_rows = b * lse_batch + head * lse_head + query
    q_d = load_rows(q, q_rows, there, 0, BLOCK_D, HEAD_DIM)
    g_d = load_rows(grad, g_rows, there, 0, BLOCK_D, HEAD_DIM)
    row_lse = tl.load(lse + lse_rows, mask=there, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2E)
    row_delta = tl.load(delta + lse_rows, mask=there, other=0.0)
    q_e, g_e = q_d, g_d
    acc, acc_e = row_delta, row_delta
    if DQ:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BLOCK_E > 0:
        q_e = load_rows(q, q_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM)
        g_e = load_rows(grad, g_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM)
        if DQ:
            acc_e = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    if WINDOW and DQ:
        kv += b * kv_batch
        start, stop = window_span(first_query, last_query, keys, window, offset)
        for low in tl.range(start, stop, BLOCK_N):
            key = low + tl.arange(0, BLOCK_N)
            inside = key < stop
            key_rows = key.to(tl.int64) * kv_key
            k = load_rows(kv, key_rows, inside, 0, BLOCK_D, HEAD_DIM)
            k_e = k
            if BLOCK_E > 0:
                k_e = load_rows(kv, key_rows, inside, BLOCK_D, BLOCK_E, HEAD_DIM)
            kept = inside
            if PADDING:
                kept = inside & (tl.load(padding + b * padding_batch + key, mask=inside, other=0) != 0)
            seen = kept[None, :] & in_window(key[None, :], position[:, None], window)
            acc, acc_e, p, d = query_step(
                low < stop,
                q_d,
                q_e,
                g_d,
                g_e,
                k,
                k_e,
                seen,
                row_lse,
                row_delta,
                scale,
                acc,
                acc_e,
                PRECISION,
                UNCHAIN,
                DQ,
                BLOCK_E,
            )

    if MODE == "ready" and DQ:
        compressed += b * compressed_batch
        stop = ready_count(last_query + offset, entries, RATIO)
        count = ready_count(position, entries, RATIO)
        for low in tl.range(0, stop, BLOCK_N):
            entry = low + tl.arange(0, BLOCK_N)
            inside = entry < stop
            key_rows = entry.to(tl.int64) * compressed_entry
            k = load_rows(compressed, key_rows, inside, 0, BLOCK_D, HEAD_DIM)
            k_e = k
            if BLOCK_E > 0:
                k_e = load_rows(compressed, key_rows, inside, BLOCK_D, BLOCK_E, HEAD_DIM)
            seen = inside[None, :] & (entry[None, :] < count[:, None])
            acc, acc_e, p, d = query_step(
                low < stop,
                q_d,
                q_e,
                g_d,
                g_e,
                k,
                k_e,
                seen,
                row_lse,
                row_delta,
                scale,
                acc,
                acc_e,
                PRECISION,
                UNCHAIN,
                DQ,
                BLOCK_E,
            )

    if MODE == "selected":
        compressed += b * compressed_batch
        indices += b * indices_batch + first_query.to(tl.int64) * indices_query
        pair = ((head_tile * batch + b) * queries + first_query) * selected
        stop = used_slots(indices, selected, 1024)
        for low in tl.range(0, stop, BLOCK_N):
            entry, inside = selected_entries(indices, low, stop, entries, BLOCK_N)
            key_rows = entry_offsets(entry, compressed_entry, compressed_page, PAGE)
            k = load_rows(compressed, key_rows, inside, 0, BLOCK_D, HEAD_DIM)
            k_e = k
            if BLOCK_E > 0:
                k_e = load_rows(compressed, key_rows, inside, BLOCK_D, BLOCK_E, HEAD_DIM)
            seen = inside[None, :] & there[:, None]
            acc, acc_e, p, d = query_step(
                low < stop,
                q_d,
                q_e,
                g_d,
                g_e,
                k,
                k_e,
                seen,
                row_lse,
                row_delta,
                scale,
                acc,
                acc_e,
                PRECISION,
                UNCHAIN,
                DQ,
                BLOCK_E,
            )
            if SCATTER != "":
                if SCATTER == "add":
                    targets = (b * entries + entry) * HEAD_DIM
                else:
                    targets = (pair + low + tl.arange(0, BLOCK_N)) * HEAD_DIM
                give(p, d, q_d, g_d, grad_entries, targets, inside, 0, BLOCK_D, HEAD_DIM, SCATTER, PRECISION)
                if BLOCK_E > 0:
                    give(p, d, q_e, g_e, grad_entries, targets, inside, BLOCK_D, BLOCK_E, HEAD_DIM, SCATTER, PRECISION)

    if DQ:
        gq_rows = b * gq_batch + query * gq_query + head * gq_head
        store_rows(grad_q, gq_rows, there, acc, 0, BLOCK_D, HEAD_DIM)
        if BLOCK_E > 0:
            store_rows(grad_q, gq_rows, there, acc_e, BLOCK_D, BLOCK_E, HEAD_DIM)
