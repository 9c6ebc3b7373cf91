"""The rules know no model: attention is found however it is written, what only looks like it is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram

import kreg
from kreg.rewriters import program as programs
from kreg.rewriters.capture import export_model
from kreg.rewriters.facts import op_nodes
from kreg.rewriters.find import find
from kreg.rewriters.report import Report
from kreg.rewriters.verify import verify
from tests.models import DECODERS, VOCAB, tokens

B, H, S, D = 2, 4, 12, 8
INF = float("-inf")
MIN = torch.finfo(torch.float32).min


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def qkv(heads: int = H, kv_heads: int = H, queries: int = S, keys: int = S) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, [batch, heads, length, dim]."""
    return (
        draw(B, heads, queries, D),
        draw(B, kv_heads, keys, D, seed=1),
        draw(B, kv_heads, keys, D, seed=2),
    )


def causal(length: int) -> torch.Tensor:
    return torch.tril(torch.ones(length, length, dtype=torch.bool))


class Wrapped(nn.Module):
    """A function as a module, with sinks for those that want them."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.sinks = nn.Parameter(draw(H, seed=9))

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(self, *args)


def rewritten(module: nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> tuple[ExportedProgram, Report]:
    """The program, and the report also where nothing was replaced."""
    report = kreg.analyse(module, inputs, **options)
    return kreg.export(module, inputs, **options), report


def assert_same(module: nn.Module, program: ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> None:
    """Equal outputs and input gradients."""
    results = []
    for run in (module, program.module()):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = run(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True) if out.requires_grad else ()
        results.append((out.detach(), *gradients))
    for want, got in zip(*results, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=5e-6)


# ── attention, written in many ways ─────────────────────────────────────────────────────────────────────


def matmul(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    return torch.matmul(F.softmax(scores.masked_fill(~causal(q.shape[2]), INF), dim=-1), v)


def flattened_bmm(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """nn.MultiheadAttention's: batch and heads in one dimension, queries scaled before the product."""
    q, k, v = ((x.reshape(B * H, -1, D)) for x in (q * D**-0.5, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v).view(B, H, -1, D)


def added_by_baddbmm(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    bias = torch.zeros(q.shape[1], q.shape[1]).masked_fill(~causal(q.shape[1]), MIN).expand(B * H, -1, -1)
    return torch.bmm(torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.3), -1), v).view(B, H, -1, D)


