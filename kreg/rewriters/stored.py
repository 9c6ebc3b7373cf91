"""Tensors that are part of a model's code, read by their values: a triangle, a band, a run of places, one number."""

from __future__ import annotations

import torch

from kreg.rewriters import notation as n
from kreg.rewriters.notation import Expr


def stored(value: torch.Tensor, index: tuple[Expr, ...]) -> Expr | None:
    """The element of a stored tensor at an index, where its values follow a rule over the whole of it; else None."""
    if value.is_meta or value.is_complex() or value.numel() == 0:
        return None
    places = [d for d, extent in enumerate(value.shape) if extent > 1]
    plain = value.detach().cpu().reshape([value.shape[d] for d in places])
    where = [index[d] for d in places]
    if bool((plain == plain.flatten()[0]).all()):
        return n.Const(plain.flatten()[0].item())
    if len(places) == 1 and not plain.is_floating_point() and plain.dtype is not torch.bool:
        first = int(plain[0])
        run = torch.equal(plain.long(), torch.arange(first, first + len(plain)))
        return n.add(n.Const(first), where[0]) if run else None
    return _band(plain, where[0], where[1]) if len(places) == 2 else None


def _band(value: torch.Tensor, row: Expr, column: Expr) -> Expr | None:
    """One number within two diagonals, and another one outside them."""
    levels = value.unique()
    if len(levels) != 2:
        return None
    rows, columns = value.shape
    distance = torch.arange(columns) - torch.arange(rows).unsqueeze(1)
    for level, other in ((levels[1], levels[0]), (levels[0], levels[1])):
        inside = value == level
        first, last = int(distance[inside].min()), int(distance[inside].max())
        if not torch.equal(inside, (distance >= first) & (distance <= last)):
            continue
        keep = n.TRUE
        if last < columns - 1:
            keep = n.and_(keep, n.le0(n.sub(n.sub(column, row), n.Const(last))))
        if first > 1 - rows:
            keep = n.and_(keep, n.le0(n.add(n.sub(row, column), n.Const(first))))
        return n.where(keep, n.Const(level.item()), n.Const(other.item()))
    return None
