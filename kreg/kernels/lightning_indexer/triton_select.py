"""The best entries of each query in Triton: exact, and the same whatever the tiles.

Scores become integers of the same order, and a binary search in registers finds the largest threshold that as many
scores as wanted reach: 32 counts at most, none more once exactly as many do. What passes is written in the
order of the entries; of scores equal to the threshold those of the lowest entries. A row longer than a program can
hold is cut: each part gives its own best, and the best of those are selected in turn. Parts and what they give stay
in the order of the entries, so a tie is broken in the same way.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (parameters of Triton functions are Triton values)

from __future__ import annotations

import triton
import triton.language as tl

from kreg.kernels.lightning_indexer.triton_scores import CHANGING, ready_count, request_of

ABSENT = tl.constexpr(-(1 << 31))
"""The key of no candidate, below that of any score."""


@triton.jit
def ordered(score):
    """An int32 that is larger where the score is; NaN is the largest, as torch's topk has it, and -0.0 is 0.0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, key)


@triton.jit
def score_of(key):
    """The inverse of `ordered`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def slots_of(key, wanted):
    """Which of each row's keys are its ``wanted`` largest, and their places among those, in order.

    Args:
        key: int32 [ROWS, BLOCK], at most 2**13 columns.
        wanted: int32 [ROWS], at most as many as are not `ABSENT`.
    """
    low = tl.min(tl.where(key == ABSENT, 0x7FFFFFFF, key), 1)
    high = tl.max(key, 1)
    reached = tl.sum((key >= low[:, None]).to(tl.int32), 1)
    searching = (reached > wanted) & (low < high)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)  # the upper middle, without overflow
        reached = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(searching & (reached >= wanted), middle, low)
        high = tl.where(searching & (reached < wanted), middle - 1, high)
        searching = searching & (low < high) & (reached != wanted)
    above = (key > low[:, None]).to(tl.int32)
    equal = ((key == low[:, None]) & (key != ABSENT)).to(tl.int32)
    ties = wanted - tl.sum(above, 1)
    # Both counts in one scan: no more than 2**13 of each.
    before = tl.cumsum(above + (equal << 16), 1)
    above_before = (before & 0xFFFF) - above
    equal_before = (before >> 16) - equal
    chosen = (above == 1) | ((equal == 1) & (equal_before < ties[:, None]))
    return chosen, above_before + tl.minimum(equal_before, ties[:, None])


@triton.jit
def write_slots(
    indices,
    values,
    at_indices,
    at_values,
    entry,
    key,
    chosen,
    slot,
    wanted,
    inside,
    added,
    topk,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write chosen entries and scores to their slots, and -1 and -inf to those that are left over."""
    tl.store(indices + at_indices[:, None] + slot, entry + added, mask=chosen)
    if values is not None:
        tl.store(values + at_values[:, None] + slot, score_of(key), mask=chosen)
    empty = tl.arange(0, BLOCK_K)[None, :]
    left = inside[:, None] & (empty >= wanted[:, None]) & (empty < topk)
    tl.store(indices + at_indices[:, None] + empty, -1, mask=left)
    if values is not None:
        tl.store(values + at_values[:, None] + empty, float("-inf"), mask=left)


