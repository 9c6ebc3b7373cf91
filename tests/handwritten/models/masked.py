"""Masks where people build them: from lengths, documents, prefixes, blocks, caches, and in layers that alternate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import (
    Case,
    Maker,
    Sizes,
    documents,
    fixed,
    hidden,
    kept,
    kept_or_none,
    lengths,
    ones_and_zeros,
    tokens,
)

W, H = 16, 2
MIN = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Self attention whose mask a subclass gives, as something to add or as what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.out = nn.Linear(W, 2 * W), nn.Linear(W, W), nn.Linear(W, W)

    def scores(self, x):
        b, n, _ = x.shape
        q, k = (t.view(b, n, H, W // H).transpose(1, 2) for t in self.qk(x).chunk(2, dim=-1))
        return q @ k.transpose(2, 3) * (W // H) ** -0.5

    def finish(self, scores, x):
        values = self.v(x).unflatten(-1, (H, W // H)).transpose(1, 2)
        return self.out((torch.softmax(scores, dim=-1) @ values).transpose(1, 2).flatten(2))


class FromLengths(Masked):
    """Lengths compared with positions, twice: keys by the mask, queries by zeros on the result."""

    def forward(self, x, lengths):
        inside = torch.arange(x.size(1), device=x.device)[None, :] < lengths[:, None]
        scores = self.scores(x).masked_fill(~inside[:, None, None, :], float("-inf"))
        return self.finish(scores, x) * inside.unsqueeze(-1)


class BooleansAdded(Masked):
    """What is kept, added to the scores as it is: one more for those keys, and no mask."""

    def forward(self, x, keep):
        return self.finish(self.scores(x) + keep[:, None, None], x)


class Floored(Masked):
    """A mask that the caller adds up, with a floor under its sum with the scores: hidden keys are all alike."""

    def forward(self, x, hidden):
        added = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None]
        return self.finish(torch.maximum(self.scores(x) + self.noted(added), torch.tensor(MIN)), x)

    def noted(self, added):
        return added


class FlooredUnknown(Floored):
    """The same mask, out of sight."""

    def noted(self, added):
        return added.cumsum(-2)


class FlooredAlone(Masked):
    """The floor is under the scores, and the mask is filled in above it."""

    def forward(self, x, lengths):
        inside = torch.arange(x.size(1)) < lengths[:, None]
        scores = torch.maximum(torch.tensor(MIN), self.scores(x)).clamp(max=1e5)
        return self.finish(scores.masked_fill(~inside[:, None, None, :], float("-inf")), x)


class FromLengthsCausal(Masked):
    """One mask of two conditions."""

    def forward(self, x, lengths):
        at = torch.arange(x.size(1))
        keep = (at[None, :] <= at[:, None])[None] & (at[None, None, :] < lengths[:, None, None])
        return self.finish(torch.where(keep[:, None], self.scores(x), torch.tensor(float("-inf"))), x)


class TwoAdditiveMasks(Masked):
    """Causal and padding each made a large number, their sum added: both may hide a key."""

    def forward(self, x, attention_mask):
        n = x.shape[1]
        causal = torch.full((n, n), MIN).triu(1)[None, None]
        padded = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * MIN
        return self.finish(self.scores(x) + torch.clamp(causal + padded, min=MIN), x)


class FilledTwice(Masked):
    """Two masks, two fills."""

    def forward(self, x, keep):
        future = torch.triu(torch.ones(x.shape[1], x.shape[1]), 1) == 1
        scores = self.scores(x).masked_fill(future, -torch.inf)
        return self.finish(scores.masked_fill(~keep[:, None, None, :], -torch.inf), x)


class Packed(Masked):
    """Several documents in a row: a token sees those before it in its own."""

    def forward(self, x, document):
        same = document[:, :, None] == document[:, None, :]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.finish(self.scores(x).masked_fill(~(same & causal)[:, None], float("-inf")), x)


class PackedByBoundaries(Masked):
    """The documents are counted from where positions start anew, in the model itself."""

    def forward(self, x, starts):
        document = starts.diff(dim=-1, prepend=starts[:, :1]).ne(0).long().cumsum(-1)
        at = torch.arange(x.shape[1])
        keep = (document.unsqueeze(2) == document.unsqueeze(1)) & (at >= at.unsqueeze(1) - 5) & (at <= at.unsqueeze(1))
        return self.finish(self.scores(x) + torch.zeros(1).masked_fill(~keep[:, None], MIN), x)


class PrefixOfTheModel(Masked):
    """A number of first tokens that all may see."""

    def __init__(self, prefix: int = 4) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x):
        at = torch.arange(x.shape[1])
        keep = (at[None] <= at[:, None]) | (at[None] < self.prefix)
        return self.finish(self.scores(x).masked_fill(~keep, float("-inf")), x)


class PrefixByAssignment(PrefixOfTheModel):
    """A triangle into which a block of ones is written."""

    def forward(self, x):
        keep = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        keep[:, : self.prefix] = 1
        return self.finish(self.scores(x) + (1.0 - keep) * -1e9, x)


class PrefixOfTheInput(Masked):
    """Each row has a prefix of its own."""

    def forward(self, x, prefix):
        at = torch.arange(x.shape[1])
        keep = (at[None, None] <= at[None, :, None]) | (at[None, None] < prefix[:, None, None])
        return self.finish(self.scores(x).masked_fill(~keep[:, None], float("-inf")), x)


class KeptOnTheModule(Masked):
    """Built at the first call and kept for the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, torch.Tensor] = {}

    def forward(self, x):
        n = x.shape[1]
        if n not in self.kept:
            self.kept[n] = torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)
        return self.finish(self.scores(x).masked_fill(self.kept[n], float("-inf")), x)


