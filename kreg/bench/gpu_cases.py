"""What ``kreg bench --device cuda`` measures: calls of single ops, at sizes of published models, and their work."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch

from kreg.bench import gpu_dense, gpu_serving, gpu_sparse
from kreg.bench.gpu_case import FLASH, GROUPED, SMALL_HEADS, Case, Sizes

__all__ = ["DECODE", "DENSE", "FLASH", "PREFILL", "arguments", "cases", "pairs", "work"]

OPS: dict[str, ModuleType] = {
    "sparse_attention": gpu_sparse,
    "lightning_indexer": gpu_sparse,
    "attention": gpu_dense,
    "sparse_mqa_sink": gpu_serving,
    "indexer_topk": gpu_serving,
}
"""The module that knows each op's pairs, work and arguments."""

PREFILL, DECODE, DENSE = (1024, 4096, 16384, 65536), (4096, 65536, 1048576), (4096, 16384)


def pairs(case: Case) -> int:
    """Pairs of a query and a key that have to be multiplied, in one sequence; counted, not estimated."""
    return int(OPS[case.op].pairs(case))


def work(case: Case, element: int) -> tuple[float, float]:
    """Floating-point operations that cannot be avoided, and bytes (of ``element`` a number) to be moved once."""
    operations, moved = OPS[case.op].work(case, element)
    return operations, moved


def arguments(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Random arguments of the case's op, standard normal; indices are distinct and ready."""
    made: dict[str, Any] = OPS[case.op].arguments(case, dtype, device, seed)
    return made


def cases(
    sizes: Sizes = FLASH,
    prefill: tuple[int, ...] = PREFILL,
    decode: tuple[int, ...] = DECODE,
    dense: tuple[int, ...] = DENSE,
    layers: dict[str, Sizes] | None = None,
) -> list[Case]:
    """Every case, those that say most first: a run that is cut short has them.

    Args:
        sizes: for the sparse ops and the serving ops.
        prefill, decode, dense: positions: of prompts, behind decoding steps, and of prompts of ``attention``.
        layers: kinds of ``attention`` and their sizes.
    """
    layers = layers or {"causal": GROUPED, "window": GROUPED, "sinks": SMALL_HEADS}
    found: list[Case] = []
    by_weight = sorted(prefill, key=lambda n: abs(math.log(n / 16384)))
    for context in by_weight:
        found += [
            Case("sparse_attention", "selected", "forward", 1, context, sizes),
            Case("lightning_indexer", "selected", "forward", 1, context, sizes),
            Case("sparse_attention", "selected", "backward", 1, context, sizes),
        ]
    for context in decode:
        for batch in (1, 64):
            found += [
                Case("sparse_attention", "selected", "decode", batch, context, sizes),
                Case("lightning_indexer", "selected", "decode", batch, context, sizes),
            ]
    for context in decode:
        found += [Case(op, "selected", "decode", 64, context, sizes) for op in ("sparse_mqa_sink", "indexer_topk")]
    for context in sorted(dense, reverse=True):
        for layer, widths in layers.items():
            found += [Case("attention", layer, step, 1, context, widths) for step in ("forward", "backward")]
    for context in by_weight:
        for layer in ("sliding", "compressed"):
            for step in ("forward", "backward"):
                found.append(Case("sparse_attention", layer, step, 1, context, sizes))
    found += [Case("sparse_attention", "compressed", "decode", 1, context, sizes) for context in decode]
    return found
