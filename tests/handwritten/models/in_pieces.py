"""Keys in several pieces: scores put together for one softmax, weights taken apart again for one product each."""

from __future__ import annotations

import torch
from torch import einsum, nn

from tests.handwritten.case import Case, fixed, hidden, kept, kept_or_none, memory

W = 16
CUT = 5


class Pieces(nn.Module):
    """Projections of tokens and of a memory, and a core that keeps the two apart."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.of_memory = (nn.Linear(W, W) for _ in range(4))

    def forward(self, x, m, *given):
        m = self.of_memory(m)
        return self.core(self.q(x), (self.k(m), self.k(x)), (self.v(m), self.v(x)), *given)

    def core(self, q, keys, values, *given):
        weights = self.scores(q, keys, *given).softmax(-1)
        return self.weighted(weights, values)

    def scores(self, q, keys):
        return torch.cat([q @ k.mT * W**-0.5 for k in keys], dim=-1)

    def weighted(self, weights, values):
        at = values[0].shape[1]
        return weights[..., :at] @ values[0] + weights[..., at:] @ values[1]


class LastFirst(Pieces):
    def weighted(self, weights, values):
        at = values[1].shape[1]
        return weights[..., -at:] @ values[1] + weights[..., :-at] @ values[0]


class Split(Pieces):
    """Split by sizes, and multiplied by einsum."""

    def weighted(self, weights, values):
        parts = weights.split([v.shape[1] for v in values], dim=-1)
        return sum(einsum("b s t, b t d -> b s d", w, v) for w, v in zip(parts, values, strict=True))


class OneScore(Pieces):
    """The keys in one tensor, the values in two."""

    def scores(self, q, keys):
        return q @ torch.cat(keys, dim=1).mT * W**-0.5


class OneValue(Pieces):
    """The keys in two tensors, the values in one."""

    def weighted(self, weights, values):
        return weights @ torch.cat(values, dim=1)


class Capped(Pieces):
    def scores(self, q, keys):
        return torch.tanh(super().scores(q, keys) / 3.0) * 3.0


class Padded(Pieces):
    """A mask over all keys."""

    def scores(self, q, keys, keep):
        seen = torch.ones(*keys[0].shape[:2], dtype=torch.bool)
        return super().scores(q, keys).masked_fill(~torch.cat([seen, keep], 1)[:, None], torch.finfo(q.dtype).min)


class MemoryPadded(Pieces):
    """A mask in one piece alone."""

    def scores(self, q, keys, keep):
        m, x = (q @ k.mT * W**-0.5 for k in keys)
        return torch.cat([m.masked_fill(~keep[:, None], -torch.inf), x], dim=-1)


class BothPadded(Pieces):
    """A mask in each piece: one that fills and one that is added, with numbers of their own."""

    def scores(self, q, keys, of_memory, of_tokens):
        m, x = (q @ k.mT * W**-0.5 for k in keys)
        added = torch.where(of_tokens, 0.0, -1e9)[:, None]
        return torch.cat([m.masked_fill(~of_memory[:, None], -torch.inf), x + added], dim=-1)


class FilledAlike(Pieces):
    """The same large finite number in both pieces: a row without keys weighs all of both alike."""

    def scores(self, q, keys, *keeps):
        parts = zip(keys, keeps, strict=True)
        return torch.cat([(q @ k.mT * 0.3).masked_fill(~keep[:, None], -1e30) for k, keep in parts], dim=-1)


class CausalTokens(Pieces):
    """All of the memory, and of the tokens those so far."""

    def scores(self, q, keys):
        m, x = (q @ k.mT * W**-0.5 for k in keys)
        later = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        return torch.cat([m, x.masked_fill(later, -torch.inf)], dim=-1)


class Preferred(Pieces):
    """A number for each query on the memory's scores alone: no shift of all scores."""

    def __init__(self) -> None:
        super().__init__()
        self.preference = nn.Linear(W, 1)

    def scores(self, q, keys):
        m, x = (q @ k.mT * W**-0.5 for k in keys)
        return torch.cat([m + self.preference(q), x], dim=-1)