def einsum(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Heads last but one, as JAX code has them."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k * 0.25).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def transposed_product(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys times queries, then the other way round."""
    scores = (k @ q.mT).mT * 0.5
    return (v.mT @ scores.softmax(-1).mT).mT


def grouped_by_repeat(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (q @ k.mT * 0.3).softmax(-1) @ v


def grouped_by_expand(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(B, -1, S, D) for x in (k, v))
    return (q @ k.mT * 0.3).softmax(-1) @ v


def tiled_heads(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Query head h reads kv head h modulo their number: the query heads take another order."""
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    return (q @ k.mT * 0.3).softmax(-1) @ v


def soft_capped(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0
    return (scores + torch.triu(torch.full((S, S), INF), 1)).softmax(-1) @ v


def sink_behind(m: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~causal(S), MIN)
    logits = torch.cat([scores, m.sinks.view(1, -1, 1, 1).expand(B, -1, S, 1)], dim=-1)
    return logits.softmax(-1)[..., :-1] @ v


def sink_in_front(m: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.3
    logits = torch.cat([m.sinks[None, :, None, None].expand(B, -1, S, 1), scores], dim=-1)
    logits = logits - logits.amax(-1, keepdim=True)
    return logits.softmax(-1)[..., 1:] @ v


def window_by_two_compares(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(S).unsqueeze(1), torch.arange(S)
    keep = torch.logical_and(j <= i, i - j < 5)
    return torch.where(keep, q @ k.mT * 0.3, INF).softmax(-1) @ v


def one_minus_mask(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    keep = torch.tril(torch.ones(S, S))
    return (q @ k.mT * 0.3 + (1.0 - keep) * -1e9).softmax(-1) @ v


def relative_bias(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT + table[:, :S, :S]).softmax(-1) @ v


def boolean_input(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).masked_fill(~m[:, None, None, :S], INF).softmax(-1) @ v


def in_higher_precision(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~causal(S), MIN)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def chunked_decode(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last queries of a longer sequence of keys."""
    position = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    keep = torch.arange(k.shape[2]) <= position[:, None]
    return (q @ k.mT * 0.3).masked_fill(~keep, INF).softmax(-1) @ v


def no_key_for_the_first_query(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Strictly causal with a finite fill: the first query has uniform weights."""
    return (q @ k.mT * 0.3).masked_fill(~torch.tril(torch.ones(S, S, dtype=torch.bool), -1), MIN).softmax(-1) @ v


def scaled_by_the_data(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * q.abs().mean(-1, keepdim=True)).softmax(-1) @ v


TABLE = draw(H, 20, 20, seed=7)
PADDING = torch.ones(B, 20, dtype=torch.bool)
PADDING[1, :3] = False


@dataclass(frozen=True)
class Case:
    """A way to write attention, its inputs, and what must be proven about it."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...] = field(default_factory=qkv)
    kind: str = "full"
    attributes: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)


ATTENTIONS = (
    Case(matmul, kind="causal", attributes={"causal": True}),
    Case(flattened_bmm),
    Case(added_by_baddbmm, kind="causal", attributes={"scale": 0.3}),
    Case(einsum, attributes={"scale": 0.25}),
    Case(transposed_product, attributes={"scale": 0.5}),
    Case(grouped_by_repeat, qkv(H, 2), dims={"kv_heads": 2}),
    Case(grouped_by_expand, qkv(H, 2), dims={"kv_heads": 2}),
    Case(grouped_by_expand, qkv(H, 1), dims={"kv_heads": 1}),
    Case(tiled_heads, qkv(H, 2), dims={"kv_heads": 2}),
    Case(soft_capped, kind="causal", attributes={"softcap": 5.0, "scale": 0.3}),
    Case(sink_behind, kind="causal"),
    Case(sink_in_front),
    Case(window_by_two_compares, kind="sliding", attributes={"window": 5, "causal": True}),
    Case(one_minus_mask, kind="causal"),
    Case(relative_bias, (*qkv(), TABLE), kind="input"),
    Case(boolean_input, (*qkv(), PADDING), kind="padding", attributes={"empty": "nan"}),
    Case(in_higher_precision, kind="causal"),
    Case(no_key_for_the_first_query, kind="causal", attributes={"offset": -1, "empty": "uniform"}),
    Case(scaled_by_the_data),
    Case(chunked_decode, qkv(queries=3, keys=S), kind="causal", attributes={"offset": S - 3}),
)


@pytest.mark.parametrize("case", ATTENTIONS, ids=lambda c: f"{c.function.__name__}-{c.inputs[1].shape[1]}")
def test_attention_is_raised_however_it_is_written(case: Case) -> None:
    module = Wrapped(case.function)
    program, report = rewritten(module, case.inputs)
    (site,) = report.sites
    assert (site.op, site.status) == ("attention", "replaced"), site.reason
    assert site.verify is not None and site.verify.passed
    assert site.mask is not None and site.mask["kind"] == case.kind
    assert {name: site.dims[name] for name in case.dims} == case.dims
    ((node, op),) = op_nodes(program.graph)
    attributes = op.defaults | node.kwargs
    for name, value in case.attributes.items():
        assert attributes[name] == pytest.approx(value), name
    assert not any("softmax" in str(n.target) for n in program.graph.nodes)
    assert_same(module, program, case.inputs)


# ── what is shared by keys and values ───────────────────────────────────────────────────────────────────

ENTRIES = 3


def ready(ratio: int) -> torch.Tensor:
    """Entries by their last position."""
    return torch.arange(S // ratio) * ratio + (ratio - 1) <= torch.arange(S)[:, None]


def shared_keys_in_a_window(m: Wrapped, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """No head dimension on the keys at all, contracted by einsum."""
    i, j = torch.arange(S)[:, None], torch.arange(S)
    scores = torch.einsum("bhsd,btd->bhst", q, kv) * 0.3
    scores = scores.masked_fill((j > i) | (j <= i - 4), INF)
    logits = torch.cat([m.sinks.view(1, -1, 1, 1).expand(B, -1, S, 1), scores], dim=-1)
    return torch.einsum("bhst,btd->bhsd", logits.softmax(-1)[..., 1:], kv)


def window_and_entries(m: Wrapped, q: torch.Tensor, kv: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """One boolean mask over both, filled at once; heads by broadcasting."""
    i, j = torch.arange(S)[:, None], torch.arange(S)
    keep = torch.cat([(j <= i) & (i - j < 4), ready(4)], dim=-1)
    keys = torch.cat([kv, entries], dim=1)[:, None]
    scores = torch.where(keep, (q * 0.3) @ keys.mT, MIN)
    logits = torch.cat([scores, m.sinks.view(1, -1, 1, 1).expand(B, -1, S, 1)], dim=-1)
    return logits.softmax(-1)[..., : keys.shape[2]] @ keys


SHARED: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "window": (shared_keys_in_a_window, (qkv()[0], draw(B, S, D)), {"kind": "sliding", "window": 4}),
    "window and entries": (
        window_and_entries,
        (qkv()[0], draw(B, S, D), draw(B, ENTRIES, D)),
        {"kind": "sliding+block-causal", "window": 4, "ratio": 4},
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_keys_that_are_the_values_are_sparse_attention_however_it_is_written(name: str) -> None:
    function, inputs, mask = SHARED[name]
    module = Wrapped(function)
    program, report = rewritten(module, inputs)
    (site,) = report.sites
    assert (site.op, site.status, site.mask) == ("sparse_attention", "replaced", mask), site.reason
    assert_same(module, program, inputs)


class Indexed(nn.Module):
    """An indexer scored by one product with the weights; picks scattered into a mask of booleans."""

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        entries: torch.Tensor,
        iq: torch.Tensor,
        ik: torch.Tensor,
        w: torch.Tensor,
    ) -> torch.Tensor:
        count = entries.shape[1]
        rectified = torch.relu(torch.einsum("bshd,bjd->bshj", iq, ik))
        scores = torch.matmul(w.unsqueeze(2), rectified).squeeze(2)
        future = ~ready(2)
        picks = scores.masked_fill(future, INF).topk(3, dim=-1)[1]
        position = torch.arange(S)[:, None]
        picks = picks.masked_fill((picks + 1) * 2 > position + 1, -1)
        slots = torch.where(picks < 0, count, picks)
        seen = torch.zeros(B, S, count + 1, dtype=torch.bool).scatter(-1, slots, True)[..., :count]
        i, j = torch.arange(S)[:, None], torch.arange(S)
        window = ((j <= i) & (j > i - 4)).expand(B, -1, -1)
        keep = torch.cat([window, seen], dim=-1)[:, None]
        keys = torch.cat([kv, entries], dim=1)[:, None]
        return torch.where(keep, q @ keys.mT * 0.3, INF).softmax(-1) @ keys


def test_an_indexer_written_otherwise_is_raised_and_feeds_the_attention() -> None:
    count = S // 2
    inputs = (
        *(qkv()[0], draw(B, S, D), draw(B, count, D)),
        *(draw(B, S, 5, D, seed=3), draw(B, count, D, seed=4), draw(B, S, 5, seed=5)),
    )
    program, report = rewritten(Indexed(), inputs)
    assert [(site.op, site.status) for site in report.sites] == [
        ("lightning_indexer", "replaced"),
        ("sparse_attention", "replaced"),
    ], [site.reason for site in report.sites] + [miss.reason for miss in report.near_misses]
    assert report.sites[1].mask == {
        "kind": "sliding+top-k",
        "window": 4,
        "selected": "lightning_indexer",
        "ratio": 2,
    }
    assert_same(Indexed(), program, inputs)


# ── near misses ─────────────────────────────────────────────────────────────────────────────────────────


def wrong_dimension(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).softmax(-2) @ v


def masked_afterwards(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.mT * 0.3).softmax(-1) * causal(S)) @ v


def weights_used_twice(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * 0.3).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def talking_heads(m: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mixing = torch.outer(m.sinks, m.sinks)
    return torch.einsum("bhst,hg->bgst", (q @ k.mT * 0.3), mixing).softmax(-1) @ v


def heads_mixed_afterwards(m: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mixing = torch.outer(m.sinks, m.sinks)
    return torch.einsum("bhst,hg->bgst", (q @ k.mT * 0.3).softmax(-1), mixing) @ v


def renormalised(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.mT * 0.3).softmax(-1)
    return (weights / (weights.amax(-1, keepdim=True) + 1)) @ v


def dropped_out(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.4, training=True) @ v


def two_softmaxes(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Differential attention."""
    return ((q @ k.mT).softmax(-1) - 0.5 * (k @ q.mT).softmax(-1)) @ v


def sink_shifted_otherwise(m: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.3
    scores = scores - scores.amax(-1, keepdim=True)
    logits = torch.cat([scores, m.sinks.view(1, -1, 1, 1).expand(B, -1, S, 1)], dim=-1)
    return logits.softmax(-1)[..., :-1] @ v


def fills_with_a_small_number(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).masked_fill(~causal(S), -5.0).softmax(-1) @ v


NEAR_MISSES: dict[Callable[..., torch.Tensor], str] = {
    wrong_dimension: "softmax does not run over the keys",
    masked_afterwards: "masked after the softmax",
    weights_used_twice: "used more than once",
    talking_heads: "neither queries nor values have",
    heads_mixed_afterwards: "",
    renormalised: "more than a product",
    dropped_out: "dropout is on",
    two_softmaxes: "",
    sink_shifted_otherwise: "shifted",
    fills_with_a_small_number: "scores",
}


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_what_only_looks_like_attention_is_left_alone_with_a_reason(
    function: Callable[..., torch.Tensor],
) -> None:
    """Also without verification: the proof alone must refuse."""
    module = Wrapped(function)
    program, report = rewritten(module, qkv(), verify=False)
    assert not list(op_nodes(program.graph)) and not report.sites
    assert report.near_misses
    for miss in report.near_misses:
        assert NEAR_MISSES[function] in miss.reason
        assert "rule itself failed" not in miss.reason
        assert len(miss.reason.split()) > 4 and "(test_generic.py:" in miss.reason, "words, and the line of code"
    results = []
    for run in (module, program.module()):
        torch.manual_seed(0)
        results.append(run(*qkv()))
    assert torch.equal(*results)


def keys_detached(_: Wrapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.detach().mT * 0.3).softmax(-1) @ v


def test_a_gradient_that_was_stopped_stays_stopped() -> None:
    module = Wrapped(keys_detached)
    program, report = rewritten(module, qkv(), verify=False)
    assert [site.status for site in report.sites] == ["replaced"]
    assert_same(module, program, qkv())


# ── real models ─────────────────────────────────────────────────────────────────────────────────────────

KINDS = {
    "llama": ["causal", "causal"],
    "qwen3": ["causal", "causal"],
    "gemma2": ["sliding", "causal"],
    "gemma3": ["sliding", "causal"],
    "gpt_oss": ["sliding", "causal"],
    "mistral": ["sliding", "sliding"],
    "phi3": ["causal", "causal"],
    "gpt2": ["causal", "causal"],
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_attention_of_a_real_model_is_raised_and_verified(name: str) -> None:
    model = DECODERS[name]()
    ids = tokens(B, 13)
    program = kreg.export(model, {"input_ids": ids})
    report = kreg.program_report(program)
    assert report is not None
    sites = [site for site in report.sites if site.op == "attention"]
    assert [site.mask["kind"] for site in sites if site.mask] == KINDS[name]
    for site in sites:
        assert site.status == "replaced", site.reason
        assert site.verify is not None and site.verify.passed and site.verify.max_grad_error is not None
    assert len({site.module for site in sites}) == 2
    want, got = model(ids).logits, program.module()(input_ids=ids).logits
    assert want.shape == (B, 13, VOCAB)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_with_a_padding_mask_real_models_are_raised_and_equal(name: str) -> None:
    model = DECODERS[name]()
    mask = torch.ones(B, 13, dtype=torch.int64)
    mask[0, :5], mask[1, 9:] = 0, 0
    inputs = {"input_ids": tokens(B, 13), "attention_mask": mask}
    program = kreg.export(model, inputs)
    report = kreg.program_report(program)
    assert report is not None
    assert [site.status for site in report.sites if site.op == "attention"] == ["replaced", "replaced"]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=2e-5)


def test_the_gradient_of_every_tensor_that_an_operand_is_made_of_is_compared() -> None:
    class TwoBiases(nn.Module):
        def forward(self, q, k, v, a, b):
            return (q @ k.mT * 0.3 + a + b).softmax(-1) @ v

    inputs = [t.requires_grad_() for t in (*qkv(), torch.randn(S, S), torch.randn(S, S))]
    captured = programs.functional(export_model(TwoBiases(), tuple(inputs))).module
    (site,) = find(captured.graph).sites
    bias = site.operands["bias"]
    ((_, (other,)),) = (call for call in bias.calls if call[0] is torch.ops.aten.add.Tensor)
    stopped = replace(bias, calls=((torch.ops.aten.add.Tensor, (other.then(torch.ops.aten.detach.default),)),))
    for operand, holds in ((bias, True), (stopped, False)):
        outcome = verify(captured, replace(site, operands={**site.operands, "bias": operand}), "", trains=True)
        assert outcome.result is not None
        assert outcome.result.passed is holds, outcome.reason
