"""`grouped_matmul` on the CPU: one matrix product a group, written in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def forward(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[rows, in_dim] by [groups, in_dim, out_dim] to [rows, out_dim]; see the op's reference."""
    out = x.new_zeros(x.shape[0], weight.shape[2])
    for group, rows in _groups(ends):
        torch.mm(x[rows], weight[group], out=out[rows])
    return out


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """``dx = dout @ weight^T`` and ``dweight = x^T @ dout``, group by group."""
    (grad,) = grads
    assert grad is not None
    found: dict[str, torch.Tensor] = {}
    if "x" in needs:
        found["x"] = x.new_zeros(x.shape)
        for group, rows in _groups(ends):
            torch.mm(grad[rows], weight[group].t(), out=found["x"][rows])
    if "weight" in needs:
        found["weight"] = weight.new_zeros(weight.shape)
        for group, rows in _groups(ends):
            torch.mm(x[rows].t(), grad[rows], out=found["weight"][group])
    return found


def _groups(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, slice(start, end)
            start = end
