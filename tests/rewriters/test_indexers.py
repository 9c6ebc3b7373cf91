"""Indexers and the attention that reads their selection: raised in every model that has them, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import kreg
from kreg.rewriters.report import Report
from tests.indexed_models import MODELS, indexed_model

LIGHTNING, BLOCKS, SELECTED = "lightning_indexer", "block_indexer", "selected_attention"
INDEXED = (LIGHTNING, BLOCKS, SELECTED)
SITES = {
    "axk2": {LIGHTNING: [0, 1], SELECTED: [0, 1]},
    "deepseek_v32": {LIGHTNING: [0, 1], SELECTED: [0, 1]},
    "dots3_note": {LIGHTNING: [0, 2], SELECTED: [0, 2]},
    "glm5_next": {LIGHTNING: [1], SELECTED: [1, 2]},
    "glm_moe_dsa": {LIGHTNING: [0, 2], SELECTED: [0, 1, 2]},
    "hy_v4": {LIGHTNING: [0, 2], SELECTED: [0, 1, 2]},
    "minimax_m3": {BLOCKS: [1, 2], SELECTED: [1, 2]},
    "mistral_large4": {LIGHTNING: [0, 2, 3], SELECTED: [0, 1, 2, 3]},
}
"""The layers in which each op is found. A layer without an indexer of its own reads that of a layer before it."""


def run(module: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The first result where there is a token, and every parameter's gradient under one random weighting of it.

    What queries without keys pass on is another matter: PyTorch's fused attention gets that wrong, under a mask of
    large finite numbers.
    """
    out = module(**inputs)[0]
    if "attention_mask" in inputs:
        out = out[inputs["attention_mask"] != 0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
    return out.detach(), dict(zip(names, found, strict=True))


def layers(report: Report) -> dict[str, list[int]]:
    """The layers of each indexed op's sites, all of them replaced and verified."""
    found: dict[str, list[int]] = {}
    for site in report.sites:
        if site.op in INDEXED:
            assert site.status == "replaced", f"{site.op} of {site.module}: {site.reason}"
            assert site.verify is not None and site.verify.passed
            (layer,) = (int(part) for part in site.module.split(".") if part.isdigit())
            found.setdefault(site.op, []).append(layer)
    return found


def check(name: str, kinds: set[str], padding: str = "", attention: str = "eager", dynamic: bool = False) -> None:
    """Every indexer and indexed attention of a model is raised, and results and gradients are the model's."""
    model, inputs = indexed_model(name, padding, attention)
    program = kreg.export(model, inputs, dynamic_shapes="auto" if dynamic else None)
    report = kreg.program_report(program)
    assert report is not None
    assert layers(report) == SITES[name]
    assert {site.mask["kind"] for site in report.sites if site.op == SELECTED and site.mask} == kinds
    want, got = run(model, inputs), run(program.module(), inputs)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    for parameter, gradient in want[1].items():
        mine = got[1][parameter]
        if gradient is None:
            assert mine is None or not mine.any(), parameter
        else:
            assert mine is not None, parameter
            scale = max(1.0, float(gradient.abs().max()))
            assert float((mine - gradient).abs().max()) < 1e-4 * scale, parameter


def kinds(name: str, padding: str) -> set[str]:
    """The kinds of mask of a model's indexed attention. The selection of glm5_next holds all of its mask."""
    return {"top-k" if name == "glm5_next" else "causal+top-k+padding" if padding else "causal+top-k"}


@pytest.mark.parametrize("name", MODELS)
def test_every_indexer_and_indexed_attention_is_raised_and_the_model_computes_what_it_did(name: str) -> None:
    check(name, kinds(name, ""))


@pytest.mark.parametrize(
    ("name", "padding", "attention"),
    [("deepseek_v32", "left", "eager"), ("minimax_m3", "right", "sdpa")],
)
def test_padding_stays_an_input_and_the_fused_operator_is_read_too(name: str, padding: str, attention: str) -> None:
    check(name, kinds(name, padding), padding, attention)


def test_sizes_may_be_dynamic() -> None:
    check("deepseek_v32", kinds("deepseek_v32", "left"), "left", "sdpa", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_every_model(name: str, dynamic: bool, padding: str, attention: str) -> None:
    if attention == "sdpa" and not MODELS[name]()._supports_sdpa:
        pytest.skip("the model has no such form")
    check(name, kinds(name, padding), padding, attention, dynamic)


# ── written by hand ─────────────────────────────────────────────────────────────────────────────────────

B, H, S, D, K = 2, 2, 20, 8, 5
LOWEST = torch.finfo(torch.float32).min
Tensors = dict[str, torch.Tensor]


def causal(diagonal: int = 0) -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril(diagonal)


def scores(t: Tensors) -> torch.Tensor:
    rectified = (t["iq"] @ t["ik"].mT.unsqueeze(1)).relu()
    return (t["w"].unsqueeze(2) @ rectified.transpose(1, 2)).squeeze(2).masked_fill(~causal(), LOWEST)


def named(picks: torch.Tensor) -> torch.Tensor:
    return torch.zeros(B, S, S, dtype=torch.bool).scatter(-1, picks, True)


def attend(t: Tensors, keep: torch.Tensor) -> torch.Tensor:
    logits = t["q"] @ t["k"].mT * 0.3
    return (logits + torch.where(keep, 0.0, LOWEST).unsqueeze(1)).softmax(-1) @ t["v"]


def plain(t: Tensors) -> torch.Tensor:
    return attend(t, named(scores(t).topk(K).indices) & causal())


def nothing_masked_afterwards(t: Tensors) -> torch.Tensor:
    return attend(t, named(scores(t).topk(K).indices))


def masked_otherwise_afterwards(t: Tensors) -> torch.Tensor:
    return attend(t, named(scores(t).topk(K).indices) & causal(3))


def the_first_few(t: Tensors) -> torch.Tensor:
    return attend(t, named(scores(t).topk(K).indices[..., :3]) & causal())


def by_place(t: Tensors) -> torch.Tensor:
    picks = scores(t).topk(K).indices
    return attend(t, named(torch.where(torch.arange(K) < 3, picks, 0)) & causal())


def the_next_key(t: Tensors) -> torch.Tensor:
    return attend(t, named((scores(t).topk(K).indices + 1) % S) & causal())


def picks_leave(t: Tensors) -> torch.Tensor:
    picks = scores(t).topk(K).indices
    return attend(t, named(picks) & causal()) + picks.sum()


def picks_are_gathered_by(t: Tensors) -> torch.Tensor:
    picks = scores(t).topk(K).indices
    own = t["v"][:, 0].unsqueeze(1).expand(-1, S, -1, -1).gather(2, picks.unsqueeze(-1).expand(-1, -1, -1, D))
    return attend(t, named(picks) & causal()) + own[:, :, 0].unsqueeze(1)


def scores_are_used(t: Tensors) -> torch.Tensor:
    best = scores(t).topk(K)
    return attend(t, named(best.indices) & causal()) + best.values.clamp(min=-1.0).sum()


def twice(t: Tensors) -> torch.Tensor:
    picks = scores(t).topk(K).indices
    return attend(t, named(torch.cat([picks, picks[..., :2]], -1)) & causal())


def of_another_layer(t: Tensors) -> torch.Tensor:
    picks = scores(t).topk(K).indices
    other = scores({**t, "ik": t["ik"].flip(1)}).topk(K).indices
    return attend(t, named(picks) & causal()) + attend({**t, "k": t["v"]}, named(other) & causal())


def shared_by_two_layers(t: Tensors) -> torch.Tensor:
    picks = scores(t).topk(K).indices
    return attend(t, named(picks) & causal()) + attend({**t, "k": t["v"]}, named(picks) & causal())


def two_selections(t: Tensors) -> torch.Tensor:
    return attend(t, named(scores(t).topk(K).indices) & causal() & named(t["given"]))


def given(t: Tensors) -> torch.Tensor:
    return attend(t, named(t["given"]))


def counted(t: Tensors) -> torch.Tensor:
    inside = (t["given"] >= 0) & (t["given"] < S)
    count = torch.zeros(B, S, S, dtype=torch.int32).scatter_add(-1, t["given"].clamp(0, S - 1), inside.int())
    return attend(t, count != 0)


def more_than_once(t: Tensors) -> torch.Tensor:
    count = torch.zeros(B, S, S, dtype=torch.int32).scatter_add(-1, t["given"], torch.ones(B, S, 7, dtype=torch.int32))
    return attend(t, count > 1)


def weighted_by_count(t: Tensors) -> torch.Tensor:
    count = torch.zeros(B, S, S).scatter_add(-1, t["given"], torch.ones(B, S, 7))
    return attend(t, causal().expand(B, -1, -1)) + (t["q"] @ t["k"].mT + count.unsqueeze(1)).softmax(-1) @ t["v"]


def in_blocks(t: Tensors) -> torch.Tensor:
    blocks = torch.zeros(B, S, S // 4, dtype=torch.bool).scatter(-1, t["given"] // 4, True)
    return attend(t, blocks.repeat_interleave(4, -1) & causal())


def with_a_bias(t: Tensors) -> torch.Tensor:
    logits = t["q"] @ t["k"].mT + t["bias"]
    return (logits + torch.where(named(t["given"]), 0.0, LOWEST).unsqueeze(1)).softmax(-1) @ t["v"]


Pooled = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LONGEST = 9
"""Indices that a query may have: those of 4 pools of 2 keys, and of one key that has no pool yet."""


def by_pools(
    t: Tensors,
    joined: Pooled,
    ready_for: Pooled | None = None,
    ends_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention to pools of two neighbouring keys, counted from the first that is no padding, and to the tail.

    Args:
        joined: the indices of the selected pools' keys and of the tail, as one tensor.
        ready_for: whether the selected pools are ready, from the pools' readiness and the picks.
        ends_of: the last positions of the pools, as the scores' mask has them.
    """
    valid, row = t["valid"], torch.arange(B)[:, None, None]
    first = valid.int().argmax(-1)
    places = first[:, None, None] + torch.arange(S).view(1, -1, 2)
    safe = places.clamp(0, S - 1)
    complete = (valid[row, safe] & (places < S)).all(-1)
    some = complete.any(0)  # how many is known only when it runs
    keys, places, complete = t["ik"][row, safe].mean(2)[:, some], places[:, some], complete[:, some]
    visible = causal() & valid.unsqueeze(1)
    ends = places[..., -1].clamp(0, S - 1)
    ends = ends if ends_of is None else ends_of(ends)
    ready = visible.gather(-1, ends.unsqueeze(1).expand(-1, S, -1)) & complete.unsqueeze(1)
    rectified = (t["iq"] @ keys.mT.unsqueeze(1)).relu()
    best = (t["w"].unsqueeze(2) @ rectified.transpose(1, 2)).squeeze(2).masked_fill(~ready, LOWEST)
    picks = best.topk(min(4, best.shape[-1])).indices
    chosen = ready.gather(-1, picks) if ready_for is None else ready_for(ready, picks)
    own = places[row, picks]
    own = own.flatten(-2).masked_fill(~chosen.unsqueeze(-1).expand_as(own).flatten(-2), -1)
    count = visible.long().sum(-1)
    tail = (first.unsqueeze(1) + count - count % 2).masked_fill(count % 2 == 0, -1).unsqueeze(-1)
    indices = joined(own, tail).int()
    named = (indices >= 0) & (indices < S)
    found = torch.zeros(B, S, S, dtype=torch.int32).scatter_add(-1, indices.clamp(0, S - 1), named.int())
    return attend(t, found != 0)


def filled(indices: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(indices, (0, LONGEST - indices.shape[-1]), value=-1)


def then_the_tail(own: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    return filled(torch.cat([own, tail], -1))


def pooled(t: Tensors) -> torch.Tensor:
    return by_pools(t, then_the_tail)


def pooled_behind_the_tail(t: Tensors) -> torch.Tensor:
    return by_pools(t, lambda own, tail: filled(torch.cat([tail, own], -1)))


def pooled_with_the_ends_of_another_row(t: Tensors) -> torch.Tensor:
    return by_pools(t, then_the_tail, ends_of=lambda ends: ends.flip(0))


def pooled_and_ready_in_another_row(t: Tensors) -> torch.Tensor:
    return by_pools(t, then_the_tail, ready_for=lambda ready, picks: ready.flip(0).gather(-1, picks))


def pooled_and_always_ready(t: Tensors) -> torch.Tensor:
    return by_pools(t, then_the_tail, ready_for=lambda ready, picks: picks >= 0)


def the_best_pools_alone(t: Tensors) -> torch.Tensor:
    return by_pools(t, lambda own, tail: then_the_tail(own, tail).masked_fill(torch.arange(LONGEST) > 2, -1))


def each_pool_moved_by_its_place(t: Tensors) -> torch.Tensor:
    return by_pools(t, lambda own, tail: (then_the_tail(own, tail) + torch.arange(LONGEST) // 2).clamp(max=S - 1))


BOTH = {LIGHTNING: 1, SELECTED: 1}
WRITTEN: dict[Callable[[Tensors], torch.Tensor], dict[str, int]] = {
    plain: BOTH,
    shared_by_two_layers: {LIGHTNING: 1, SELECTED: 2},
    of_another_layer: {LIGHTNING: 2, SELECTED: 2},
    nothing_masked_afterwards: {SELECTED: 1},
    masked_otherwise_afterwards: {SELECTED: 1},
    the_first_few: {SELECTED: 1},
    by_place: {SELECTED: 1},
    the_next_key: {SELECTED: 1},
    picks_leave: {SELECTED: 1},
    picks_are_gathered_by: {SELECTED: 1},
    scores_are_used: {SELECTED: 1},
    twice: {SELECTED: 1},
    two_selections: {LIGHTNING: 1},
    given: {SELECTED: 1},
    counted: {SELECTED: 1},
    more_than_once: {},
    weighted_by_count: {},
    in_blocks: {SELECTED: 1},
    pooled: BOTH,
    pooled_behind_the_tail: BOTH,
    pooled_with_the_ends_of_another_row: BOTH,
    pooled_and_ready_in_another_row: {SELECTED: 1},
    pooled_and_always_ready: {SELECTED: 1},
    the_best_pools_alone: {SELECTED: 1},
    each_pool_moved_by_its_place: {SELECTED: 1},
    with_a_bias: {},
}
"""How often each op is raised. What reads more of the picks than their set keeps its top-k."""


class Written(nn.Module):
    """A function of tensors by name."""

    def __init__(self, function: Callable[[Tensors], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensors) -> torch.Tensor:
        return self.function(t)


@cache
def tensors() -> Tensors:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return {
        **{name: draw(B, H, S, D) for name in "qkv"},
        "iq": draw(B, 3, S, D),
        "ik": draw(B, S, D),
        "w": draw(B, S, 3).abs(),
        "bias": draw(B, 1, S, S),
        "given": torch.randint(0, S, (B, S, 7), generator=g),
        "valid": torch.arange(S) >= torch.tensor([[0], [3]]),  # the second row is padded on the left
    }


def results(module: nn.Module, tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
    """The output and the gradients of the inputs."""
    leaves = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    out = module(leaves)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)


def exported(function: Callable[[Tensors], torch.Tensor]) -> tuple[nn.Module, ExportedProgram, Report]:
    module = Written(function)
    return module, kreg.export(module, (tensors(),)), kreg.analyse(module, (tensors(),))


@pytest.mark.parametrize("function", WRITTEN, ids=lambda function: function.__name__)
def test_what_is_raised_is_a_set_of_keys_and_every_result_stays(function: Callable[[Tensors], torch.Tensor]) -> None:
    module, program, report = exported(function)
    found = [site.op for site in report.sites if site.op in INDEXED]
    assert all(site.status == "replaced" for site in report.sites), [site.reason for site in report.sites]
    assert {op: found.count(op) for op in found} == WRITTEN[function], [miss.reason for miss in report.near_misses]
    for want, got in zip(results(module, tensors()), results(program.module(), tensors()), strict=True):
        if want is None or got is None:
            assert all(x is None or not x.any() for x in (want, got))
        else:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


def test_an_indexer_whose_picks_tell_more_than_a_set_says_what() -> None:
    reasons = {
        function: next(miss.reason for miss in exported(function)[2].near_misses if miss.op == LIGHTNING)
        for function in (
            nothing_masked_afterwards,
            pooled_and_ready_in_another_row,
            the_first_few,
            picks_leave,
            the_best_pools_alone,
        )
    }
    assert "the choice among those not ready" in reasons[nothing_masked_afterwards]
    assert "the choice among those not ready" in reasons[pooled_and_ready_in_another_row]
    assert "the order of the selected places matters" in reasons[the_first_few]
    assert "the order of the selected places matters" in reasons[the_best_pools_alone]
    assert "the order of the selected places matters" in reasons[picks_leave]
