"""``grouped_matmul``: rows in groups, each group times a matrix of its own; what a mixture of experts comes to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kreg.registry.op import Arguments, Dims, Op

SCHEMA = "(Tensor x, Tensor weight, Tensor ends) -> Tensor"

TENSORS = {"x": "rows in_dim", "weight": "groups in_dim out_dim", "ends": "groups"}


def reference(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows ``ends[g - 1]`` to ``ends[g] - 1`` of ``x``, times ``weight[g]``.

    Args:
        x: [rows, in_dim], sorted by group.
        weight: [groups, in_dim, out_dim].
        ends: int32 or int64 [groups], where each group ends, ascending, at most ``rows``.

    Returns:
        [rows, out_dim] in x's dtype, contiguous; rows after the last group are 0.
    """
    row = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(ends.long(), row, right=True)
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for g in range(weight.shape[0]):
        out = out + torch.where((group == g).unsqueeze(-1), x @ weight[g], 0.0)
    return (out,)


def fake(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Shape and dtype of `reference`."""
    return (x.new_empty(x.shape[0], weight.shape[2]),)


def random_ends(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, arguments: Arguments
) -> torch.Tensor:
    """Groups of random sizes, some empty, that take in most rows."""
    rows = arguments["x"].shape[0]
    return torch.randint(rows + 1, shape, generator=generator).sort().values.to(dtype)


def samples(dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Full and empty groups, rows behind the last group, one row, none."""

    def call(rows: int, ends: list[int], index: torch.dtype = torch.int64) -> dict[str, Any]:
        def make(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return {"x": make(rows, 8), "weight": make(len(ends), 8, 5), "ends": torch.tensor(ends, dtype=index)}

    yield call(1, [1])
    yield call(12, [3, 3, 12], torch.int32)
    yield call(12, [0, 4, 9])
    yield call(0, [0, 0])


def work(dims: Dims, attributes: Arguments) -> tuple[float, float]:
    """One product for each row; rows, results and weights once."""
    rows, wide, narrow = (float(dims[name]) for name in ("rows", "in_dim", "out_dim"))
    return 2 * rows * wide * narrow, 4 * (rows * (wide + narrow) + float(dims["groups"]) * wide * narrow)


GROUPED_MATMUL = Op(
    name="grouped_matmul",
    summary="rows in groups, each group times its own matrix",
    schema=SCHEMA,
    tensors=TENSORS,
    differentiable=("x", "weight"),
    reference=reference,
    fake=fake,
    samples=samples,
    work=work,
    fill={"ends": random_ends},
    source="torch.nn.functional.grouped_mm, 2D by 3D",
)
