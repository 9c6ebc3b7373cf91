"""Relative positions: buckets, shifts by padding, gathered tables, products with position embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import Case, Sizes, hidden, ones_and_zeros

W, H, D = 16, 2, 8


def split(x, projection):
    return projection(x).unflatten(-1, (H, D)).transpose(1, 2)


def folded(x, projection):
    """Batch and heads in one dimension."""
    return split(x, projection).reshape(-1, x.shape[1], D)


class Buckets(nn.Module):
    """Distances in buckets that grow by logarithm, one bias a bucket and head; no scale."""

    def __init__(self, causal: bool, buckets: int = 8, far: int = 20) -> None:
        super().__init__()
        self.causal, self.buckets, self.far = causal, buckets, far
        self.relative_attention_bias = nn.Embedding(buckets, H)
        self.q, self.k, self.v, self.o = (nn.Linear(W, W, bias=False) for _ in range(4))

    def bucket(self, relative):
        n, offset = self.buckets, 0
        if self.causal:
            relative = -torch.min(relative, torch.zeros_like(relative))
        else:
            n //= 2
            offset = (relative > 0).to(torch.long) * n
            relative = relative.abs()
        exact = n // 2
        large = exact + (torch.log(relative.float() / exact) / math.log(self.far / exact) * (n - exact)).to(torch.long)
        large = torch.min(large, torch.full_like(large, n - 1))
        return offset + torch.where(relative < exact, relative, large)

    def forward(self, x):
        n = x.shape[1]
        at = torch.arange(n)
        bias = self.relative_attention_bias(self.bucket(at[None, :] - at[:, None])).permute(2, 0, 1).unsqueeze(0)
        if self.causal:
            bias = bias + torch.where(at[None, :] > at[:, None], torch.finfo(x.dtype).min, 0.0)
        scores = torch.matmul(split(x, self.q), split(x, self.k).transpose(3, 2)) + bias
        attn = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(torch.matmul(attn, split(x, self.v)).transpose(1, 2).contiguous().flatten(2))


def relative_shift(x):
    """One column of zeros in front, rows and columns read in the other order, the first row dropped."""
    b, h, n, m = x.shape
    padded = torch.cat([x.new_zeros(b, h, n, 1), x], dim=-1)
    return padded.view(b, h, m + 1, n)[:, :, 1:].view_as(x)


class ShiftedByPadding(nn.Module):
    """Content and position scores, each with a bias of its own on the queries, the second one shifted."""

    def __init__(self, both_ways: bool) -> None:
        super().__init__()
        self.both_ways = both_ways
        self.q, self.k, self.v, self.pos = (nn.Linear(W, W) for _ in range(4))
        self.u, self.w = nn.Parameter(torch.zeros(H, 1, D)), nn.Parameter(torch.zeros(H, 1, D))

    def positions(self, count):
        angle = count[:, None] * 100.0 ** -(torch.arange(0, W, 2) / W)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def forward(self, x):
        n = x.shape[1]
        q, k, v = split(x, self.q), split(x, self.k), split(x, self.v)
        count = torch.arange(n - 1, -n, -1) if self.both_ways else torch.arange(n - 1, -1, -1)
        r = split(self.positions(count.float())[None], self.pos)
        matrix_ac = torch.matmul(q + self.u, k.transpose(-2, -1))
        matrix_bd = relative_shift(torch.matmul(q + self.w, r.transpose(-2, -1)))[..., :n]
        scores = (matrix_ac + matrix_bd) / math.sqrt(D)
        if not self.both_ways:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


class RelativeKeys(nn.Module):
    """Shaw's: queries also meet an embedding of the distance, by einsum over a table looked up for each pair."""

    def __init__(self, far: int = 6) -> None:
        super().__init__()
        self.far, self.distance = far, nn.Embedding(2 * far + 1, D)
        self.q, self.k, self.v = (nn.Linear(W, W) for _ in range(3))

    def forward(self, x, attention_mask):
        q, k, v = split(x, self.q), split(x, self.k), split(x, self.v)
        at = torch.arange(x.shape[1])
        embedded = self.distance((at[:, None] - at[None, :]).clamp(-self.far, self.far) + self.far)
        scores = q @ k.mT + torch.einsum("bhld,lrd->bhlr", q, embedded)
        extended = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        return ((scores / math.sqrt(D) + extended).softmax(-1) @ v).transpose(1, 2).flatten(2)


class RelativeValues(RelativeKeys):
    """Embeddings of the distance among the values too: the weights are used twice."""

    def forward(self, x, attention_mask):
        q, k, v = split(x, self.q), split(x, self.k), split(x, self.v)
        at = torch.arange(x.shape[1])
        embedded = self.distance((at[:, None] - at[None, :]).clamp(-self.far, self.far) + self.far)
        p = (q @ k.mT / math.sqrt(D)).softmax(-1)
        return (p @ v + torch.einsum("bhlr,lrd->bhld", p, embedded)).transpose(1, 2).flatten(2)


