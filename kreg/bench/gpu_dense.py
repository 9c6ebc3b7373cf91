"""``attention`` in ``kreg bench --device cuda``: its work and its arguments. Prompts, whole."""

from __future__ import annotations

from typing import Any

import torch

from kreg.bench.gpu_case import Case, band


def pairs(case: Case) -> int:
    """Pairs of a query and a key that the mask keeps, in one sequence; counted, not estimated."""
    return band(case, case.sizes.window if case.layer == "window" else case.context)


def work(case: Case, element: int) -> tuple[float, float]:
    """Floating-point operations that cannot be avoided, and bytes that have to be read or written once.

    A forward has two products for each pair that is kept, a backward five. Queries, keys and values are read and
    results written; a backward reads the results and their gradient too, and writes the gradients of what was read.

    Args:
        element: bytes of one number.
    """
    s, backward = case.sizes, case.step == "backward"
    operations = 2.0 * (5 if backward else 2) * case.batch * s.heads * s.head_dim * pairs(case)
    row = case.queries * s.heads * s.head_dim * element
    keys = 2 * case.context * s.kv_heads * s.head_dim * element
    rows_moved, keys_moved = (4, 2) if backward else (2, 1)
    return operations, float(case.batch * (rows_moved * row + keys_moved * keys))


def arguments(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Random arguments, standard normal, stored as a model's projections are: heads side by side."""
    g = torch.Generator(device).manual_seed(seed)
    s = case.sizes

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    made: dict[str, Any] = {
        "q": normal(case.batch, case.queries, s.heads, s.head_dim).transpose(1, 2),
        "k": normal(case.batch, case.context, s.kv_heads, s.head_dim).transpose(1, 2),
        "v": normal(case.batch, case.context, s.kv_heads, s.head_dim).transpose(1, 2),
        "scale": s.head_dim**-0.5,
        "causal": True,
        "offset": case.context - case.queries,
    }
    if case.layer == "window":
        made["window"] = s.window
    if case.layer == "sinks":
        made["sinks"] = normal(s.heads)
    return made
