"""Masks: which keys each kind keeps, the ways to write one down, and the forms in which it meets the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.handwritten.case import Maker, Sizes, documents, kept

INF = float("inf")
MIN = torch.finfo(torch.float32).min
WINDOW, CHUNK, PREFIX, RATIO, PICKS = 4, 5, 3, 3, 4

Keep = Callable[..., Tensor]
"""(query positions [n, 1], key positions [m], data) -> bool, broadcastable to [batch, 1, n, m]."""


@dataclass(frozen=True)
class Kind:
    """What a mask keeps, and the truth about it.

    Attributes:
        keep: the condition.
        truth: what the report must call it, see `case.KINDS`.
        soft: what it must be called where it is large finite numbers; as ``truth`` if none.
        facts: what the report must say besides.
        data: inputs that it is computed from.
        memory: that ``Sizes.memory`` keys come before the queries' own.
    """

    keep: Keep
    truth: str
    soft: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    data: tuple[Maker, ...] = ()
    memory: bool = False


def picks() -> Maker:
    """[batch, length, k] of indices of keys, the query's own among them."""

    def make(s: Sizes, g: torch.Generator) -> Tensor:
        chosen = torch.rand(s.batch, s.length, s.length, generator=g).topk(PICKS).indices
        chosen[..., 0] = torch.arange(s.length)
        return chosen

    return make


