"""DeepSeek-V4, one layer of each type: every site raised, and forward and gradients as in eager.

Eager in float64 is the judge: kreg may be off by twice what eager in the same dtype is off by, plus the op's
tolerance. One run of eager may be close by luck, where a gradient is few numbers or terms cancel: eager also
runs with weights changed in their last bit, and the worst of these runs counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

import kreg
from kreg.registry.ops import SPARSE_ATTENTION
from kreg.rewriters.facts import op_nodes
from kreg.rewriters.graph import is_tensor
from kreg.rewriters.report import Report
from tests.models import CSA, CSA_RATIO, HCA, HCA_RATIO, LAYERS, SLIDING, TOPK, WINDOW, deepseek_v4, tokens

Tensors = Mapping[str, torch.Tensor]
S, BATCH = 45, 2
MASKS = {SLIDING: "sliding", CSA: "sliding+top-k", HCA: "sliding+block-causal"}
SLACK = 2.0
ATTENTION = ("sparse_attention", "lightning_indexer", "attention")


@dataclass(frozen=True)
class Exported:
    """A model, its program, and the report."""

    model: nn.Module
    program: ExportedProgram
    report: Report


@cache
def exported(
    layers: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    batch: int = BATCH,
    length: int = S,
    padded: bool = False,
    dynamic: bool = False,
    **overrides: Any,
) -> Exported:
    """The program for a tiny DeepSeek-V4."""
    model = deepseek_v4(layers, dtype, **overrides)
    inputs: dict[str, Any] = {"input_ids": tokens(batch, length)}
    if padded:
        inputs["attention_mask"] = paddings(batch, length)
    program = kreg.export(model, inputs, dynamic_shapes="auto" if dynamic else None)
    report = kreg.program_report(program)
    assert report is not None, "nothing was raised"
    return Exported(model, program, report)


def paddings(batch: int, length: int) -> torch.Tensor:
    """Left, right, all but one key, in turn."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        match row % 3:
            case 0:
                mask[row, : length // 3] = 0
            case 1:
                mask[row, length - length // 4 :] = 0
            case 2:
                mask[row] = 0
                mask[row, length // 2] = 1
    return mask


class InDouble(TorchFunctionMode):
    """Runs code that asks for float32 in float64, so that a model in float64 is float64 throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return func.__self__.double() if not args else args[0].double()
        swapped = torch.utils._pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs))
        return func(*swapped[0], **swapped[1])


def run(module: nn.Module, inputs: Tensors, gradients: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every parameter under one fixed, random weighting of the logits."""
    with torch.set_grad_enabled(gradients):
        logits = module(**inputs).logits
    if not gradients:
        return logits, {}
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((logits.double() * weights).sum(), list(parameters.values()), allow_unused=True)
    return logits.detach(), {
        name: torch.zeros_like(parameters[name]) if g is None else g for name, g in zip(parameters, found, strict=True)
    }


def last_bits_changed(model: nn.Module, seed: int) -> nn.Module:
    """The model with each weight off by up to one rounding of its dtype."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * noise)
    return changed


def assert_as_good_as_eager(it: Exported, inputs: Tensors, gradients: bool = True) -> None:
    """kreg's logits and gradients are no further from float64 than eager's, up to slack and tolerance."""
    dtype = next(it.model.parameters()).dtype
    tolerance = SPARSE_ATTENTION.tolerances[dtype]
    exact_model = copy.deepcopy(it.model).double()
    exact_model.config._experts_implementation = "eager"  # grouped matrix products know no float64
    with InDouble():
        judge = run(exact_model, inputs, gradients)
    eager = [run(it.model, inputs, gradients)]
    eager += [run(last_bits_changed(it.model, seed), inputs, gradients) for seed in range(3)]
    mine = run(it.program.module(), inputs, gradients)
    assert mine[1].keys() == judge[1].keys()
    for name, exact in {"logits": judge[0], **judge[1]}.items():
        got, *usual = (found[0] if name == "logits" else found[1][name] for found in (mine, *eager))
        assert got.dtype == dtype and got.shape == exact.shape
        error, *allowed = (float((x.double() - exact).abs().max()) for x in (got, *usual))
        limit = SLACK * max(allowed) + tolerance.atol + tolerance.rtol * float(exact.abs().max())
        assert error <= limit, f"{name}: {error:.3g} from float64, eager {allowed}"


def sites(report: Report) -> list[tuple[str, str, str]]:
    """(op, module, kind of mask) of each replaced and verified site."""
    found = []
    for site in report.sites:
        if site.op not in ATTENTION:
            continue
        assert site.status == "replaced", site.reason
        assert site.verify is not None and site.verify.passed
        assert site.mask is not None
        found.append((site.op, site.module, site.mask["kind"]))
    return found


def expected_sites(layers: Sequence[str], suffix: str = "") -> list[tuple[str, str, str]]:
    """One sparse attention a layer, one indexer a CSA layer."""
    indexers = [
        ("lightning_indexer", f"model.layers.{i}.self_attn.compressor.indexer", "block-causal")
        for i, layer in enumerate(layers)
        if layer == CSA
    ]
    attention = [
        ("sparse_attention", f"model.layers.{i}.self_attn", f"{MASKS[layer]}{suffix}") for i, layer in enumerate(layers)
    ]
    return indexers + attention


def assert_no_scores_left(program: ExportedProgram, length: int) -> None:
    """No value over queries and keys or entries, and nothing that selected or scattered."""
    entries = {s for s in (length // CSA_RATIO, length // HCA_RATIO) if s > TOPK}
    keys = {length + more for more in {0, *entries}} | {length + more + 1 for more in {0, *entries}}
    for node in program.graph.nodes:
        if not is_tensor(node):
            continue
        shape = list(node.meta["val"].shape)
        assert sum(s in keys for s in shape) < 2, f"{node} is over queries and keys: {shape}"
        assert not (length in shape and any(s in entries for s in shape)), f"{node}: {shape}"
        assert str(node.target).split(".")[1:2] not in (["scatter"], ["topk"]), node


@pytest.mark.parametrize("layer", LAYERS)
def test_each_type_of_layer_is_one_sparse_attention_and_the_scores_are_gone(layer: str) -> None:
    it = exported((layer,))
    assert sites(it.report) == expected_sites((layer,))
    assert not [miss for miss in it.report.near_misses if miss.op in ATTENTION]
    assert_no_scores_left(it.program, S)
    for node, _ in op_nodes(it.program.graph):
        assert node.kwargs["kernel"].startswith("kreg."), "lowered for the CPU"


def test_the_indices_feed_the_attention_directly() -> None:
    it = exported((CSA,))
    ops = {op.name: node for node, op in op_nodes(it.program.graph)}
    indices = ops["sparse_attention"].args[3]
    assert indices.args == (ops["lightning_indexer"], 0)
    (attention,) = (site for site in it.report.sites if site.op == "sparse_attention")
    assert attention.mask == {
        "kind": "sliding+top-k",
        "window": WINDOW,
        "selected": "lightning_indexer",
        "ratio": CSA_RATIO,
    }
    assert attention.dims["selected"] == TOPK


@pytest.mark.parametrize("layer", LAYERS)
def test_forward_and_every_gradient_are_as_good_as_eager_in_float32(layer: str) -> None:
    assert_as_good_as_eager(exported((layer,)), {"input_ids": tokens(BATCH, S)})


def test_forward_and_every_gradient_are_as_good_as_eager_in_bfloat16() -> None:
    assert_as_good_as_eager(exported((CSA,), torch.bfloat16), {"input_ids": tokens(BATCH, S)})


def assert_equal_in_float64(it: Exported, inputs: Tensors) -> None:
    eager, mine = run(it.model, inputs, True), run(it.program.module(), inputs, True)
    assert float((eager[0] - mine[0]).abs().max()) < 1e-9
    for name, want in eager[1].items():
        scale = max(1.0, float(want.abs().max()))
        assert float((mine[1][name] - want).abs().max()) < 1e-9 * scale, name


def test_in_float64_forward_and_gradients_equal_eager() -> None:
    assert_equal_in_float64(exported((CSA,), torch.float64), {"input_ids": tokens(BATCH, S)})


def test_with_a_padding_mask_and_dynamic_sizes_the_mask_stays_an_input_and_other_sizes_run() -> None:
    it = exported((CSA,), batch=3, padded=True, dynamic=True)
    assert sites(it.report) == expected_sites((CSA,), "+padding")
    (attention,) = (site for site in it.report.sites if site.op == "sparse_attention")
    assert isinstance(attention.dims["queries"], str) and isinstance(attention.dims["batch"], str)
    ops = {op.name: node for node, op in op_nodes(it.program.graph)}
    inputs = {node.name for node in it.program.graph.nodes if node.op == "placeholder"}
    padding = ops["sparse_attention"].args[5]
    while padding.name not in inputs:
        padding = padding.args[0]  # the rest are sizes
    assert padding.name == "attention_mask"
    module = it.program.module()
    for batch, length in ((3, S), (1, S), (2, 46), (4, 91), (3, 33)):
        inputs_ = {"input_ids": tokens(batch, length), "attention_mask": paddings(batch, length)}
        with torch.no_grad():
            error = (module(**inputs_).logits - it.model(**inputs_).logits).abs().max()
        assert float(error) < 5e-5, (batch, length)
    assert_as_good_as_eager(it, {"input_ids": tokens(3, S), "attention_mask": paddings(3, S)})


EDGES = {
    "no entry of either kind": ((CSA, HCA), 3, 2, {CSA: "sliding", HCA: "sliding"}),
    "one entry": ((CSA,), 5, 1, {CSA: "sliding+block-causal"}),
    "all entries selected, the window not full": ((CSA,), 15, 3, {}),
    "one coarse entry, ready for the last query only": ((HCA,), 16, 1, {}),
}


@pytest.mark.parametrize("edge", EDGES)
def test_short_sequences_are_raised_and_right(edge: str) -> None:
    layers, length, batch, kinds = EDGES[edge]
    it = exported(layers, batch=batch, length=length)
    attention = [site for site in sites(it.report) if site[0] == "sparse_attention"]
    assert [kind for _, _, kind in attention] == [(MASKS | kinds)[layer] for layer in layers]
    assert_as_good_as_eager(it, {"input_ids": tokens(batch, length)})


def test_a_single_token_is_left_as_it_is_and_right() -> None:
    model, inputs = deepseek_v4((CSA,)), {"input_ids": tokens(2, 1)}
    program = kreg.export(model, inputs)
    assert not {op.name for _, op in op_nodes(program.graph)} & set(ATTENTION)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


def test_attention_dropout_in_training_keeps_the_site_and_says_so() -> None:
    model = deepseek_v4((CSA,), attention_dropout=0.5, experts="batched_mm").train()
    inputs = {"input_ids": tokens(BATCH, S)}
    program = kreg.export(model, inputs)
    report = kreg.program_report(program)
    assert report is not None
    assert "sparse_attention" not in {site.op for site in report.sites}
    assert any("dropout is on" in miss.reason for miss in report.near_misses if "attention" in miss.op)
    results = []
    for module in (model, program.module()):
        torch.manual_seed(3)
        results.append(run(module, inputs, True))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_attention_weights_that_are_asked_for_keep_the_site_and_say_so() -> None:
    model = deepseek_v4((CSA,), experts="batched_mm")
    inputs = {"input_ids": tokens(BATCH, S), "output_attentions": True}
    program = kreg.export(model, inputs)
    report = kreg.program_report(program)
    assert report is not None
    assert "sparse_attention" not in {site.op for site in report.sites}
    assert any("weights are used more than once" in miss.reason for miss in report.near_misses)
    with torch.no_grad():
        want, got = model(**inputs), program.module()(**inputs)
    assert torch.equal(want.logits, got.logits)
    assert len(got.attentions) == 1 and torch.equal(want.attentions[0], got.attentions[0])


# ── the full sweep ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_forward_and_gradients_are_as_good_as_eager_in_half_precision(layer: str, dtype: torch.dtype) -> None:
    assert_as_good_as_eager(exported((layer,), dtype), {"input_ids": tokens(BATCH, S)})


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("layer", LAYERS)
def test_float64_equals_eager_for_each_layer_and_padding(layer: str, padded: bool) -> None:
    inputs = {"input_ids": tokens(3, S)} | ({"attention_mask": paddings(3, S)} if padded else {})
    assert_equal_in_float64(exported((layer,), torch.float64, batch=3, padded=padded), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_three_layers_at_every_kind_of_length(length: int, batch: int) -> None:
    model, inputs = deepseek_v4(LAYERS), {"input_ids": tokens(batch, length)}
    program = kreg.export(model, inputs)
    report = kreg.program_report(program)
    attention = [] if report is None else [site for site in report.sites if site.op == "sparse_attention"]
    assert len(attention) == (3 if length > 1 else 0)
    if report is not None:
        sites(report)
        assert_no_scores_left(program, length) if length > 70 else None
        assert_as_good_as_eager(Exported(model, program, report), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_dynamic_sizes_and_padding_for_each_layer(layer: str) -> None:
    it = exported((layer,), batch=3, length=47, padded=True, dynamic=True)
    assert sites(it.report) == expected_sites((layer,), "+padding")
    for batch, length in ((3, 47), (1, 47), (2, 35), (5, 101)):
        assert_as_good_as_eager(it, {"input_ids": tokens(batch, length), "attention_mask": paddings(batch, length)})


@pytest.mark.slow
def test_dynamic_sizes_with_top_k_as_large_as_any_number_of_entries() -> None:
    it = exported((CSA,), batch=2, length=27, dynamic=True, index_topk=64)
    for length in (27, 21, 45, 101, 299):
        assert_as_good_as_eager(it, {"input_ids": tokens(2, length)})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_other_weights(seed: int) -> None:
    it = exported(LAYERS, seed=seed + 1)
    assert sites(it.report) == expected_sites(LAYERS)
    assert_as_good_as_eager(it, {"input_ids": tokens(BATCH, S, seed)})


class _Routing(list[str]):
    """A list that may be part of a cache's key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))


_ROUTING = _Routing(["hash_moe", "moe", "moe", "moe", "moe"])


@pytest.mark.slow
def test_layers_of_one_type_in_a_row_are_each_raised() -> None:
    layers = (SLIDING, CSA, CSA, HCA, HCA)
    it = exported(layers, mlp_layer_types=_ROUTING)
    assert sites(it.report) == expected_sites(layers)
    inputs = {"input_ids": tokens(BATCH, S)}
    with torch.no_grad():
        assert float((it.program.module()(**inputs).logits - it.model(**inputs).logits).abs().max()) < 1e-4
