"""The softmax itself written by hand, or along another dimension, or in another precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import Case, fixed, heads, hidden

W = 16


class Attention(nn.Module):
    """Projections, and a core that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(W, W) for _ in range(3))

    def forward(self, x):
        return self.core(self.q(x), self.k(x), self.v(x))


class ExpAndSum(Attention):
    """Unstable: nothing is subtracted."""

    def core(self, q, k, v):
        weights = torch.exp(q @ k.mT * W**-0.5)
        return (weights / weights.sum(-1, keepdim=True)) @ v


class Stable(Attention):
    """The maximum taken off, as textbooks advise."""

    def core(self, q, k, v):
        scores = torch.einsum("bsd,btd->bst", q, k) / W**0.5
        e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return torch.einsum("bst,btd->bsd", e / e.sum(dim=-1, keepdim=True), v)


class DividedAfterwards(Attention):
    """Exponentials times values, divided by their sum after the product."""

    def core(self, q, k, v):
        scores = q @ k.mT * W**-0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        e = torch.exp(scores - scores.amax(-1, keepdim=True)) * causal
        return (e @ v) / e.sum(-1, keepdim=True)


class ByLogSumExp(Attention):
    def core(self, q, k, v):
        scores = q @ k.mT * 0.25
        return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


class ByLogSoftmax(Attention):
    def core(self, q, k, v):
        return F.log_softmax(q @ k.mT * 0.25, dim=-1).exp() @ v


class OffByOne(Attention):
    """One more in the denominator: a sink whose logit is zero."""

    def core(self, q, k, v):
        scores = q @ k.mT * W**-0.5
        top = scores.amax(dim=-1, keepdim=True).clamp(min=0.0)
        e = torch.exp(scores - top)
        return (e / (e.sum(dim=-1, keepdim=True) + torch.exp(-top))) @ v


class ZeroPadded(Attention):
    """The same sink as a column of zeros before the softmax."""

    def core(self, q, k, v):
        scores = F.pad(q @ k.mT * W**-0.5, (0, 1), value=0.0)
        return scores.softmax(-1)[..., :-1] @ v


class ZeroKey(Attention):
    """The same sink as a key and a value of zeros."""

    def core(self, q, k, v):
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return (q @ k.mT * W**-0.5).softmax(-1) @ v


class AlongRows(Attention):
    """Scores with the keys first, the softmax along dimension 1, values from the left."""

    def core(self, q, k, v):
        scores = torch.bmm(k, q.transpose(1, 2)).div(4.0)
        return torch.bmm(v.transpose(1, 2), torch.softmax(scores, dim=1)).transpose(1, 2)


class ByModule(Attention):
    """nn.Softmax, and half the scale on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def core(self, q, k, v):
        return self.softmax((q / 2) @ (k / 2).mT) @ v


class Upcast(Attention):
    """Everything in float32 between the products."""

    def core(self, q, k, v):
        scores = torch.matmul(q, k.mT).float() * 0.25
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)


class UpcastBefore(Attention):
    """The products themselves in float32."""

    def core(self, q, k, v):
        q, k, v32 = q.float(), k.float(), v.float()
        return (torch.softmax(q @ k.mT * 0.25, dim=-1) @ v32).to(v.dtype)


class ByBaddbmm(Attention):
    """An empty tensor for a beta of zero."""

    def core(self, q, k, v):
        b, n, _ = q.shape
        scores = torch.baddbmm(torch.empty(b, n, n, dtype=q.dtype), q, k.mT, beta=0, alpha=0.25)
        return torch.bmm(scores.softmax(-1), v)


class BySum(Attention):
    """Broadcast products and sums for matrix products."""

    def core(self, q, k, v):
        scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1) * 0.25
        return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(1)).sum(2)


class InChunks(Attention):
    """Queries in chunks by a Python loop, joined: as many attentions as chunks."""

    def core(self, q, k, v):
        return torch.cat([(part @ k.mT * 0.25).softmax(-1) @ v for part in q.split(4, dim=1)], dim=1)


class Online(Attention):
    """Keys in chunks with a running maximum and sum: flash attention spelt out."""

    def core(self, q, k, v):
        best = torch.full(q.shape[:-1], float("-inf"))
        total, out = torch.zeros(q.shape[:-1]), torch.zeros_like(v)
        for keys, values in zip(k.split(6, dim=1), v.split(6, dim=1), strict=True):
            scores = q @ keys.mT * 0.25
            higher = torch.maximum(best, scores.amax(-1))
            p, fade = torch.exp(scores - higher[..., None]), torch.exp(best - higher)
            total, out, best = total * fade + p.sum(-1), out * fade[..., None] + p @ values, higher
        return out / total[..., None]


class InPlace(Attention):
    """Scores written into and changed in place."""

    def core(self, q, k, v):
        scores = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        scores = torch.bmm(q, k.mT)
        scores *= 0.25
        n = scores.shape[-1]
        scores[:, torch.ones(n, n).triu(1).bool()] = float("-inf")
        return scores.softmax(-1) @ v


class Checked(nn.Module):
    """Contiguous copies, needless casts and views between everything."""

    def forward(self, q, k, v):
        b, h, n, d = q.shape
        q = q.contiguous().view(b * h, n, d).to(q.dtype)
        k = k.transpose(2, 3).contiguous().view(b * h, d, n)
        scores = torch.matmul(q, k).view(b, h, n, n).clone().div_(d**0.5)
        p = torch.nn.functional.softmax(scores.view(b * h, n, n), dim=2).view_as(scores).type_as(v)
        p = nn.functional.dropout(p, p=0.0, training=True)
        return torch.matmul(p.contiguous(), v.contiguous()).contiguous()


X = (hidden(W),)
CASES = (
    Case("exp and sum", ExpAndSum, X),
    Case("maximum taken off", Stable, X),
    Case("divided afterwards", DividedAfterwards, X, mask="causal", either=True),
    Case("by logsumexp", ByLogSumExp, X),
    Case("by log_softmax", ByLogSoftmax, X),
    Case("off by one", OffByOne, X, either=True),
    Case("zero logit", ZeroPadded, X),
    Case("zero key", ZeroKey, X),
    Case("along rows", AlongRows, X, attributes={"scale": 0.25}),
    Case("by module", ByModule, X, attributes={"scale": 0.25}),
    Case("upcast", Upcast, X, bfloat16=True),
    Case("upcast before the product", UpcastBefore, X, bfloat16=True),
    Case("by baddbmm", ByBaddbmm, X, attributes={"scale": 0.25}),
    Case("by sums", BySum, X, either=True),
    Case("queries in chunks", InChunks, X, sites=3, dims={"queries": 4, "keys": 12}, **fixed()),
    Case("online", Online, X, either=True, **fixed()),
    Case("in place", InPlace, X, mask="causal"),
    Case("copies and casts", Checked, (heads(2, 8),) * 3),
)
