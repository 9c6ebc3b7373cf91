"""What looks like softmax attention and is another computation: left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import Case, hidden

W = 16


class Unlike(nn.Module):
    """Projections and a core that is no softmax attention, causal or not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(W, W) for _ in range(3))
        self.extra = nn.Parameter(torch.randn(W, W))

    def forward(self, x):
        return self.core(self.q(x), self.k(x), self.v(x))


class Linear(Unlike):
    """Feature maps in place of the softmax."""

    def core(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        return (q @ (k.mT @ v)) / (q @ k.sum(1).unsqueeze(-1))


class Efficient(Unlike):
    """Softmaxes of queries over channels and of keys over positions, each alone."""

    def core(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Sigmoid(Unlike):
    def core(self, q, k, v):
        return torch.sigmoid(q @ k.mT * 0.25 - 2.5) @ v


class SquaredRelu(Unlike):
    def core(self, q, k, v):
        return (F.relu(q @ k.mT * 0.25) ** 2 / k.shape[1]) @ v


class Sparsemax(Unlike):
    """The projection onto the simplex."""

    def core(self, q, k, v):
        z = q @ k.mT * 0.25
        z = z - z.amax(-1, keepdim=True)
        ordered = z.sort(dim=-1, descending=True).values
        rank = torch.arange(1, z.shape[-1] + 1)
        total = ordered.cumsum(-1) - 1
        support = (rank * ordered > total).sum(-1, keepdim=True)
        return torch.clamp(z - total.gather(-1, support - 1) / support, min=0) @ v


class OverQueries(Unlike):
    """Normalised along the queries."""

    def core(self, q, k, v):
        return (q @ k.mT * 0.25).softmax(dim=-2) @ v


class KeepTheLargest(Unlike):
    """Each query keeps its three largest scores: the mask depends on the scores."""

    def core(self, q, k, v):
        scores = q @ k.mT * 0.25
        least = scores.topk(3, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v


class TemperatureByScores(Unlike):
    """Scores divided by their own spread."""

    def core(self, q, k, v):
        scores = q @ k.mT
        return (scores / scores.std(dim=-1, keepdim=True)).softmax(-1) @ v


class Differential(Unlike):
    """One softmax less another."""

    def core(self, q, k, v):
        a, b = ((x @ y.mT * 0.3).softmax(-1) for x, y in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
        return (a - 0.4 * b) @ v


class Gated(Unlike):
    """A gate on each weight, after the softmax."""

    def core(self, q, k, v):
        scores = q @ k.mT * 0.25
        return (scores.softmax(-1) * torch.sigmoid(scores)) @ v


class Sinkhorn(Unlike):
    """Rows and columns normalised in turn."""

    def core(self, q, k, v):
        log = q @ k.mT * 0.25
        for _ in range(3):
            log = log - log.logsumexp(-1, keepdim=True)
            log = log - log.logsumexp(-2, keepdim=True)
        return log.exp() @ v


class Smoothed(Unlike):
    """Weights mixed with the mean over all keys."""

    def core(self, q, k, v):
        p = (q @ k.mT * 0.25).softmax(-1)
        return (0.9 * p + 0.1 / p.shape[-1]) @ v


class Renormalised(Unlike):
    """Some keys dropped after the softmax, the rest scaled up: the mask comes too late to be one."""

    def core(self, q, k, v):
        p = (q @ k.mT * 0.25).softmax(-1) * torch.ones(k.shape[1], k.shape[1]).tril()
        return (p / p.sum(-1, keepdim=True)) @ v


class Quadratic(Unlike):
    """A bilinear form of three tensors."""

    def core(self, q, k, v):
        return torch.einsum("bid,bjd,d->bij", q, k, self.extra[0].exp()).square().softmax(-1) @ v


class Dropped(Unlike):
    """Dropout on the weights, in training."""

    def core(self, q, k, v):
        return F.dropout((q @ k.mT * 0.25).softmax(-1), 0.3, self.training) @ v


class Averaged(Unlike):
    """The weights are returned."""

    def core(self, q, k, v):
        p = (q @ k.mT * 0.25).softmax(-1)
        return p @ v, p.mean(1)


class Router(nn.Module):
    """A softmax between two products of a mixture of experts: the second is over experts, not keys."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(W, experts), nn.Parameter(torch.randn(experts, W, W))

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        return torch.einsum("bse,bsd,edf->bsf", gates, x, self.experts)


class DynamicConvolution(nn.Module):
    """Each token mixes its neighbours by weights that it gives out itself: there are no keys."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.width, self.mixing, self.value = width, nn.Linear(W, width), nn.Linear(W, W)

    def forward(self, x):
        near = F.pad(self.value(x), (0, 0, self.width - 1, 0)).unfold(1, self.width, 1)
        return (near @ self.mixing(x).softmax(-1)[..., None]).squeeze(-1)


class Retention(Unlike):
    """A causal decay on the scores, and no softmax."""

    def core(self, q, k, v):
        n = torch.arange(q.shape[1])
        decay = torch.where(n[:, None] >= n, 0.9 ** (n[:, None] - n).clamp(min=0), 0.0)
        return (q @ k.mT * decay) @ v


X = (hidden(W),)


def left(name: str, build: type[nn.Module], reason: str | None, **options) -> Case:
    return Case(name, build, X, sites=0, reason=reason, **options)


CASES = (
    left("linear", Linear, None),
    left("efficient", Efficient, None),
    left("sigmoid", Sigmoid, None),
    left("squared relu", SquaredRelu, None),
    left("sparsemax", Sparsemax, None),
    left("over queries", OverQueries, ""),
    # The mask comes from the scores, no gradient flows through it: attention under a given mask, computed twice.
    Case("keep the largest", KeepTheLargest, X, mask="input", either=True),
    left("temperature by scores", TemperatureByScores, ""),
    left("differential", Differential, ""),
    left("gated", Gated, ""),
    left("sinkhorn", Sinkhorn, None),
    left("smoothed", Smoothed, ""),
    left("renormalised", Renormalised, ""),
    left("quadratic", Quadratic, ""),
    left("dropped", Dropped, "dropout", training=True),
    left("averaged", Averaged, "used more than once"),
    left("router", Router, None),
    left("dynamic convolution", DynamicConvolution, "not one product"),
    left("retention", Retention, None),
)
