"""Which parts of a live model are captured, for models that keep their layers in other ways than a list of layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kreg
from kreg.rewriters.live import attached

W, HEADS = 16, 2


class Attention(nn.Module):
    """Gives its weights out beside its result, if asked for."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 0.3).softmax(-1)
        out: torch.Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return (out, weights) if self.weights else out


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(W, 2 * W), nn.Linear(2 * W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(F.gelu(self.up(x)))
        return out


class ListsOfParts(nn.Module):
    """A layer is a list of its parts, which the model itself calls one by one."""

    def __init__(self, weights: bool = False, layers: int = 2) -> None:
        super().__init__()
        parts = ([nn.ModuleList([nn.LayerNorm(W)]), Attention(weights), Feed()] for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleList(part) for part in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for norms, attention, feed in self.layers:  # type: ignore[misc]
            found = attention(norms[0](x))
            if isinstance(found, tuple):
                found, weights = found
                kept.append(weights)
            x = x + found
            x = x + feed(x)
        return x


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out * 2


class GivenOut(ListsOfParts):
    """The weights leave the model, too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        (norms, attention, feed), *_ = self.layers  # type: ignore[misc]
        found, weights = attention(norms[0](x))
        return x + feed(found), weights


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def replaced(model: nn.Module, x: torch.Tensor) -> int:
    """How many sites of the rewritten model are replaced, once its answers and gradients are the original's."""
    original = copy.deepcopy(model)
    kreg.rewrite(model, example_inputs=(x,))
    for given in (x, torch.randn(x.shape[0] + 1, *x.shape[1:])):
        outs = [m(given) for m in (model, original)]
        losses = [sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,))) for out in outs]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        grads = [
            torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
            for loss, m in zip(losses, (model, original), strict=True)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    return sum(site.status == "replaced" for site in kreg.report(model).sites)


def test_of_a_layer_that_is_a_list_each_part_is_captured() -> None:
    model = ListsOfParts()
    assert replaced(model, torch.randn(2, 5, W)) == 2
    assert [path for path in attached(model).regions if path.endswith(".1")] == ["layers.0.1", "layers.1.1"]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_region_grows_until_the_weights_that_it_gives_out_stay_inside(depth: int) -> None:
    model: nn.Module = ListsOfParts(weights=True)
    for _ in range(depth):
        model = Around(nn.ModuleDict({"a": model})["a"])
    assert replaced(model, torch.randn(2, 5, W)) == 2
    assert list(attached(model).regions) == [".".join(["inner"] * depth)]


def test_a_region_stays_small_where_the_weights_leave_the_model() -> None:
    model = GivenOut(weights=True)
    assert replaced(model, torch.randn(2, 5, W)) == 0
    assert "layers.0.1" in attached(model).regions
    assert "used more than once" in kreg.report(model).near_misses[0].reason


class Windows(nn.Module):
    """Attention in windows of a padded grid."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(W, 3 * W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, height, width, channels = x.shape
        y = F.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
        down, across = y.shape[1] // 4, y.shape[2] // 4
        y = y.view(-1, down, 4, across, 4, channels).transpose(2, 3).reshape(-1, 16, channels)
        q, k, v = self.qkv(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT * 0.3).softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = y.view(-1, down, across, 4, 4, channels).transpose(2, 3).reshape(-1, down * 4, across * 4, channels)
        return x + y[:, :height, :width]


def test_of_a_grid_the_batch_alone_varies() -> None:
    model = nn.Sequential(*(nn.Sequential(Windows(), nn.LayerNorm(W)) for _ in range(2)))
    assert replaced(model, torch.randn(2, 6, 6, W)) == 2
    free = {
        dim
        for graph in attached(model).known.values()
        for node in graph.functional.graph.find_nodes(op="placeholder")  # type: ignore[union-attr]
        if isinstance(value := node.meta["val"], torch.Tensor)
        for dim, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    }
    assert free == {0}


class Remembering(nn.Module):
    """Keeps what it computes from a buffer, as models do for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.table = nn.Parameter(torch.randn(5))
        self.register_buffer("places", torch.arange(5))
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.table[self.places]  # type: ignore[index]
        return self.attention(x) + self.kept[:, None]  # type: ignore[operator]


def test_what_a_model_keeps_of_its_buffers_can_be_differentiated_after_a_capture() -> None:
    model = nn.Sequential(*(Remembering() for _ in range(2)))
    x = torch.randn(2, 5, W)
    kreg.rewrite(model, example_inputs=(x,))
    model(x).sum().backward()
    assert all(layer.table.grad is not None for layer in model)


def test_a_model_that_was_made_in_inference_mode_is_rewritten() -> None:
    with torch.inference_mode():
        model = nn.Sequential(*(Remembering() for _ in range(2)))
        x = torch.randn(2, 5, W)
        want = copy.deepcopy(model)(x)
        kreg.rewrite(model, example_inputs=(x,))
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert kreg.report(model).calls.rewritten == 1
