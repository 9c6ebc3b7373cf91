"""Masks that a model makes outside its layers: proven where they are what they were, and never taken for another."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import kreg
from kreg.rewriters.live import attached

LENGTH = 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(8) + mask
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


Mask = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """The mask is made by a function that is no part of what is captured."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.mask: Mask = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.mask(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def places(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None, :]


def added(keep: torch.Tensor) -> torch.Tensor:
    return torch.where(keep, 0.0, torch.finfo(torch.float32).min)[None, None]


def causal(x: torch.Tensor) -> torch.Tensor:
    q, k = places(x)
    return added(k <= q)


def backwards(x: torch.Tensor) -> torch.Tensor:
    q, k = places(x)
    return added(k >= q)


def sliding(x: torch.Tensor) -> torch.Tensor:
    q, k = places(x)
    return added((k <= q) & (k > q - 3))


def wider(x: torch.Tensor) -> torch.Tensor:
    q, k = places(x)
    return added((k <= q) & (k > q - 5))


def as_long_as_the_window(x: torch.Tensor) -> torch.Tensor:
    q, k = places(x)
    return added((k <= q) & (k > q - LENGTH))


def written_into(x: torch.Tensor) -> torch.Tensor:
    mask = causal(x)
    mask[..., 0] = torch.finfo(torch.float32).min
    mask[..., 0, 0] = 0.0
    return mask


def written_through_numpy(x: torch.Tensor) -> torch.Tensor:
    mask = causal(x).contiguous()
    return torch.from_numpy(mask.numpy().copy())


def of_data(x: torch.Tensor) -> torch.Tensor:
    q, k = places(x)
    return added((k <= q) & ((x.detach().sum(-1)[0] > 0)[None, :] | (k == q)))


def scaled(x: torch.Tensor) -> torch.Tensor:
    return causal(x) * 0.0


def of_a_view(x: torch.Tensor) -> torch.Tensor:
    return causal(torch.cat([x, x], 1))[..., : x.shape[1], : x.shape[1]]


MASKS: tuple[Mask, ...] = (
    causal,
    backwards,
    sliding,
    wider,
    as_long_as_the_window,
    written_into,
    written_through_numpy,
    of_data,
    scaled,
    of_a_view,
)


def test_each_call_is_answered_for_the_mask_of_that_call() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model()
    kreg.rewrite(model, example_inputs=(torch.randn(2, LENGTH, 16),))
    assert [site.mask for site in kreg.report(model).sites] == [{"kind": "causal"}] * 2
    layers = {layer: layer._compiled_call_impl for layer in (model, *model.layers)}
    for turn in range(2):
        for length in (LENGTH, 9, 5):
            for mask in MASKS:
                model.mask = mask
                x = torch.randn(2, length, 16)
                got = model(x)
                for module in layers:
                    module._compiled_call_impl = None
                want = model(x)
                for module, call in layers.items():
                    module._compiled_call_impl = call
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=f"{mask.__name__}, {length}, {turn}")
    calls = kreg.report(model).calls
    assert calls.original == 0 and calls.rewritten == 2 * 3 * len(MASKS)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (causal, "causal"),
        (sliding, "sliding"),
        (of_a_view, "causal"),
        (written_into, "input"),
        (of_data, "causal+input"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_mask_is_proven_if_it_is_what_its_makers_made(mask: Mask, kind: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(1)
    model.mask = mask
    kreg.rewrite(model, example_inputs=(torch.randn(2, LENGTH, 16),))
    (site,) = kreg.report(model).sites
    assert site.status == "replaced" and site.mask is not None
    assert site.mask["kind"] == kind
    assert attached(model).account.variants


def test_a_mask_of_unknown_making_does_not_settle_what_later_calls_get() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(1)
    model.mask = written_through_numpy
    x = torch.randn(2, LENGTH, 16)
    kreg.rewrite(model, example_inputs=(x,))
    variants = attached(model).account.variants
    (site,) = (site for variant in variants for site in variant.report.sites)
    assert site.mask == {"kind": "input", "input": ["bias"]}
    model.mask = causal
    model(x)
    assert [site.mask for site in variants[-1].report.sites] == [{"kind": "causal"}]


class Paddings(nn.Module):
    """Two layers alike, each with two masks: the first layer's are of one padding, the second layer's of two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoMasks() for _ in range(2))

    def forward(self, x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        first, second = added(one)[0, 0][:, None, None], added(other)[0, 0][:, None, None]
        both = first * 1.0
        return self.layers[1](self.layers[0](x, first, both), second, both)


class TwoMasks(Layer):
    def forward(self, x: torch.Tensor, mask: torch.Tensor, more: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, mask) + super().forward(x, more)


def test_one_tensor_behind_two_masks_is_not_taken_for_two_tensors() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Paddings()
    x = torch.randn(2, LENGTH, 16, requires_grad=True)  # as between the layers, so that both share a graph
    one, other = torch.ones(2, 2, LENGTH, dtype=torch.bool).unbind()
    one[:, 8:], other[:, :4] = False, False
    want = model(x, one, other)
    kreg.rewrite(model, example_inputs=(x, one, other))
    for _ in range(2):
        torch.testing.assert_close(model(x, one, other), want, rtol=1e-5, atol=1e-5)
