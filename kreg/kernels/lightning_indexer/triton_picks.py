"""Launches the selection of each query's best entries: whole rows at once, or parts whose best are merged."""

from __future__ import annotations

from typing import Any

import torch
import triton

from kreg.kernels.gpu import Table, current_target, launch
from kreg.kernels.lightning_indexer.triton_scores import Packed
from kreg.kernels.lightning_indexer.triton_select import enumerate_kernel, merge_kernel, select_kernel


def _masks(padding: torch.Tensor | None, ends: torch.Tensor | None, packed: Packed | None) -> dict[str, Any]:
    """The arguments that say which entries are ready, as `select_kernel` and `enumerate_kernel` take them."""
    return {
        "padding": padding,
        "ends": ends,
        "positions": None if packed is None else packed.positions,
        "requests": None if packed is None else packed.requests,
        "lengths": None if packed is None else packed.lengths,
        "padding_batch": 0 if padding is None else padding.stride(0),
        "padding_entry": 0 if padding is None else padding.stride(1),
        "ends_batch": 0 if ends is None else ends.stride(0),
        "ends_entry": 0 if ends is None else ends.stride(1),
    }


def enumerated(
    table: Table,
    indices: torch.Tensor,
    *,
    padding: torch.Tensor | None,
    ends: torch.Tensor | None,
    first_position: int,
    entries: int,
    ratio: int,
    sentinel: bool,
    added: int = 0,
    packed: Packed | None = None,
) -> None:
    """Fill ``indices`` [batch, rows, topk] with every ready entry, where there are no more than topk."""
    batch, rows, topk = indices.shape
    config = table.pick("enumerate_kernel", current_target(indices.device))
    launch(
        enumerate_kernel,
        (triton.cdiv(rows, config["ROWS"]), triton.cdiv(topk, config["BLOCK"]), batch),
        config,
        indices=indices,
        **_masks(padding, ends, packed),
        indices_batch=indices.stride(0),
        indices_row=indices.stride(1),
        rows=rows,
        entries=entries,
        first_position=first_position,
        added=added,
        topk=topk,
        RATIO=ratio,
        SENTINEL=sentinel,
    )


def parts_of(table: Table, device: torch.device, width: int, topk: int) -> list[int]:
    """The number of parts that each selection of a row of ``width`` scores has, the last one 1."""
    counts: list[int] = []
    while not counts or counts[-1] > 1:
        config = table.pick("merge_kernel" if counts else "select_kernel", current_target(device), width=width)
        if config["BLOCK"] < min(width, 2 * topk):
            raise ValueError(
                f"{table.where}: {config.label} selects {topk} of {config['BLOCK']} scores at a time, and rows of "
                f"{width} would not get shorter: a BLOCK has to be twice topk, or as wide as the row"
            )
        counts.append(max(1, triton.cdiv(width, config["BLOCK"])))
        width = counts[-1] * topk
    return counts


def selected(
    table: Table,
    scores: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor | None,
    *,
    padding: torch.Tensor | None,
    ends: torch.Tensor | None,
    first_position: int,
    entries: int,
    width: int,
    unscored: int,
    ratio: int,
    sentinel: bool,
    added: int = 0,
    packed: Packed | None = None,
) -> None:
    """Select each row's best: write ``indices`` [batch, rows, topk], and ``values`` where they are wanted.

    Args:
        table: the tuning table.
        scores: float32 [batch, rows, at least ``width``], as `scores_into` leaves them.
        indices: int64 or int32; slots that nothing is left for get -1.
        values: float32, -inf there; or None.
        padding, ends: as the op has them.
        first_position, entries, unscored, ratio, packed: as in `scores_into`.
        width: the first so many entries may be selected; at least as many as may be ready.
        sentinel: whether entries that are not ready are left out; else they may fill slots.
        added: to every selected entry's number.
    """
    batch, rows, topk = indices.shape
    counts = parts_of(table, scores.device, width, topk)
    device = current_target(scores.device)
    source: tuple[torch.Tensor, torch.Tensor] | None = None
    for level, parts in enumerate(counts):
        last = level == len(counts) - 1
        shape = (batch, rows, parts * topk)
        to_indices = indices if last else scores.new_empty(shape, dtype=torch.int32)
        to_values = values if last else scores.new_empty(shape)
        name = "select_kernel" if source is None else "merge_kernel"
        config = table.pick(name, device, width=width)
        grid = (triton.cdiv(rows, config["ROWS"]), parts, batch)
        shared: dict[str, Any] = {
            "indices": to_indices,
            "values": to_values,
            "indices_batch": to_indices.stride(0),
            "indices_row": to_indices.stride(1),
            "values_batch": 0 if to_values is None else to_values.stride(0),
            "values_row": 0 if to_values is None else to_values.stride(1),
            "rows": rows,
            "width": width,
            "added": added if last else 0,
            "topk": topk,
            "BLOCK_K": triton.next_power_of_2(topk),
        }
        if source is None:
            launch(
                select_kernel,
                grid,
                config,
                scores=scores,
                scores_batch=scores.stride(0),
                scores_row=scores.stride(1),
                **_masks(padding, ends, packed),
                entries=entries,
                first_position=first_position,
                unscored=unscored,
                RATIO=ratio,
                SENTINEL=sentinel,
                **shared,
            )
        else:
            launch(
                merge_kernel,
                grid,
                config,
                from_indices=source[0],
                from_values=source[1],
                from_batch=source[0].stride(0),
                from_row=source[0].stride(1),
                **shared,
            )
        assert last or to_values is not None
        source = None if to_values is None else (to_indices, to_values)
        width = parts * topk