class Alternating(nn.Module):
    """Three layers: a window, chunks, everything before; masks made once for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Masked() for _ in range(3))

    def forward(self, x):
        i, j = torch.arange(x.shape[1]).unsqueeze(-1), torch.arange(x.shape[1])
        causal = j <= i
        masks = (causal & (i - j < 4), causal & (i // 5 == j // 5), causal)
        for layer, mask in zip(self.layers, masks, strict=True):
            bias = torch.zeros(mask.shape).masked_fill(~mask, MIN)
            x = x + layer.finish(layer.scores(x) + bias, x)
        return x


class NestedLists(Masked):
    """A mask made of Python lists, which has values and no formula."""

    def forward(self, x):
        n = x.shape[1]
        keep = torch.tensor([[j <= i and (i - j) % 3 != 1 for j in range(n)] for i in range(n)])
        return self.finish(self.scores(x).masked_fill(keep.logical_not(), -1e9), x)


class BlocksOfQueries(Masked):
    """A sliding window by blocks: each block of queries sees its own block and the one before, unfolded."""

    def __init__(self, block: int = 4) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        (b, n, _), w = x.shape, self.block
        q, k, v = (t.view(b, n // w, w, W) for t in (*self.qk(x).chunk(2, -1), self.v(x)))
        before = F.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1], F.pad(v, (0, 0, 0, 0, 1, 0))[:, :-1]
        keys, values = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        scores = torch.einsum("bnid,bnjd->bnij", q, keys) * W**-0.5
        i, j = torch.arange(w)[:, None] + w, torch.arange(2 * w)[None]
        keep = (j <= i) & (j > i - w)
        exists = (torch.arange(n // w)[:, None, None] > 0) | (j >= w)
        scores = scores.masked_fill(~(keep & exists), float("-inf"))
        return self.out(torch.einsum("bnij,bnjd->bnid", scores.softmax(-1), values).reshape(b, n, W))


class Streaming(Masked):
    """Chunks that see themselves whole and two chunks back, both ways inside a chunk; padding besides."""

    def forward(self, x, keep):
        chunk = torch.arange(x.shape[1]) // 3
        near = (chunk[None] <= chunk[:, None]) & (chunk[None] >= chunk[:, None] - 2)
        return self.finish(self.scores(x) + torch.where(near[None, None] & keep[:, None, None], 0.0, -1e9), x)


class Images(Masked):
    """Causal, but tokens of one image see each other: told by token types of the input."""

    def forward(self, x, kind):
        image = kind > 0
        group = torch.cumsum((image & ~F.pad(image, (1, 0))[:, :-1]).int(), dim=1) - 1
        group = torch.where(image, group, -1)
        same = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] >= 0)
        n = x.shape[1]
        keep = torch.ones(n, n, dtype=torch.bool).tril() | same
        return self.finish(self.scores(x).masked_fill(~keep[:, None], torch.finfo(x.dtype).min), x)


class EmptyRows(Masked):
    """A strictly lower triangle: the first query has no key at all, and its result is no number."""

    def forward(self, x):
        n = x.shape[1]
        return self.finish(self.scores(x).masked_fill(torch.triu(torch.ones(n, n)).bool(), float("-inf")), x)[:, 1:]


class AfterTheSoftmax(Masked):
    """The mask multiplied onto the weights: not a mask on the scores."""

    def forward(self, x):
        weights = torch.softmax(self.scores(x), dim=-1) * torch.ones(x.shape[1], x.shape[1]).tril()
        values = self.v(x).unflatten(-1, (H, W // H)).transpose(1, 2)
        return self.out((weights @ values).transpose(1, 2).flatten(2))


class TooSmallAFill(Masked):
    """Hidden keys still have a weight one can see."""

    def forward(self, x):
        return self.finish(self.scores(x).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -3.0), x)


def prefixes() -> Maker:
    return lambda s, g: torch.randint(1, s.length, (s.batch,), generator=g)


def hidden_rows() -> Maker:
    """[batch, length], True where a key is hidden: all of them in the first row."""
    return lambda s, g: ~kept_or_none()(s, g)


def kinds() -> Maker:
    return lambda s, g: torch.randint(0, 2, (s.batch, s.length), generator=g)


X = (hidden(W),)
BLOCKS = {"sizes": Sizes(2, 12), "resized": Sizes(3, 12)}


class ProductOfConditions(nn.Module):
    """Padded both ways: the mask is a product of booleans."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(W, 3 * W)

    def forward(self, x, kept):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, kept[:, None, :, None] * kept[:, None, None, :])


