"""Queries may be a layer's weight: what it multiplies are the keys, where the softmax runs over these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kreg

TOKENS, CHANNELS, LATENTS = 10, 8, 3


class Pooled(nn.Module):
    """Tokens are summed up under the weights that a layer gives each of them."""

    def __init__(self, score: Callable[[], nn.Module], bias: bool = False) -> None:
        super().__init__()
        self.score = score()
        self.bias = nn.Parameter(torch.randn(TOKENS)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x.tanh())
        scores = scores if self.bias is None else scores + self.bias[:, None]
        return scores.softmax(1).mT @ x


class ByConvolution(nn.Module):
    """The same where tokens are the places of an image of one column (arXiv:2209.03592)."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(CHANNELS, LATENTS, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x.mT[..., None]).squeeze(-1)
        return torch.einsum("...si,...id->...sd", scores.softmax(-1), x)


class Strided(nn.Module):
    """A convolution of more than one place is no product of places."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv1d(CHANNELS, LATENTS, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x.mT).softmax(-1) @ x


class OfExperts(nn.Module):
    """Each token mixes the results of all experts: what is chosen among is learnt, and no token is a key."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(CHANNELS, LATENTS)
        self.experts = nn.Parameter(torch.randn(LATENTS, CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        results = torch.einsum("btc,ecd->bted", x, self.experts)
        return torch.einsum("bte,bted->btd", self.route(x).softmax(-1), results)


class OfFeatures(nn.Module):
    """A softmax of each feature over the tokens, as linear attention has it, is none of scores (arXiv:1812.01243)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.k, self.v, self.heads = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS), heads

    def forward(self, x: Tensor) -> Tensor:
        k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.k, self.v))
        return k.softmax(-2).mT @ v


def x() -> Tensor:
    return torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "model",
    [
        Pooled(lambda: nn.Linear(CHANNELS, LATENTS)),
        Pooled(lambda: nn.Linear(CHANNELS, LATENTS, bias=False)),
        Pooled(lambda: nn.Linear(CHANNELS, LATENTS), bias=True),
        ByConvolution(),
    ],
    ids=["linear", "linear without bias", "linear with a bias for each place", "convolution"],
)
def test_a_weight_that_is_multiplied_with_tokens_is_the_queries(model: nn.Module) -> None:
    report = kreg.analyse(model, (x(),))
    (site,) = report.sites
    assert not report.near_misses
    assert site.status == "replaced", site.reason
    assert (site.dims["queries"], site.dims["keys"], site.dims["head_dim"]) == (LATENTS, TOKENS, CHANNELS)
    assert site.verify is not None
    assert site.verify.passed
    assert site.verify.max_grad_error is not None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Strided(), "not one product"),
        (OfExperts(), "the keys are a parameter"),
        (OfFeatures(heads=1), "features of the keys"),
        (OfFeatures(heads=2), "features of the keys"),
    ],
)
def test_other_layers_before_a_softmax_are_left_with_a_reason(model: nn.Module, reason: str) -> None:
    report = kreg.analyse(model, (x(),))
    assert not report.sites
    (miss,) = report.near_misses
    assert reason in miss.reason


@pytest.mark.parametrize("how", ["exported", "live"])
def test_a_bias_that_shifts_all_logits_has_a_gradient_of_zero(how: str) -> None:
    """DistributedDataParallel waits for the gradient of each parameter."""
    torch.manual_seed(0)
    model, x = Pooled(lambda: nn.Linear(CHANNELS, 1)), torch.randn(2, TOKENS, CHANNELS)
    want = model(x)
    if how == "live":
        found = kreg.rewrite(model, example_inputs=(x,))
        report = kreg.report(model)
    else:
        program = kreg.export(model, (x,))
        found, report = program.module(), kreg.program_report(program)
    assert report is not None and [site.status for site in report.sites] == ["replaced"]
    out = found(x)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    grads = {name.rpartition(".")[2]: parameter.grad for name, parameter in found.named_parameters()}
    assert grads["bias"] is not None and grads["bias"].tolist() == [0.0]
    assert grads["weight"] is not None and grads["weight"].abs().max() > 0
