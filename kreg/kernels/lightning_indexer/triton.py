"""``lightning_indexer`` in Triton: strips of queries are scored into a bounded workspace and selected from there.

The scores of a strip are written once and read once, and the workspace is what bounds memory: `WORKSPACE` bytes, and
one row at least, whatever the numbers of queries and entries. Queries for which no more entries are ready than are
selected are not scored. Among equal scores the lowest entries are selected, and a query's picks are in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from kreg.kernels.gpu import Launch, Table, Target, record
from kreg.kernels.lightning_indexer.triton_gradient import gradients
from kreg.kernels.lightning_indexer.triton_picks import enumerated, parts_of, selected
from kreg.kernels.lightning_indexer.triton_scores import Packed, scores_into

WORKSPACE = 128 << 20
"""Bytes of scores, candidates, or parts of a gradient that are held at once, where one row takes no more."""

TABLE = Table.read(Path(__file__).parent / "tuning/triton.yaml")
TABLES = (TABLE,)

LARGEST_TOPK = 4096
"""A part of a row that a program selects from has twice as many entries at most."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    padding: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    *,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    scored: bool = False,
    sentinel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected entries and their scores, as the op has them."""
    batch, queries = q.shape[:2]
    indices = q.new_empty(batch, queries, topk, dtype=torch.int64)
    best = q.new_empty(batch, queries, topk if scored else 0, dtype=torch.float32)
    select_into(
        indices,
        best if scored else None,
        q,
        k,
        weights,
        padding=padding,
        ends=ends,
        scale=scale,
        ratio=ratio,
        offset=offset,
        entries=k.shape[1],
        sentinel=sentinel,
    )
    return indices, best


def select_into(
    indices: torch.Tensor,
    best: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    padding: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    scale: float,
    ratio: int,
    offset: int,
    entries: int,
    sentinel: bool,
    added: int = 0,
    packed: Packed | None = None,
) -> None:
    """Fill ``indices`` [batch, queries, topk] and, where it is given, ``best``; arguments as `selected` has them.

    Raises:
        ValueError: more entries are selected than a program can hold.
    """
    batch, queries, topk = indices.shape
    if topk > LARGEST_TOPK:
        raise ValueError(
            f"topk is {topk}, and the Triton indexer selects {LARGEST_TOPK} entries at most: "
            "leave this call to the op's reference"
        )
    if not indices.numel():
        return

    def most(stop: int) -> int:
        """Entries that may be ready for the last query before ``stop``."""
        return min(entries, max(0, stop + offset) // ratio) if ratio and packed is None else entries

    if best is None and most(queries) <= topk:
        enumerated(
            TABLE,
            indices,
            padding=padding,
            ends=ends,
            first_position=offset,
            entries=entries,
            ratio=ratio,
            sentinel=sentinel,
            added=added,
            packed=packed,
        )
        return
    if q.dtype is not k.dtype:
        common = torch.promote_types(q.dtype, k.dtype)
        q, k = q.to(common), k.to(common)
    widest = max(most(queries), topk)
    unscored = topk if best is None else -1
    parts = parts_of(TABLE, q.device, widest, topk)
    rows = max(1, WORKSPACE // (4 * widest + 8 * topk * sum(p for p in parts if p > 1)))
    batches = min(batch, rows)
    step = max(1, min(queries, rows // batches))
    workspace = q.new_empty(batches * step * widest, dtype=torch.float32)
    for first in range(0, batch, batches):
        some = slice(first, min(first + batches, batch))
        for start in range(0, queries, step):
            part = slice(start, min(start + step, queries))
            width = max(most(part.stop), topk)
            shape = some.stop - some.start, part.stop - part.start, width
            scores = workspace[: shape[0] * shape[1] * width].view(shape)
            here = packed.part(part.start, part.stop) if packed is not None else None
            if most(part.stop) > unscored:
                scores_into(
                    TABLE,
                    scores,
                    q[some, part],
                    k if packed is not None else k[some],
                    weights[some, part],
                    first_position=part.start + offset,
                    entries=most(part.stop),
                    unscored=unscored,
                    ratio=ratio,
                    scale=scale,
                    packed=here,
                )
            selected(
                TABLE,
                scores,
                indices[some, part],
                None if best is None else best[some, part],
                padding=None if padding is None else padding[some],
                ends=None if ends is None else ends[some],
                first_position=part.start + offset,
                entries=entries,
                width=width,
                unscored=unscored,
                ratio=ratio,
                sentinel=sentinel,
                added=added,
                packed=here,
            )


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    padding: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    scale: float,
    topk: int,
    ratio: int,
    offset: int = 0,
    scored: bool = False,
    sentinel: bool = True,
) -> dict[str, torch.Tensor]:
    """Gradients of the selected scores: sums of one program each, but for the keys', which PyTorch adds in order."""
    arguments = {"q": q, "k": k, "weights": weights}
    grad, (indices, best) = grads[1], outputs
    if grad is None or not scored or not indices.numel():
        return {name: torch.zeros_like(value) for name, value in arguments.items() if name in needs}
    wanted = {
        name: torch.empty(value.shape, dtype=value.dtype, device=value.device)
        for name, value in arguments.items()
        if name in needs and name != "k"
    }
    if "k" in needs:
        wanted["k"] = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    common = torch.promote_types(q.dtype, k.dtype)
    gradients(TABLE, wanted, q.to(common), k.to(common), weights, indices, best, grad, scale=scale, workspace=WORKSPACE)
    return {name: value.to(arguments[name].dtype) for name, value in wanted.items()}