class Excluded(nn.Module):
    """Three conditions, each of what is not kept: drawn by themselves they would leave next to nothing."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(W, 3 * W)

    def forward(self, x, at):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores, lowest = q @ k.mT, -torch.finfo(x.dtype).max
        for excluded in (at[:, None] == -1, at[:, None] > at[:, :, None] + 3, at[:, :, None] > at[:, None] + 3):
            scores = scores.masked_fill(excluded[:, None], lowest)
        return scores.softmax(-1) @ v


CASES = (
    Case("a product of conditions", ProductOfConditions, (hidden(W), kept()), mask="padding+input"),
    Case("three exclusions", Excluded, (hidden(W), tokens()), mask="padding+input"),
    Case("lengths", FromLengths, (hidden(W), lengths()), mask="padding"),
    Case("lengths, causal", FromLengthsCausal, (hidden(W), lengths()), mask="causal+padding"),
    Case("floored", Floored, (hidden(W), hidden_rows()), sites=0, reason="may have no keys"),
    Case("floored out of sight", FlooredUnknown, (hidden(W), hidden_rows()), sites=0, reason="may have no keys"),
    Case("floored below the mask", FlooredAlone, (hidden(W), lengths()), mask="padding"),
    Case("booleans added", BooleansAdded, (hidden(W), kept()), mask="bias"),
    Case("two additive masks", TwoAdditiveMasks, (hidden(W), ones_and_zeros()), mask="soft causal+padding"),
    Case("filled twice", FilledTwice, (hidden(W), kept()), mask="causal+padding"),
    Case("packed", Packed, (hidden(W), documents()), mask="causal+documents"),
    Case("packed by boundaries", PackedByBoundaries, (hidden(W), documents()), mask="soft sliding+documents"),
    Case("prefix", PrefixOfTheModel, X, mask="prefix"),
    Case("prefix by assignment", PrefixByAssignment, X, mask="prefix"),
    Case("prefix of each row", PrefixOfTheInput, (hidden(W), prefixes()), mask="input"),
    Case("kept on the module", KeptOnTheModule, X, mask="causal", **fixed()),
    Case("alternating", Alternating, X, sites=3, mask=("sliding", "chunked", "causal")),
    Case("nested lists", NestedLists, X, mask="stored", **fixed()),
    Case("blocks of queries", BlocksOfQueries, X, mask="sliding in blocks", either=True, **BLOCKS),
    Case("streaming", Streaming, (hidden(W), kept_or_none()), mask="input"),
    Case("images", Images, (hidden(W), kinds()), mask="input"),
    Case("empty rows", EmptyRows, X, mask="causal", either=True),
    Case("after the softmax", AfterTheSoftmax, X, sites=0, reason="product"),
    Case("too small a fill", TooSmallAFill, X, mask="causal bias", either=True),
)
