"""How operands lie in memory and in code: tables, one row a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def expand(x: Tensor, ratio: int, heads: int) -> Tensor:
    """Each head ``ratio`` times, without a copy until the reshape."""
    new = x.unsqueeze(heads + 1).expand(*x.shape[: heads + 1], ratio, *x.shape[heads + 1 :])
    return new.reshape(*x.shape[:heads], x.shape[heads] * ratio, *x.shape[heads + 1 :])


def gathered(x: Tensor, ratio: int, heads: int) -> Tensor:
    """Each head ``ratio`` times, by index."""
    places = torch.arange(x.shape[heads] * ratio) // ratio
    return x[:, places] if heads == 1 else x[:, :, places]


def tiled(x: Tensor, ratio: int, heads: int) -> Tensor:
    """All heads ``ratio`` times: query head h reads key head ``h % groups``."""
    return x.repeat(1, ratio, 1, 1) if heads == 1 else x.repeat(1, 1, ratio, 1)


SPREADS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "expand": expand,
    "repeat_interleave": lambda x, ratio, heads: x.repeat_interleave(ratio, dim=heads),
    "gathered": gathered,
    "tiled": tiled,
    "broadcast": lambda x, ratio, heads: x,
}


@dataclass(frozen=True)
class Layout:
    """One way to lay out operands.

    Attributes:
        heads: the dimension of heads in four-dimensional operands, before they are flattened.
        letters: of an operand's dimensions when multiplied; q and k are its rows, d its channels, t its keys.
        scores: letters of the scores.
        flatten: from four dimensions, and the number of key heads, to the letters.
        merge: from a result of those letters, with batch and heads, to [batch, queries, heads * dim].
        axes: where an operand of those letters has its heads (None: no dimension of its own) and its rows.
    """

    heads: int
    letters: str
    scores: str
    flatten: Callable[[Tensor, int], Tensor]
    merge: Callable[[Tensor, int, int], Tensor]
    axes: tuple[int | None, int]


def _by_rows(out: Tensor, batch: int, heads: int) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def _unflattened(out: Tensor, batch: int, heads: int) -> Tensor:
    return out.view(-1, heads, *out.shape[1:]).transpose(1, 2).flatten(2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


LAYOUTS: dict[str, Layout] = {
    "bhsd": Layout(1, "bhsd", "bhst", lambda x, g: x, _by_rows, (1, 2)),
    "bshd": Layout(2, "bshd", "bhst", lambda x, g: x, lambda out, b, h: out.flatten(2), (2, 1)),
    "bmm": Layout(1, "nsd", "nst", lambda x, g: x.reshape(-1, *x.shape[2:]), _unflattened, (None, 1)),
    "nsd": Layout(1, "nsd", "nst", lambda x, g: x[:, 0], lambda out, b, h: out, (None, 1)),
    "sd": Layout(1, "sd", "st", lambda x, g: x[0, 0], lambda out, b, h: out, (None, 0)),
    "bgrsd": Layout(1, "bgrsd", "bgrst", _grouped, lambda out, b, h: _by_rows(out.flatten(1, 2), b, h), (1, 3)),
}


def per_batch(layout: Layout, condition: Tensor, heads: int) -> Tensor:
    """A [batch or 1, queries or 1, keys] tensor in the place it has in the scores."""
    match layout.scores:
        case "bhst":
            return condition[:, None]
        case "bgrst":
            return condition[:, None, None]
        case "st":
            return condition[0]
    if heads == 1 or condition.shape[0] == 1:
        return condition
    return condition[:, None].expand(-1, heads, -1, -1).reshape(-1, *condition.shape[1:])


def per_head(layout: Layout, bias: Tensor, batch: int, groups: int) -> Tensor:
    """A [heads, queries, keys] tensor in the place it has in the scores."""
    match layout.scores:
        case "bhst":
            return bias
        case "bgrst":
            return bias.view(groups, -1, *bias.shape[1:])
        case "st":
            return bias[0]
    return bias if bias.shape[0] == 1 else bias.repeat(batch, 1, 1)


def scores_of(layout: Layout, q: Tensor, k: Tensor, written: str) -> Tensor:
    """``q k^T`` in letters of the scores."""
    if written == "einsum":
        return torch.einsum(f"{layout.letters},{layout.letters.replace('s', 't')}->{layout.scores}", q, k)
    if layout.letters == "bshd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if written == "bmm":
        return torch.bmm(q, k.transpose(1, 2))
    if written == "reversed":
        return (k @ q.mT).mT
    return q @ k.transpose(-2, -1)


def values_of(layout: Layout, weights: Tensor, v: Tensor, written: str) -> Tensor:
    """``weights v`` in the operands' letters."""
    if written == "einsum":
        return torch.einsum(f"{layout.scores},{layout.letters.replace('s', 't')}->{layout.letters}", weights, v)
    rows = v.transpose(1, 2) if layout.letters == "bshd" else v
    if written == "bmm":
        return torch.bmm(weights, rows)
    out = (rows.mT @ weights.mT).mT if written == "reversed" else weights @ rows
    return out.transpose(1, 2) if layout.letters == "bshd" else out
