"""``grouped_matmul`` by torch_npu's ``npu_grouped_matmul``; the weights' gradient by ``npu_grouped_matmul_add``."""

from __future__ import annotations

from typing import Any

import torch

from kreg.kernels.attention.npu_fusion import operators

ROWS = {"split_item": 3, "group_type": 0, "group_list_type": 0}
"""One tensor of results; the rows are what is grouped; groups are given by where they end."""


def forward(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[rows, in_dim] by [groups, in_dim, out_dim] to [rows, out_dim]; see the op's reference."""
    return by_row(x, weight, ends).masked_fill_(behind(x, ends), 0.0)


def by_row(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The products of all rows. The last group has to end with them: rows behind it are taken for its own."""
    last = torch.full_like(ends[:1], x.shape[0], dtype=torch.int64)
    every = torch.cat([ends[:-1].long(), last])
    found: torch.Tensor = operators().npu_grouped_matmul([x.contiguous()], [dense(weight)], group_list=every, **ROWS)[0]
    return found


def behind(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Which rows are behind the last group: bool [rows, 1]."""
    return (torch.arange(x.shape[0], device=x.device) >= ends[-1]).unsqueeze(1)


def dense(weight: torch.Tensor) -> torch.Tensor:
    """Weights that are contiguous, or whose matrices are transposed and then contiguous."""
    return weight if weight.mT.is_contiguous() else weight.contiguous()


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """``dx = dout @ weight^T`` and ``dweight = x^T @ dout`` by group, the latter added to zeros in float32."""
    (grad,) = grads
    assert grad is not None
    found: dict[str, torch.Tensor] = {}
    if "x" in needs:
        found["x"] = by_row(grad, weight.mT, ends).masked_fill_(behind(x, ends), 0.0)
    if "weight" in needs:
        start = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = operators().npu_grouped_matmul_add(
            start, x.contiguous(), grad.contiguous(), ends.long(), transpose_x=True, group_type=2, group_list_type=0
        )
        found["weight"] = total.to(weight.dtype)
    return found
