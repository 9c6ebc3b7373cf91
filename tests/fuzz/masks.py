"""Conditions on (batch, query, key), ways to fill the scores with them, and biases: tables, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.fuzz.forms import Mask

Inputs = Mapping[str, Tensor]


def _positions(queries: int, keys: int, offset: int) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None] + offset, torch.arange(keys)[None, :]


def _compared(queries: int, keys: int, offset: int) -> Tensor:
    i, j = _positions(queries, keys, offset)
    return j <= i


def _difference(queries: int, keys: int, offset: int) -> Tensor:
    i, j = _positions(queries, keys, offset)
    return ~(i - j < 0)


def _counted(queries: int, keys: int, offset: int) -> Tensor:
    i = torch.ones(queries, dtype=torch.int64).cumsum(0) - 1 + offset
    return i[:, None] >= torch.arange(keys)


CAUSAL: dict[str, Callable[[int, int, int], Tensor]] = {
    "tril": lambda queries, keys, offset: torch.ones(queries, keys, dtype=torch.bool).tril(offset),
    "triu": lambda queries, keys, offset: torch.triu(torch.ones(queries, keys), diagonal=offset + 1) == 0,
    "compared": _compared,
    "difference": _difference,
    "counted": _counted,
    "is_causal": lambda queries, keys, offset: torch.ones(queries, keys, dtype=torch.bool).tril(),
}
"""Ways to write ``key <= query + offset``, bool [queries, keys]; "is_causal" is an argument, and its meaning here."""

IN_CODE = tuple(name for name in CAUSAL if name != "is_causal")
"""Those that any attention can have."""


def _windowed(mask: Mask, queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys, mask.offset)
    return CAUSAL[mask.made](queries, keys, mask.offset) & (j > i - mask.width)


def _banded(mask: Mask, queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys, mask.offset)
    return (i - j).abs() < mask.width


def _chunked(mask: Mask, queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys, mask.offset)
    return CAUSAL[mask.made](queries, keys, mask.offset) & (i // mask.width == j // mask.width)


def _prefixed(mask: Mask, queries: int, keys: int) -> Tensor:
    return CAUSAL[mask.made](queries, keys, mask.offset) | (torch.arange(keys) < mask.width)


def _documents(inputs: Inputs, queries: int, keys: int) -> Tensor:
    documents = inputs["documents"]
    return documents[:, :queries, None] == documents[:, None, :keys]


CONDITIONS: dict[str, Callable[[Mask, Inputs, int, int], Tensor]] = {
    "causal": lambda mask, inputs, s, t: CAUSAL[mask.made](s, t, mask.offset)[None],
    "window": lambda mask, inputs, s, t: _windowed(mask, s, t)[None],
    "band": lambda mask, inputs, s, t: _banded(mask, s, t)[None],
    "chunked": lambda mask, inputs, s, t: _chunked(mask, s, t)[None],
    "prefix": lambda mask, inputs, s, t: _prefixed(mask, s, t)[None],
    "documents": lambda mask, inputs, s, t: _documents(inputs, s, t),
    "padding": lambda mask, inputs, s, t: inputs["padding"][:, None, :t],
    "numbers": lambda mask, inputs, s, t: (inputs["numbers"] != 0)[:, None, :t],
    "boolean": lambda mask, inputs, s, t: inputs["boolean"][:, :s, :t],
}
"""What is kept: bool [batch or 1, queries or 1, keys]."""

FROM_INPUTS = frozenset({"documents", "padding", "numbers", "boolean"})
"""Kinds of which nothing is known when the graph is captured."""


def number(value: str | float, dtype: torch.dtype) -> float:
    """A fill as a number."""
    if value == "min":
        return torch.finfo(dtype).min
    return float(value)


def _added(scores: Tensor, keep: Tensor, value: float) -> Tensor:
    return scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, value)


def _chosen(scores: Tensor, keep: Tensor, value: float) -> Tensor:
    return scores + torch.where(keep, torch.zeros((), dtype=scores.dtype), value)


def _multiplied(scores: Tensor, keep: Tensor, value: float) -> Tensor:
    return scores + (1.0 - keep.to(scores.dtype)) * value


def _in_place(scores: Tensor, keep: Tensor, value: float) -> Tensor:
    return scores.expand(torch.broadcast_shapes(scores.shape, keep.shape)).clone().masked_fill_(~keep, value)


FILLS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "masked_fill": lambda scores, keep, value: scores.masked_fill(~keep, value),
    "where": lambda scores, keep, value: torch.where(keep, scores, value),
    "added": _added,
    "chosen": _chosen,
    "multiplied": _multiplied,
    "in place": _in_place,
}
"""How masked scores become ``value``, or nearly. "multiplied" is for finite values: 0 * inf is not 0."""


def _slopes(heads: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([2.0 ** -(h + 1) for h in range(heads)], dtype=dtype)[:, None, None]


def alibi(heads: int, queries: int, keys: int, offset: int, dtype: torch.dtype) -> Tensor:
    """ALiBi by distance: [heads, queries, keys]."""
    i, j = _positions(queries, keys, offset)
    return _slopes(heads, dtype) * (j - i)


def alibi_of_keys(heads: int, queries: int, keys: int, offset: int, dtype: torch.dtype) -> Tensor:
    """ALiBi by key alone, the same up to a shift of each row: [heads, 1, keys]."""
    return _slopes(heads, dtype) * torch.arange(keys)


def relative(table: Tensor, queries: int, keys: int) -> Tensor:
    """A table of biases by distance [distances, heads], looked up: [heads, queries, keys]."""
    i, j = _positions(queries, keys, 0)
    distance = (j - i).clamp(-4, 4) + 4
    return table[distance].permute(2, 0, 1)


BIASES = ("", "alibi", "alibi of keys", "relative", "input")