@triton.jit(do_not_specialize=CHANGING)
def select_kernel(
    scores,
    indices,
    values,
    padding,
    ends,
    positions,
    requests,
    lengths,
    scores_batch,
    scores_row,
    indices_batch,
    indices_row,
    values_batch,
    values_row,
    padding_batch,
    padding_entry,
    ends_batch,
    ends_entry,
    rows,
    entries,
    width,
    first_position,
    unscored,
    added,
    topk,
    RATIO: tl.constexpr,
    SENTINEL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select from a strip's scores; programs: tiles of rows, parts of ``BLOCK`` entries, batch.

    Each part writes ``topk`` slots. Rows with at most ``unscored`` ready entries have no scores: all are taken.
    """
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    request = request_of(requests, row, inside)
    counts = ready_count(row, request, inside, positions, lengths, first_position, entries, RATIO)

    ready = entry[None, :] < counts[:, None]
    if padding is not None:
        kept = tl.load(padding + batch * padding_batch + entry * padding_entry, mask=entry < entries, other=0)
        ready = ready & (kept != 0)[None, :]
    if ends is not None:
        end = tl.load(ends + batch * ends_batch + entry * ends_entry, mask=entry < entries, other=0)
        ready = ready & (end[None, :] <= (first_position + row)[:, None])
    scored = ready & (counts > unscored)[:, None]
    at = batch * scores_batch + row.to(tl.int64) * scores_row
    score = tl.load(scores + at[:, None] + entry[None, :], mask=scored, other=0.0)
    score = tl.where(ready, score, float("-inf"))

    key = ordered(score)
    candidate = inside[:, None] & (entry < width)[None, :]
    if SENTINEL:
        candidate = candidate & (score != float("-inf"))
    key = tl.where(candidate, key, ABSENT)
    wanted = tl.minimum(topk, tl.sum(candidate.to(tl.int32), 1))
    chosen, slot = slots_of(key, wanted)
    part = tl.program_id(1) * topk
    at_indices = batch * indices_batch + row.to(tl.int64) * indices_row + part
    at_values = batch * values_batch + row.to(tl.int64) * values_row + part
    entry = tl.broadcast_to(entry[None, :], (ROWS, BLOCK))
    write_slots(
        indices, values, at_indices, at_values, entry, key, chosen, slot, wanted, inside, added, topk,
        ROWS, BLOCK, BLOCK_K,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    from_indices,
    from_values,
    indices,
    values,
    from_batch,
    from_row,
    indices_batch,
    indices_row,
    values_batch,
    values_row,
    rows,
    width,
    added,
    topk,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select from the candidates that parts gave; programs: tiles of rows, parts of ``BLOCK`` candidates, batch."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    at = (batch * from_batch + row.to(tl.int64) * from_row)[:, None] + place[None, :]
    near = inside[:, None] & (place < width)[None, :]
    entry = tl.load(from_indices + at, mask=near, other=-1)
    score = tl.load(from_values + at, mask=near, other=float("-inf"))

    candidate = entry >= 0
    key = tl.where(candidate, ordered(score), ABSENT)
    wanted = tl.minimum(topk, tl.sum(candidate.to(tl.int32), 1))
    chosen, slot = slots_of(key, wanted)
    part = tl.program_id(1) * topk
    at_indices = batch * indices_batch + row.to(tl.int64) * indices_row + part
    at_values = batch * values_batch + row.to(tl.int64) * values_row + part
    write_slots(
        indices, values, at_indices, at_values, entry, key, chosen, slot, wanted, inside, added, topk,
        ROWS, BLOCK, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def enumerate_kernel(
    indices,
    padding,
    ends,
    positions,
    requests,
    lengths,
    indices_batch,
    indices_row,
    padding_batch,
    padding_entry,
    ends_batch,
    ends_entry,
    rows,
    entries,
    first_position,
    added,
    topk,
    RATIO: tl.constexpr,
    SENTINEL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entry j into slot j where it is ready, else -1 where ``SENTINEL``; programs: tiles of rows, of slots, batch."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    found = tl.broadcast_to(entry[None, :] + added, (ROWS, BLOCK))
    if SENTINEL:
        request = request_of(requests, row, inside)
        counts = ready_count(row, request, inside, positions, lengths, first_position, entries, RATIO)
        ready = entry[None, :] < counts[:, None]
        if padding is not None:
            kept = tl.load(padding + batch * padding_batch + entry * padding_entry, mask=entry < entries, other=0)
            ready = ready & (kept != 0)[None, :]
        if ends is not None:
            end = tl.load(ends + batch * ends_batch + entry * ends_entry, mask=entry < entries, other=0)
            ready = ready & (end[None, :] <= (first_position + row)[:, None])
        found = tl.where(ready, found, -1)
    at = batch * indices_batch + row.to(tl.int64) * indices_row
    tl.store(indices + at[:, None] + entry[None, :], found, mask=inside[:, None] & (entry < topk)[None, :])
