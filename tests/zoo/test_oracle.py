"""What the oracle counts, on modules written by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.oracle import Census, census, is_causal


class Toy(nn.Module):
    """A function as a module, with a parameter of eight by eight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def counted(function: Callable[[Tensor, Tensor], Tensor]) -> Census:
    return census(Toy(function), {"x": torch.randn(2, 6, 8)})


def plain(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1) @ x


def through_a_module(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(nn.Softmax(dim=-1)(torch.bmm(x, x.transpose(1, 2))), x)


def einsum_with_layouts(x: Tensor, w: Tensor) -> Tensor:
    heads = x.view(2, 6, 2, 4).permute(0, 2, 1, 3)
    scores = torch.einsum("bhqd,bhkd->bhqk", heads, heads)
    weights = F.dropout(F.softmax(scores, -1, dtype=torch.float32).to(x.dtype), 0.1, False)
    return torch.einsum("bhqk,bhkd->bqhd", weights, heads).flatten(2)


def with_a_sink(x: Tensor, w: Tensor) -> Tensor:
    scores = torch.cat([x @ x.mT, w[0, :1].expand(2, 6, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ x


def into_a_buffer(x: Tensor, w: Tensor) -> Tensor:
    weights = torch.zeros(2, 6, 6)
    weights[:, :3] = (x @ x.mT).softmax(-1)[:, :3]
    return weights @ x


def fused(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def named_like_an_eager_form(x: Tensor, w: Tensor) -> Tensor:
    def eager_attention_forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value

    return eager_attention_forward(x, x, x)


def registered(x: Tensor, w: Tensor) -> Tensor:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    heads = x.view(2, 6, 2, 4).transpose(1, 2)
    module = nn.Module()
    module.is_causal = False
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, heads, heads, heads, None)[0].flatten(2)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (plain, "softmax"),
        (through_a_module, "softmax"),
        (einsum_with_layouts, "softmax"),
        (with_a_sink, "softmax"),
        (into_a_buffer, "softmax"),
        (fused, "sdpa"),
        (named_like_an_eager_form, "interface"),
        (registered, "interface"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_attention_counts_once_however_it_is_written(function: Callable[..., Tensor], kind: str) -> None:
    found = counted(function)
    assert [attention.kind for attention in found.attentions] == [kind]
    assert found.other_softmaxes == 0


def test_multi_head_attention_counts_once_in_training_and_in_its_fast_path() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    for model in (Wrapped().train(), Wrapped().eval()):
        found = census(model, {"x": torch.randn(2, 6, 8)})
        assert [(a.kind, a.module) for a in found.attentions] == [("sdpa", "attention")]


def test_two_products_of_one_softmax_are_one_attention() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x + weights @ (2 * x)

    assert len(counted(function).attentions) == 1


def test_an_attention_in_a_loop_counts_as_often_as_it_runs() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = plain(x, w)
        return x

    assert len(counted(function).attentions) == 3


def pointwise_sum(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).softmax(-1) * x).sum(-1)


def routing(x: Tensor, w: Tensor) -> Tensor:
    weights, experts = F.linear(x, w).softmax(-1).topk(2, -1)
    return x * weights.sum(-1, keepdim=True) + experts.sum()


def projected_probabilities(x: Tensor, w: Tensor) -> Tensor:
    return F.linear((x @ w).softmax(-1), w)


def mean_of_bins(x: Tensor, w: Tensor) -> Tensor:
    bins = torch.cat([-w[0, :1].abs() * 2, torch.zeros_like(w[0, :1]), torch.arange(6.0)])
    return F.linear(x.softmax(-1), bins)


def sinkhorn(x: Tensor, w: Tensor) -> Tensor:
    mixing = (x @ x.mT).softmax(-1)
    mixing = mixing / (mixing.sum(-2, keepdim=True) + 1e-6)
    return mixing @ x


def no_softmax(x: Tensor, w: Tensor) -> Tensor:
    return (x @ x.mT).sigmoid() @ x


NO_KEYS = [pointwise_sum, routing, projected_probabilities, mean_of_bins, sinkhorn, no_softmax]


@pytest.mark.parametrize("function", NO_KEYS)
def test_what_is_no_distribution_over_keys_does_not_count(function: Callable[..., Tensor]) -> None:
    found = counted(function)
    assert found.attentions == ()
    assert found.other_softmaxes == (function is not no_softmax)
    assert found.indexers == ()


def test_probabilities_that_are_normalised_again_along_the_keys_are_attention() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        weights = (x @ x.mT).softmax(-1)
        weights = weights * (weights > 0.1)
        return (weights / weights.sum(-1, keepdim=True)) @ x

    assert len(counted(function).attentions) == 1


def lightning(x: Tensor, w: Tensor) -> Tensor:
    scores = F.relu(x @ x.mT) * (x @ w)[..., :1]
    return x + scores.topk(3, -1).indices.sum()


def by_blocks(x: Tensor, w: Tensor) -> Tensor:
    scores = (x @ x.mT).view(2, 6, 3, 2).amax(-1)
    return x + scores.topk(2, -1).indices.sum()


def weighted_over_heads(x: Tensor, w: Tensor) -> Tensor:
    heads = x.view(2, 6, 2, 4)
    scores = torch.einsum("qhd,khd->qhk", heads[0], heads[1]).relu()
    scores = torch.matmul((x @ w)[0, :, None, :2], scores).squeeze(1)
    return x + scores.masked_fill(torch.ones(6, 6).triu(1) > 0, float("-inf")).topk(3, -1).indices.sum()


@pytest.mark.parametrize(
    ("function", "scores", "k", "relu"),
    [(lightning, (2, 6, 6), 3, True), (by_blocks, (2, 6, 3), 2, False), (weighted_over_heads, (6, 6), 3, True)],
)
def test_a_top_k_of_products_of_tokens_is_an_indexer(
    function: Callable[..., Tensor], scores: tuple[int, ...], k: int, relu: bool
) -> None:
    (indexer,) = counted(function).indexers
    assert (indexer.scores, indexer.k, indexer.relu) == (scores, k, relu)


def test_an_attention_whose_result_is_dropped_is_told_apart() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        x = x @ w
        plain(2 * x, w)
        fused(3 * x, w)
        return plain(x, w)

    assert [attention.used for attention in counted(function).attentions] == [False, False, True]


class Language(nn.Module):
    """Embeds tokens, attends once, and gives logits."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.embedding, self.masked = nn.Embedding(16, 8), masked

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=self.masked)
        return SimpleNamespace(logits=F.linear(x, self.embedding.weight))


@pytest.mark.parametrize("masked", [True, False])
def test_a_model_is_causal_if_no_position_depends_on_a_later_one(masked: bool) -> None:
    torch.manual_seed(0)
    assert is_causal(Language(masked), {"input_ids": torch.arange(12).reshape(2, 6)}) is masked


def test_the_module_that_computes_is_named() -> None:
    model = nn.Sequential(Toy(plain), nn.Sequential(Toy(plain)))
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    assert [a.module for a in census(model, {"x": torch.randn(2, 6, 8)}).attentions] == ["0", "1.0"]


def test_counting_leaves_the_result_and_the_interpreter_as_they_were() -> None:
    import sys

    model, x = Toy(plain), torch.randn(2, 6, 8)
    before, profile = model(x), sys.getprofile()
    census(model, {"x": x})
    assert torch.equal(model(x), before)
    assert sys.getprofile() is profile
    assert not torch.overrides._get_current_function_mode_stack()
