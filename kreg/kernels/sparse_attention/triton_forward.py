"""The forward of ``sparse_attention`` in Triton: one online softmax over window, ready or selected entries, and sink.

The heads of a query are the rows of its matrix products, so a tile of keys is loaded once, and is both keys and values
of all of them. Where entries are selected, a program has one query, and gathers; elsewhere neighbouring queries fill
up the rows. Long ranges can be split among programs, whose parts `combine` adds up in a fixed order.
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
    load_rows,
    products,
    ready_count,
    rows_of,
    selected_entries,
    share,
    store_rows,
    used_slots,
    window_span,
)


@triton.jit
def softmax_step(scores, m, l):
    """Weights of a tile, and by how much what came before shrinks; ``m`` is -inf before the first key."""
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(m - base)
    return p, shrink, m_new, l * shrink + tl.sum(p, axis=1)


@triton.jit
def attend(
    more,  # true, but not known to be
    q,
    q_e,
    k,
    k_e,
    seen,
    factor,
    m,
    l,
    acc,
    acc_e,
    PRECISION: tl.constexpr,
    UNCHAIN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One more tile of keys in the online softmax; logits in base 2.

    With ``UNCHAIN`` the softmax is in a branch of its own. Triton gives a product whose result flows into another
    product all its warps along the rows; for 64 rows and 8 warps, both warp groups of an H100 then compute the same
    scores, in pieces of half the size. It does not look through a branch.
    """
    scores = tl.where(seen, products(q, q_e, k, k_e, PRECISION, BLOCK_E) * factor, float("-inf"))
    if UNCHAIN:
        p, shrink, m_new, l_new = scores, m, m, l
        if more:
            p, shrink, m_new, l_new = softmax_step(scores, m, l)
    else:
        p, shrink, m_new, l_new = softmax_step(scores, m, l)
    p = p.to(k.dtype)
    acc = dot(p, k, acc * shrink[:, None], PRECISION)
    if BLOCK_E > 0:
        acc_e = dot(p, k_e, acc_e * shrink[:, None], PRECISION)
    return m_new, l_new, acc, acc_e


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q,
    kv,
    compressed,
    indices,
    sinks,
    padding,
    out,  # [(splits,) batch, queries, heads, HEAD_DIM]
    lse,  # [batch, heads, queries], or in base 2 [splits, batch, queries, heads]
    scale,
    window,
    offset,
    queries,
    heads,
    keys,
    entries,
    selected,
    batch,
    splits,
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
    HEAD_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    MODE: tl.constexpr,  # "window": no entries; "ready": those that are ready; "selected": those in indices
    WINDOW: tl.constexpr,  # whether kv is there
    SINKS: tl.constexpr,
    PADDING: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    UNCHAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",  # of float32, as tl.dot has it
):
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_H
    # A query's head tiles are neighbours, to find its keys in the cache; the last queries, which see most, go first.
    head_tiles = tl.cdiv(heads, BLOCK_H)
    tiles = tl.cdiv(queries, BLOCK_Q)
    program = tl.program_id(0)
    head_tile = program % head_tiles
    tile = tiles - 1 - (program // head_tiles) % tiles
    b = (program // head_tiles // tiles).to(tl.int64)
    split = tl.program_id(1)

    query, head, there = rows_of(tile, head_tile, queries, heads, BLOCK_M, BLOCK_H)
    position = query + offset
    first_query = tile * BLOCK_Q
    last_query = tl.minimum(first_query + BLOCK_Q, queries) - 1

    q_rows = query.to(tl.int64) * q_query + head.to(tl.int64) * q_head
    q += b * q_batch
    q_d = load_rows(q, q_rows, there, 0, BLOCK_D, HEAD_DIM)
    factor = scale * LOG2E

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BLOCK_E > 0:
        q_e = load_rows(q, q_rows, there, BLOCK_D, BLOCK_E, HEAD_DIM)
        acc_e = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    else:
        q_e = q_d
        acc_e = l
    if SINKS:
        sink = tl.load(sinks + head, mask=there, other=float("-inf")).to(tl.float32) * LOG2E
        if SPLIT:
            sink = tl.where(split == 0, sink, float("-inf"))
        m = sink
        l = tl.where(sink == float("-inf"), 0.0, 1.0)

    if WINDOW:
        kv += b * kv_batch
        start, stop = window_span(first_query, last_query, keys, window, offset)
        if SPLIT:
            start, stop = share(start, stop, split, splits, BLOCK_N)
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
            m, l, acc, acc_e = attend(
                low < stop, q_d, q_e, k, k_e, seen, factor, m, l, acc, acc_e, PRECISION, UNCHAIN, BLOCK_E
            )

    if MODE == "ready":
        compressed += b * compressed_batch
        start = 0
        stop = ready_count(last_query + offset, entries, RATIO)
        if SPLIT:
            start, stop = share(start, stop, split, splits, BLOCK_N)
        count = ready_count(position, entries, RATIO)
        for low in tl.range(start, stop, BLOCK_N):
            entry = low + tl.arange(0, BLOCK_N)
            inside = entry < stop
            key_rows = entry.to(tl.int64) * compressed_entry
            k = load_rows(compressed, key_rows, inside, 0, BLOCK_D, HEAD_DIM)
            k_e = k
            if BLOCK_E > 0:
                k_e = load_rows(compressed, key_rows, inside, BLOCK_D, BLOCK_E, HEAD_DIM)
            seen = inside[None, :] & (entry[None, :] < count[:, None])
            m, l, acc, acc_e = attend(
                low < stop, q_d, q_e, k, k_e, seen, factor, m, l, acc, acc_e, PRECISION, UNCHAIN, BLOCK_E
            )

    if MODE == "selected":
        compressed += b * compressed_batch
        indices += b * indices_batch + first_query.to(tl.int64) * indices_query
        start = 0
        stop = used_slots(indices, selected, 1024)
        if SPLIT:
            start, stop = share(start, stop, split, splits, BLOCK_N)
        for low in tl.range(start, stop, BLOCK_N):
            entry, inside = selected_entries(indices, low, stop, entries, BLOCK_N)
            key_rows = entry_offsets(entry, compressed_entry, compressed_page, PAGE)
            k = load_rows(compressed, key_rows, inside, 0, BLOCK_D, HEAD_DIM)
            k_e = k
            if BLOCK_E > 0:
                k_e = load_rows(compressed, key_rows, inside, BLOCK_D, BLOCK_E, HEAD_DIM)
            seen = inside[None, :] & there[:, None]
            m, l, acc, acc_e = attend(
                low < stop, q_d, q_e, k, k_e, seen, factor, m, l, acc, acc_e, PRECISION, UNCHAIN, BLOCK_E
            )

    total = tl.where(l == 0.0, 1.0, l)
    logarithm = tl.where(l == 0.0, float("-inf"), m + tl.log2(total))
    out_rows = ((b * queries + query) * heads + head) * HEAD_DIM
    if SPLIT:
        part = split.to(tl.int64) * batch * queries * heads
        out_rows += part * HEAD_DIM
        tl.store(lse + part + (b * queries + query) * heads + head, logarithm, mask=there)
    else:
        tl.store(lse + (b * heads + head) * queries + query, logarithm / LOG2E, mask=there)
    store_rows(out, out_rows, there, acc / total[:, None], 0, BLOCK_D, HEAD_DIM)
    if BLOCK_E > 0:
        store_rows(out, out_rows, there, acc_e / total[:, None], BLOCK_D, BLOCK_E, HEAD_DIM)


@triton.jit
def combine_kernel(
    parts,  # float32 [splits, rows, HEAD_DIM], rows of (batch, query, head)
    logarithms,  # float32 [splits, rows], base 2
    out,  # [rows, HEAD_DIM]
    lse,  # [batch, heads, queries]
    rows,
    queries,
    heads,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Softmaxes over parts of the keys, made one."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < rows
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = there[:, None] & (channel < HEAD_DIM)[None, :]
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    place = row
    for _ in range(splits):
        m = tl.maximum(m, tl.load(logarithms + place, mask=there, other=float("-inf")))
        place += rows
    base = tl.where(m == float("-inf"), 0.0, m)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    place = row
    for _ in range(splits):
        weight = tl.exp2(tl.load(logarithms + place, mask=there, other=float("-inf")) - base)
        l += weight
        part = tl.load(parts + place[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * part
        place += rows
    total = tl.where(l == 0.0, 1.0, l)
    tl.store(
        out + row[:, None] * HEAD_DIM + channel[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mask
    )
    if tl.program_id(1) == 0:
        logarithm = tl.where(l == 0.0, float("-inf"), m + tl.log2(total))
        query_row = row // heads
        place = (query_row // queries * heads + row % heads) * queries + query_row % queries
        tl.store(lse + place, logarithm / LOG2E, mask=there)