def selected(j: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(*chosen.shape[:2], j.shape[0], dtype=torch.bool).scatter(-1, chosen, True)[:, None]


def of_keys(data: Tensor) -> Tensor:
    return data[:, None, None, :]


def same(document: Tensor) -> Tensor:
    return (document[:, :, None] == document[:, None, :])[:, None]


SLIDING = {"window": WINDOW}
KINDS: dict[str, Kind] = {
    "full": Kind(lambda i, j: (i >= 0) & (j >= 0), "full"),
    "causal": Kind(lambda i, j: j <= i, "causal"),
    "causal after a cache": Kind(lambda i, j: j <= i, "causal", memory=True),
    "sliding": Kind(lambda i, j: (j <= i) & (j > i - WINDOW), "sliding", facts=SLIDING),
    "sliding after a cache": Kind(lambda i, j: (j <= i) & (i - j < WINDOW), "sliding", facts=SLIDING, memory=True),
    "window both ways": Kind(lambda i, j: (i - j).abs() < WINDOW, "window"),
    "window of two sides": Kind(lambda i, j: (i - j <= 4) & (j - i <= 2), "window"),
    "window by sides": Kind(lambda i, j: ((j <= i) & (i - j <= 4)) | ((j > i) & (j - i <= 2)), "window"),
    "one side of a window not near": Kind(
        lambda i, j: ((j <= i) & (i - j >= 2)) | ((j > i) & (j - i <= 2)) | (i == j), "dilated"
    ),
    "dilated": Kind(lambda i, j: (j <= i) & ((i - j) % 3 == 0), "dilated"),
    "chunked": Kind(lambda i, j: (j <= i) & (i // CHUNK == j // CHUNK), "chunked"),
    "chunked both ways": Kind(lambda i, j: i // CHUNK == j // CHUNK, "blocks"),
    "prefix": Kind(lambda i, j: (j <= i) | (j < PREFIX), "prefix"),
    "prefix of queries too": Kind(lambda i, j: (j <= i) | ((j < PREFIX) & (i < PREFIX)), "prefix"),
    "prefix longer than its queries": Kind(lambda i, j: (j <= i) | ((j < PREFIX + 2) & (i < PREFIX)), "dilated"),
    "block-causal": Kind(lambda i, j: j // CHUNK <= i // CHUNK, "block-causal"),
    "entries begun": Kind(lambda i, j: j * RATIO <= i, "block-causal"),
    "sliding in chunks": Kind(lambda i, j: (j <= i) & (i - j < WINDOW) & (i // CHUNK == j // CHUNK), "sliding chunked"),
    "sliding with a prefix": Kind(lambda i, j: (j <= i) & ((i - j < WINDOW) | (j < PREFIX)), "sliding prefix"),
    "padding": Kind(lambda i, j, keep: of_keys(keep), "padding", "soft padding", data=(kept(),)),
    "packed": Kind(lambda i, j, d: same(d), "documents", data=(documents(),)),
    "selected": Kind(lambda i, j, p: selected(j, p), "selected", data=(picks(),)),
    "causal and padding": Kind(
        lambda i, j, keep: (j <= i) & of_keys(keep), "causal+padding", "soft causal+padding", data=(kept(),)
    ),
    "sliding and padding": Kind(
        lambda i, j, keep: (j <= i) & (i - j < WINDOW) & of_keys(keep) | (i == j),
        "input",
        data=(kept(),),
    ),
    "causal and packed": Kind(
        lambda i, j, d: (j <= i) & same(d), "causal+documents", "soft causal+documents", data=(documents(),)
    ),
    "sliding and packed": Kind(
        lambda i, j, d: (j <= i) & (i - j < WINDOW) & same(d),
        "sliding+documents",
        "soft sliding+documents",
        data=(documents(),),
    ),
    "causal and selected": Kind(
        lambda i, j, p: (j <= i) & selected(j, p), "causal+selected", "soft causal+selected", data=(picks(),)
    ),
    "causal, packed and padding": Kind(
        lambda i, j, d, keep: (j <= i) & same(d) & of_keys(keep) | (i == j), "input", data=(documents(), kept())
    ),
}

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, keep) -> attention under the mask, scaled by 0.3."""


def _then_softmax(masked: Callable[[Tensor, Tensor], Tensor]) -> Form:
    return lambda q, k, v, keep: masked(q @ k.mT * 0.3, keep).softmax(-1) @ v


def _fused(mask: Callable[[Tensor, Tensor], Tensor]) -> Form:
    return lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, mask(q, keep), scale=0.3)


HARD: dict[str, Form] = {
    "where -inf": _then_softmax(lambda s, keep: torch.where(keep, s, -INF)),
    "filled -inf": _then_softmax(lambda s, keep: s.masked_fill(~keep, -INF)),
    "added -inf": _then_softmax(lambda s, keep: s + torch.zeros(keep.shape).masked_fill(~keep, -INF)),
    "added logarithm": _then_softmax(lambda s, keep: s + keep.float().log()),
    "fused bool": _fused(lambda q, keep: keep),
    "fused -inf": _fused(lambda q, keep: torch.zeros(keep.shape, dtype=q.dtype).masked_fill(keep.logical_not(), -INF)),
}
SOFT: dict[str, Form] = {
    "where min": _then_softmax(lambda s, keep: torch.where(keep, s, MIN)),
    "filled -1e9": _then_softmax(lambda s, keep: s.masked_fill(keep == 0, -1e9)),
    "added min": _then_softmax(lambda s, keep: s + torch.where(keep, 0.0, MIN)),
    "added one minus": _then_softmax(lambda s, keep: s + (1.0 - keep.to(s.dtype)) * -1e4),
    "multiplied and added": _then_softmax(lambda s, keep: s * keep.float() - 1e9 * (1 - keep.float())),
    "fused min": _fused(lambda q, keep: (~keep).to(q.dtype) * MIN),
}
FORMS = HARD | SOFT


class Plain(nn.Module):
    """Attention of given queries, keys and values under one kind of mask in one form."""

    def __init__(self, kind: Kind, form: Form) -> None:
        super().__init__()
        self.kind, self.form = kind, form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *data: Tensor) -> Tensor:
        past, n = 0, q.shape[2]
        if self.kind.memory:
            past = k.shape[2]
            k, v = torch.cat([k, q], dim=2), torch.cat([v, q], dim=2)
        i, j = torch.arange(past, past + n)[:, None], torch.arange(past + n)
        return self.form(q, k, v, self.kind.keep(i, j, *data))


# ── one causal mask, as many ways to write it as there are people ───────────────────────────────────────


def _written_into(n: int) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[torch.triu_indices(n, n, 1).unbind()] = False
    return mask


def _by_meshgrid(n: int) -> Tensor:
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return row >= column


CAUSAL_KEPT: dict[str, Callable[[int], Tensor]] = {
    "tril of ones": lambda n: torch.ones(n, n).tril().bool(),
    "tril of booleans": lambda n: torch.tril(torch.ones((n, n), dtype=torch.bool)),
    "tril of bytes": lambda n: torch.tril(torch.ones(n, n, dtype=torch.uint8)) != 0,
    "not triu": lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1),
    "triu transposed": lambda n: torch.triu(torch.ones(n, n)).t() == 1,
    "one minus triu": lambda n: (1 - torch.ones(1, n, n).triu(diagonal=1)).to(torch.bool),
    "triu minus one": lambda n: (torch.triu(torch.ones(n, n)) - torch.eye(n)) < 0.5,
    "compared": lambda n: torch.arange(n)[None, :] <= torch.arange(n)[:, None],
    "compared strictly": lambda n: torch.arange(n) < torch.arange(n).view(-1, 1) + 1,
    "compared as floats": lambda n: torch.arange(n).float().unsqueeze(0) <= torch.arange(n).float().unsqueeze(1),
    "not compared": lambda n: torch.logical_not(torch.gt(torch.arange(n), torch.arange(n)[:, None])),
    "difference": lambda n: (torch.arange(n)[:, None] - torch.arange(n)[None]).ge(0),
    "difference clamped": lambda n: (torch.arange(n)[None] - torch.arange(n)[:, None]).clamp(min=0) == 0,
    "meshgrid": _by_meshgrid,
    "meshgrid crossed": lambda n: torch.le(*torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy")),
    "by other names": lambda n: torch.less_equal(torch.subtract(torch.arange(n), torch.arange(n)[:, None]), 0),
    "before or equal": lambda n: (torch.arange(n)[:, None] > torch.arange(n)) | torch.eye(n, dtype=torch.bool),
    "below infinity too": lambda n: (
        (torch.arange(n) <= torch.arange(n)[:, None]) & (torch.arange(n) < float("inf")) & (torch.arange(n) > -INF)
    ),
    "expanded": lambda n: torch.arange(n).expand(n, n) <= torch.arange(n).unsqueeze(-1).expand(n, n),
    "repeated": lambda n: torch.arange(n).repeat(n, 1).t() >= torch.arange(n).repeat(n, 1),
    "counted": lambda n: torch.ones(n, n).cumsum(0) >= torch.ones(n, n).cumsum(1),
}
CAUSAL_BY_VALUE: dict[str, Callable[[int], Tensor]] = {
    "by linspace": lambda n: torch.linspace(0, n - 1, n)[None] <= torch.linspace(0, n - 1, n)[:, None],
    "written into": _written_into,
}
"""Causal at any one size, and by no formula over whole numbers: passed on, or proven by their values."""
CAUSAL_ADDED: dict[str, Callable[[int], Tensor]] = {
    "triu of -inf": lambda n: torch.triu(torch.full((n, n), -INF), diagonal=1),
    "triu of min": lambda n: torch.full((n, n), MIN).triu_(1),
    "triu of -1e4": lambda n: torch.triu(torch.ones(n, n), 1) * -10000.0,
    "generated": lambda n: nn.Transformer.generate_square_subsequent_mask(n),
    "filled where": lambda n: (
        torch.zeros(n, n).masked_fill(torch.ones(n, n).tril() == 0, -INF).masked_fill(torch.ones(n, n).tril() == 1, 0.0)
    ),
    "empty, filled, cut": lambda n: torch.empty(n, n).fill_(-1e9).triu_(1),
    "written by comparison": lambda n: torch.full((n, n), MIN).masked_fill_(
        torch.arange(n) < (torch.arange(n) + 1).view(n, 1), 0
    ),
    "multiplied by comparison": lambda n: (
        torch.full((n, n), MIN).triu(1) * (torch.arange(n) > torch.arange(n)[:, None])
    ),
    "where": lambda n: torch.where(torch.ones(n, n).tril() > 0, torch.tensor(0.0), torch.tensor(-INF)),
}


class Written(nn.Module):
    """Attention under a mask that is made from the length alone."""

    def __init__(self, mask: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, mask = q @ k.mT * 0.3, self.mask(q.shape[2])
        scores = scores.masked_fill(~mask, -INF) if mask.dtype is torch.bool else scores + mask
        return scores.softmax(-1) @ v