class Favoured(Pieces):
    """A number on the memory's scores alone."""

    def scores(self, q, keys):
        m, x = (q @ k.mT * W**-0.5 for k in keys)
        return torch.cat([m + 2.0, x], dim=-1)


class FavouredMore(Preferred):
    """A number, and a bias."""

    def scores(self, q, keys):
        m, x = (q @ k.mT * W**-0.5 for k in keys)
        return torch.cat([m + self.preference(q) + 2.0, x - 1.0], dim=-1)


class WithSink(Pieces):
    """A logit without a value behind both pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(()))

    def scores(self, q, keys):
        return torch.cat([super().scores(q, keys), self.sink.expand(*q.shape[:2], 1)], dim=-1)

    def weighted(self, weights, values):
        return super().weighted(weights[..., :-1], values)


class Local(nn.Module):
    """Blocks of the sequence, each with a few tokens that all of them see."""

    def __init__(self, dim=24, heads=3, block=4, shared=2):
        super().__init__()
        self.heads, self.block, self.to_qkv = heads, block, nn.Linear(dim, dim * 3, bias=False)
        self.shared = nn.Parameter(torch.randn(2, shared, heads, dim // heads))

    def forward(self, x):
        q, k, v = (
            t.unflatten(1, (-1, self.block)).unflatten(-1, (self.heads, -1)) for t in self.to_qkv(x).chunk(3, dim=-1)
        )
        of_all, own = self.shared, (k, v)
        sim = torch.cat([einsum("bnshd,ghd->bhnsg", q, of_all[0]), einsum("bnshd,bnthd->bhnst", q, own[0])], dim=-1)
        attn, g = (sim * 8**-0.5).softmax(dim=-1), of_all.shape[1]
        out = einsum("bhnsg,ghd->bnshd", attn[..., :g], of_all[1])
        return (out + einsum("bhnst,bnthd->bnshd", attn[..., g:], own[1])).flatten(3).flatten(1, 2)


class Sliced(nn.Module):
    """Plain attention up to the weights, of which slices are multiplied."""

    def __init__(self, weighted) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(W, W) for _ in range(3))
        self.weighted = weighted

    def forward(self, x):
        return self.weighted((self.q(x) @ self.k(x).mT * W**-0.5).softmax(-1), self.v(x))


def halves(w, v):
    return w[..., :CUT] @ v[:, :CUT] + w[..., CUT:] @ v[:, CUT:]


def thirds(w, v):
    return w[..., 9:] @ v[:, 9:] + w[..., :1] @ v[:, :1] + w[..., 1:9] @ v[:, 1:9]


def swapped(w, v):
    """Values of other keys: the order of the values is what the products say, not what their names say."""
    return w[..., :6] @ v[:, 6:] + w[..., 6:] @ v[:, :6]


def doubled(w, v):
    return 2.0 * (w[..., :CUT] @ v[:, :CUT]) + 2.0 * (w[..., CUT:] @ v[:, CUT:])


def overlapping(w, v):
    return w[..., :7] @ v[:, :7] + w[..., CUT:] @ v[:, CUT:]


def gap(w, v):
    return w[..., :CUT] @ v[:, :CUT] + w[..., CUT + 1 :] @ v[:, CUT + 1 :]


def unfinished(w, v):
    return w[..., :CUT] @ v[:, :CUT] + w[..., CUT:-2] @ v[:, CUT:-2]


def twice(w, v):
    return w[..., :CUT] @ v[:, :CUT] + w[..., :CUT] @ v[:, -CUT:] + w[..., CUT:] @ v[:, CUT:]


def unequal(w, v):
    return w[..., :CUT] @ v[:, :CUT] + 0.5 * (w[..., CUT:] @ v[:, CUT:])


def other_queries(w, v):
    return w[..., :CUT].flip(1) @ v[:, :CUT] + w[..., CUT:] @ v[:, CUT:]


def returned(w, v):
    return halves(w, v), w


def part_returned(w, v):
    return halves(w, v), w[..., CUT:]


def with_residual(w, v):
    return w[..., :CUT] @ v[:, :CUT] + v + w[..., CUT:] @ v[:, CUT:]


def beside(w, v):
    """Two results."""
    return w[..., :CUT] @ v[:, :CUT], w[..., CUT:] @ v[:, CUT:]


class OtherQueries(Pieces):
    """Each piece of the keys meets queries of its own."""

    def scores(self, q, keys):
        return torch.cat([q @ keys[0].mT * W**-0.5, self.v(q) @ keys[1].mT * W**-0.5], dim=-1)


class OtherScales(Pieces):
    def scores(self, q, keys):
        return torch.cat([q @ keys[0].mT * 0.25, q @ keys[1].mT * 0.5], dim=-1)


class OneCapped(Pieces):
    def scores(self, q, keys):
        return torch.cat([torch.tanh(q @ keys[0].mT), q @ keys[1].mT], dim=-1)


class FilledUnlike(Pieces):
    """Two numbers: a row without keys is a softmax of what is left, which no argument says."""

    def scores(self, q, keys, *keeps):
        parts = zip(keys, keeps, (-1e9, -1e30), strict=True)
        return torch.cat([(q @ k.mT * 0.3).masked_fill(~keep[:, None], x) for k, keep, x in parts], dim=-1)


def sliced(name, weighted, **options) -> Case:
    return Case(name, lambda: Sliced(weighted), (hidden(W),), **({"resized": None} | options))


def left(name, weighted, reason) -> Case:
    return sliced(name, weighted, sites=0, reason=reason)


X, XM = (hidden(W),), (hidden(W), memory(W))
SLICES = "used more than once, and not in slices"
CASES = (
    Case("two and two", Pieces, XM),
    Case("the last first", LastFirst, XM),
    Case("split", Split, XM),
    Case("one of scores", OneScore, XM),
    Case("one of values", OneValue, XM),
    Case("capped", Capped, XM, attributes={"softcap": 3.0}),
    Case("all padded", Padded, (*XM, kept_or_none()), mask="soft padding"),
    Case("memory padded", MemoryPadded, (*XM, kept_or_none("memory")), mask="input"),
    Case("each padded", BothPadded, (*XM, kept("memory"), kept()), mask="input"),
    Case("each filled alike", FilledAlike, (*XM, kept_or_none("memory"), kept_or_none()), mask="input"),
    Case("tokens causal", CausalTokens, XM, mask="prefix"),
    Case("memory preferred", Preferred, XM, mask="bias"),
    Case("sink", WithSink, XM),
    Case("blocks", Local, (hidden(24),), **fixed()),
    sliced("halves", halves),
    sliced("thirds", thirds),
    sliced("swapped values", swapped),
    sliced("doubled", doubled),
    left("overlapping", overlapping, SLICES),
    left("a gap", gap, SLICES),
    left("unfinished", unfinished, "logits that have no value"),
    left("one slice twice", twice, SLICES),
    left("unequal", unequal, "each in its own way"),
    left("slices of other queries", other_queries, "not of the same queries"),
    left("returned", returned, "used more than once"),
    left("part returned", part_returned, "used more than once"),
    left("with a residual", with_residual, ""),
    left("beside each other", beside, "used more than once"),
    Case("queries by piece", OtherQueries, XM, sites=0, reason="not multiplied by the same queries"),
    Case("a number on one piece", Favoured, XM, sites=0, reason=""),
    Case("a number and a bias on one piece", FavouredMore, XM, sites=0, reason=""),
    Case("scales by piece", OtherScales, XM, sites=0, reason="scaled each in its own way"),
    Case("one capped", OneCapped, XM, sites=0, reason="scaled each in its own way"),
    Case("each filled unlike", FilledUnlike, (*XM, kept_or_none("memory"), kept_or_none()), sites=0, reason=""),
)
