"""`selected_attention` and `grouped_matmul` on Ascend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .judge import SPECS, check, generator, samples, strided, takes
from .meaning import reading

SELECTED, GROUPED = SPECS["torch_npu.fusion_selected_attention"], SPECS["torch_npu.grouped_matmul"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_selected_attention_is_the_op_on_every_sample(dtype: torch.dtype) -> None:
    found = list(samples(SELECTED, dtype))
    assert len(found) >= 15
    with reading(dtypes=(torch.float64,)):
        for arguments in found:
            check(SELECTED, arguments)
            check(SELECTED, {n: strided(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()})


def grouped(
    rows: int, ends: list[int], dtype: torch.dtype = torch.bfloat16, seed: int = 0, **more: Any
) -> dict[str, Any]:
    g = generator(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {"x": make(rows, 8), "weight": make(len(ends), 8, 5), "ends": torch.tensor(ends)} | more


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_matmul_is_the_op_with_empty_groups_and_rows_behind_the_last(
    dtype: torch.dtype, index: torch.dtype
) -> None:
    for rows, ends in ((1, [1]), (12, [3, 3, 12]), (12, [0, 4, 9]), (7, [0, 0]), (9, [9, 9, 9])):
        arguments = grouped(rows, ends, dtype)
        arguments["ends"] = arguments["ends"].to(index)
        assert takes(GROUPED, arguments)
        check(GROUPED, arguments)


def test_weights_that_are_stored_transposed_are_taken_as_they_are_and_other_strides_too() -> None:
    arguments = grouped(12, [3, 3, 12])
    transposed = arguments["weight"].mT.contiguous().mT
    check(GROUPED, arguments | {"weight": transposed})
    check(GROUPED, {name: strided(x) for name, x in arguments.items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(1, 30), cuts=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_groups_give_the_references_result(rows: int, cuts: list[int], seed: int) -> None:
    check(GROUPED, grouped(rows, sorted(min(c, rows) for c in cuts), seed=seed))