# Calls that differ in what is launched: batch, queries, heads, dim, entries, and the rest of the call.
SHAPES: tuple[tuple[int, int, int, int, int, dict[str, int]], ...] = (
    (1, 16384, 64, 128, 4096, {"topk": 512, "ratio": 4}),  # prefill
    (1, 1, 64, 128, 1 << 20, {"topk": 512, "ratio": 4, "offset": 4 << 20}),  # decoding
    (2, 4096, 64, 64, 2048, {"topk": 1024, "ratio": 1}),
    (2, 4096, 128, 256, 512, {"topk": 64, "ratio": 0}),
    (2, 4096, 4, 32, 128, {"topk": 16, "ratio": 4, "sentinel": False}),
    (1, 16, 64, 128, 16384, {"topk": 512, "ratio": 0}),
    (1, 4096, 64, 128, 512, {"topk": 512, "ratio": 4}),  # everything that is ready
)


def builds(target: Target) -> Iterator[Launch]:
    """The launches of representative calls, forward and backward, with and without scores; equal ones once."""
    return different(launch for dtype in DTYPES for shape in SHAPES for launch in _launches(target, dtype, *shape))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def different(launches: Iterable[Launch]) -> Iterator[Launch]:
    """Those that are compiled to something else than one before."""
    seen = set()
    for launch in launches:
        given = launch.arguments
        tensors = tuple(str(given[name].dtype) for name in ("q", "k") if name in given)
        blocks = tuple(given.get(name) for name in ("BLOCK_D", "BLOCK_H", "BLOCK_K", "RATIO", "SENTINEL"))
        absent = tuple(given.get(name) is None for name in ("values", "padding", "positions", "requests", "table"))
        key = (launch.name, str(launch.config), tensors, blocks, absent)
        if key not in seen:
            seen.add(key)
            yield launch


def _launches(
    target: Target,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    heads: int,
    dim: int,
    entries: int,
    rest: dict[str, int],
) -> Iterator[Launch]:
    call: dict[str, Any] = {
        "q": torch.empty(batch, queries, heads, dim, dtype=dtype, device="meta"),
        "k": torch.empty(batch, entries, dim, dtype=dtype, device="meta"),
        "weights": torch.empty(batch, queries, heads, dtype=dtype, device="meta"),
        "scale": 1.0,
    } | rest
    masks = {
        "padding": torch.empty(batch, entries, dtype=torch.bool, device="meta"),
        "ends": torch.empty(batch, entries, dtype=torch.int64, device="meta"),
    }
    yield from record(target, _both, call)
    yield from record(target, _both, call | masks | {"scored": True})


def _both(call: dict[str, Any]) -> None:
    outputs = forward(**call)
    backward((None, outputs[1]), outputs, frozenset(("q", "k", "weights")), **call)
