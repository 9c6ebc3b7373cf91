"""`npu_grouped_matmul` for one tensor each of x, weight and result, and `npu_grouped_matmul_add`."""

from __future__ import annotations

from typing import Any

import torch

from . import demand

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def product(x: list[torch.Tensor], weight: list[torch.Tensor], **more: Any) -> list[torch.Tensor]:
    """``y_i = x_i weight_i`` for groups of rows, given by where they end; the last ends with the rows."""
    groups = more.pop("group_list")
    given = {name: value for name, value in more.items() if value is not None and (value != 0 or name == "group_type")}
    demand(given == {"split_item": 3, "group_type": 0}, f"{given} is not read here")
    (rows,), (matrices,) = x, weight
    demand(rows.dim() == 2 and matrices.dim() == 3, "x is [m, k] and weight [g, k, n]")
    demand(rows.dtype == matrices.dtype and rows.dtype in DTYPES, f"x is {rows.dtype} and weight {matrices.dtype}")
    demand(rows.is_contiguous(), "x may not be transposed")
    demand(matrices.is_contiguous() or matrices.mT.is_contiguous(), "weight is as it is, or transposed as a whole")
    demand(groups.dtype == torch.int64 and groups.shape == matrices.shape[:1], "group_list is int64 [g]")
    demand(1 <= len(groups) <= 1024, "there are 1 to 1024 groups")
    ends = groups.tolist()
    demand(ends == sorted(ends) and ends[0] >= 0 and ends[-1] == len(rows), f"{ends} do not end with {len(rows)} rows")
    demand(max(rows.shape[1], *matrices.shape[1:]) < 65536, "last dimensions are below 65536")
    result, start = torch.full((len(rows), matrices.shape[2]), float("nan")), 0
    for g, end in enumerate(ends):
        result[start:end] = rows[start:end].float() @ matrices[g].float()
        start = end
    return [result.to(rows.dtype)]


def added(
    start: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> torch.Tensor:
    """``self_g + x_g^T weight_g`` in float32; rows behind the last group take no part."""
    demand(transpose_x and not transpose_weight and group_type == 2 and group_list_type == 0, "the one documented form")
    demand(start.dtype == torch.float32, "what is added to is float32")
    demand(x.dtype == weight.dtype and x.dtype in DTYPES[:2], f"x is {x.dtype} and weight {weight.dtype}")
    demand(group_list.dtype == torch.int64 and start.shape == (len(group_list), x.shape[1], weight.shape[1]), "shapes")
    ends = group_list.tolist()
    demand(ends == sorted(ends) and ends[0] >= 0 and ends[-1] <= len(x), f"{ends} for {len(x)} rows")
    result, first = start.clone(), 0
    for g, end in enumerate(ends):
        result[g] += x[first:end].float().mT @ weight[first:end].float()
        first = end
    return result


OPERATORS = {"npu_grouped_matmul": product, "npu_grouped_matmul_add": added}
