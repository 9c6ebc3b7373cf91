"""Small models for the command line: functions that return (model, example_inputs)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention as models write it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 0.25
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        out: Tensor = (weights @ v).transpose(1, 2).reshape(batch, length, 32)
        return out


class Block(nn.Module):
    """Two layers of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Branches(nn.Module):
    """Control flow that depends on the data: no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -x


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What kreg replaces, twice; it prints, as a model's code may."""
    print("the model is being made")
    torch.manual_seed(0)
    return Block(), (torch.randn(2, 24, 32),)


def by_keyword() -> tuple[nn.Module, dict[str, Tensor]]:
    """The same, its input by keyword."""
    return Block(), {"x": torch.randn(2, 24, 32)}


def dropout() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What kreg leaves as it is: dropout on the weights while training."""
    return Attention(dropout=0.5), (torch.randn(2, 24, 32),)


def linear() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Nothing to replace."""
    return nn.Linear(8, 8), (torch.randn(2, 8),)


def branches() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What cannot be captured."""
    return Branches(), (torch.randn(2, 8),)


def alone() -> nn.Module:
    """A model without inputs."""
    return nn.Linear(8, 8)


def swapped() -> tuple[tuple[Tensor, ...], nn.Module]:
    """The wrong way round."""
    return (torch.randn(2, 8),), nn.Linear(8, 8)


def wordy() -> tuple[nn.Module, str]:
    """Inputs that are none."""
    return nn.Linear(8, 8), "2x8"


def broken() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A function that fails."""
    raise RuntimeError("the weights are elsewhere")


CONSTANT = 3