class Disentangled(nn.Module):
    """Content to position and position to content, gathered from tables of distances."""

    def __init__(self, far: int = 6) -> None:
        super().__init__()
        self.far, self.rel = far, nn.Embedding(2 * far, W)
        self.q, self.k, self.v, self.pos_k, self.pos_q = (nn.Linear(W, W) for _ in range(5))

    def forward(self, x, mask):
        b, n, _ = x.shape
        q, k, v = folded(x, self.q), folded(x, self.k), folded(x, self.v)
        scale = math.sqrt(D * 3)
        scores = torch.bmm(q, k.transpose(-1, -2) / scale)
        at = torch.arange(n)
        index = ((at[:, None] - at[None, :]) + self.far).clamp(0, 2 * self.far - 1).expand(b * H, n, n)
        table = self.rel.weight[None]
        pos_k, pos_q = folded(table, self.pos_k).repeat(b, 1, 1), folded(table, self.pos_q).repeat(b, 1, 1)
        c2p = torch.gather(torch.bmm(q, pos_k.mT), dim=-1, index=index) / scale
        backwards = (2 * self.far - index).clamp(0, 2 * self.far - 1)
        p2c = torch.gather(torch.bmm(k, pos_q.mT), dim=-1, index=backwards).mT / scale
        scores = (scores + c2p + p2c).view(b, H, n, n)
        keep = (mask.unsqueeze(1) * mask.unsqueeze(2)).unsqueeze(1).bool()
        p = torch.softmax(scores.masked_fill(~keep, torch.finfo(x.dtype).min), dim=-1)
        return torch.bmm(p.view(b * H, n, n), v).view(b, H, n, D).transpose(1, 2).flatten(2)


class Skew(nn.Module):
    """The memory-saving skew: pad, reshape, slice; causal, so what it skews wrongly is masked."""

    def __init__(self, longest: int = 32) -> None:
        super().__init__()
        self.Er, self.qkv = nn.Parameter(torch.randn(longest, D)), nn.Linear(W, 3 * W)
        self.register_buffer("mask", torch.tril(torch.ones(longest, longest)).unsqueeze(0).unsqueeze(0))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4)
        QEr = torch.matmul(q, self.Er[self.Er.shape[0] - n :].transpose(0, 1))
        padded = F.pad(QEr, (1, 0))
        Srel = padded.reshape(b, H, n + 1, n)[:, :, 1:, :]
        attn = (torch.matmul(q, k.mT) + Srel) / math.sqrt(D)
        attn = attn.masked_fill(self.mask[:, :, :n, :n] == 0, float("-inf"))
        return (F.softmax(attn, dim=-1) @ v).transpose(1, 2).reshape(b, n, W)


class Kernelised(nn.Module):
    """A learned decay of the logarithm of the distance, for each head, under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.a = nn.Parameter(torch.rand(H, 1, 1)), nn.Parameter(torch.rand(H, 1, 1))
        self.qkv = nn.Linear(W, 3 * W, bias=False)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, H, 3 * D).transpose(1, 2).chunk(3, -1)
        diff = torch.tril(torch.arange(n).view(n, 1).repeat(1, n) + torch.arange(0, -n, -1)).to(x.dtype)
        bias = -self.p.clamp(min=1e-2) * torch.log(1 + self.a.clamp(min=1e-2) * diff)
        scores = q @ k.mT / math.sqrt(D) + bias
        scores = scores.masked_fill(torch.ones(n, n).tril() == 0, torch.finfo(x.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


X = (hidden(W),)
MASKED = (hidden(W), ones_and_zeros())


class Forgetting(nn.Module):
    """The bias is how much was forgotten between a key and a query: a difference of running sums of gates."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill
        self.q, self.k, self.v = (nn.Linear(W, W) for _ in range(3))
        self.gates = nn.Linear(W, H)

    def forward(self, x):
        forgotten = F.logsigmoid(self.gates(x).transpose(1, 2)).cumsum(-1)
        scores = split(x, self.q) @ split(x, self.k).mT * 0.25
        scores = scores + (forgotten[:, :, :, None] - forgotten[:, :, None, :])
        late = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(late, self.fill).softmax(-1) @ split(x, self.v)


CASES = (
    Case("forgetting, -inf", lambda: Forgetting(-math.inf), X, mask="causal+bias"),
    Case("forgetting, lowest", lambda: Forgetting(torch.finfo(torch.float32).min), X, mask="causal+bias"),
    Case("buckets, both ways", lambda: Buckets(causal=False), X, mask="bias", attributes={"scale": 1.0}),
    Case("buckets, causal", lambda: Buckets(causal=True), X, mask="causal+bias"),
    Case("shift, causal", lambda: ShiftedByPadding(False), X, mask="causal+bias"),
    Case("shift, both ways", lambda: ShiftedByPadding(True), X, mask="bias"),
    Case("relative keys", RelativeKeys, MASKED, mask="bias"),
    Case("relative keys and values", RelativeValues, MASKED, sites=0, reason="used more than once"),
    Case("disentangled", Disentangled, MASKED, mask="bias", sizes=Sizes(2, 12)),
    Case("skew", Skew, X, mask="stored causal"),
    Case("kernelised", Kernelised, X, mask="causal+bias"),
)
