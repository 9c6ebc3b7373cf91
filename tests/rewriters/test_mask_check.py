"""A mask that was read right passes the second check in every form; one that was read wrong fails at a real key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import kreg
from kreg.registry.ops import ATTENTION, SELECTED_ATTENTION, SPARSE_ATTENTION
from kreg.registry.ops.attention import band
from kreg.rewriters import lift_ops, program
from kreg.rewriters import notation as n
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find
from kreg.rewriters.lift import Index, Lifter
from kreg.rewriters.mask_check import OPS, Checked, Difference, check, task
from kreg.rewriters.mask_check.task import Task
from kreg.rewriters.masking import masking
from kreg.rewriters.rules.attention import extents
from kreg.rewriters.site import Claim, Site
from kreg.rewriters.softmax import read
from tests.handwritten.case import Sizes, documents, dynamic_shapes, heads, kept, ones_and_zeros
from tests.handwritten.masks import CAUSAL_ADDED, FORMS, KINDS, Kind, Plain, Written, of_keys, same
from tests.models import CSA, HCA, SLIDING, VOCAB, deepseek_v4

SIZES, RESIZED = Sizes(2, 12, 7), Sizes(3, 15, 9)
QUIET = settings(
    database=None, deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck)
)
NAMES = ("causal", "window", "chunk", "prefix", "offset")


@dataclass(frozen=True)
class Graph:
    """A captured graph, and the sites found in it."""

    module: GraphModule
    sites: tuple[Site, ...]

    @property
    def site(self) -> Site:
        """The only one."""
        (site,) = self.sites
        return site


def inputs_of(kind: Kind, sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
    """Queries, keys, values, and what the mask is made from."""
    of = "memory" if kind.memory else "length"
    generator = torch.Generator().manual_seed(seed)
    makers = (heads(2, 8), heads(2, 8, of), heads(2, 8, of), *kind.data)
    return tuple(make(sizes, generator) for make in makers)


def graph_of(module: nn.Module, inputs: Any, shapes: Any = None) -> Graph:
    """A module's graph, as the pipeline has it."""
    captured = program.functional(export_model(module, inputs, shapes)).module
    return Graph(captured, find(captured.graph).sites)


def masked(kind: Kind, form: str, dynamic: bool = False) -> Graph:
    """Attention under a mask of some kind, in some form."""
    module, inputs = Plain(kind, FORMS[form]), inputs_of(kind, SIZES, seed=0)
    return graph_of(module, inputs, dynamic_shapes(module, inputs, inputs_of(kind, RESIZED, 1)) if dynamic else None)


def misread(site: Site, **attributes: Any) -> Site:
    """A site that was told something else about its mask."""
    return replace(site, attributes={**site.attributes, **attributes})


# ── masks that were read right ────────────────────────────────────────────────────────────────────────────────


def same_run(positions: Tensor) -> Tensor:
    """Documents told apart by positions that start again, as transformers does."""
    starts = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    return same(starts.cumsum(-1))


def positions() -> Callable[[Sizes, torch.Generator], Tensor]:
    return lambda s, g: (torch.arange(s.length) % torch.randint(3, 9, (s.batch, 1), generator=g)).contiguous()


PARTS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "causal": (lambda i, j, size: j <= i, ()),
    "window": (lambda i, j, size: (j <= i) & (i - j < size), ()),
    "both ways": (lambda i, j, size: (i - j).abs() < size, ()),
    "chunk": (lambda i, j, size: i // size == j // size, ()),
    "prefix": (lambda i, j, size: (j <= i) | (j < size), ()),
    "stride": (lambda i, j, size: (i - j) % size == 0, ()),
    "padding": (lambda i, j, size, keep: of_keys(keep), (kept(),)),
    "attention mask": (lambda i, j, size, keep: of_keys(keep) != 0, (ones_and_zeros(),)),
    "documents": (lambda i, j, size, d: same(d), (documents(),)),
    "positions": (lambda i, j, size, p: same_run(p), (positions(),)),
}


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """Products of one to three masks."""
    chosen = draw(st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.integers(2, 7)), min_size=1, max_size=3))

    def keep(i: Tensor, j: Tensor, *data: Tensor) -> Tensor:
        rest, result = list(data), (i >= 0) & (j >= 0)
        for name, size in chosen:
            condition, makers = PARTS[name]
            result = result & condition(i, j, size, *(rest.pop(0) for _ in makers))
        return result

    return Kind(keep, "", data=tuple(maker for name, _ in chosen for maker in PARTS[name][1]))


def assert_passes(graph: Graph, dynamic: bool) -> None:
    """What was read holds, at one size, or at several that the example's is one of."""
    for site in graph.sites:
        checked = check(graph.module, site)
        assert checked.passed, checked.reason
        assert not checked.partial
        lengths = {shape[2:] for shape in checked.shapes}
        assert len(lengths) >= 2 if dynamic else len(lengths) == 1


@QUIET
@given(kinds(), st.sampled_from(sorted(FORMS)))
def test_any_product_of_masks_holds_in_any_form(kind: Kind, form: str) -> None:
    assert_passes(masked(kind, form), dynamic=False)


@settings(QUIET, max_examples=10)
@given(kinds(), st.sampled_from(sorted(FORMS)))
def test_any_product_of_masks_holds_at_all_sizes(kind: Kind, form: str) -> None:
    assert_passes(masked(kind, form, dynamic=True), dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "full" and "selected" not in name])
def test_every_kind_holds_in_every_form(name: str, form: str, dynamic: bool) -> None:
    assert_passes(masked(KINDS[name], form, dynamic), dynamic)


def test_sizes_reach_past_the_window_though_the_example_does_not() -> None:
    wide = Kind(lambda i, j: (j <= i) & (i - j < 100), "")
    graph = masked(wide, "where -inf", dynamic=True)
    assert graph.site.attributes["window"] == 100
    checked = check(graph.module, graph.site)
    assert checked.passed
    assert min(keys for *_, keys in checked.shapes) < SIZES.length < 100 < max(keys for *_, keys in checked.shapes)


# ── masks that were read wrong ────────────────────────────────────────────────────────────────────────────────

BANDS: dict[str, Mapping[str, int]] = {
    "causal": {"causal": False},
    "sliding": {"window": 5},
    "sliding ": {"window": 3},
    "sliding  ": {"window": 0},
    "chunked": {"chunk": 6},
    "chunked ": {"causal": False},
    "prefix": {"prefix": 2},
    "prefix ": {"prefix": 0},
    "sliding after a cache": {"offset": 8},
    "causal ": {"offset": 1},
    "causal  ": {"offset": -1},
}
"""A kind of mask, and what was misread of it."""


def truth(kind: Kind, difference: Difference) -> bool:
    """Whether a mask that is made of places alone keeps the key that was named."""
    *_, queries, keys = difference.shape
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    return bool(kind.keep(i, j).expand(queries, keys)[difference.query, difference.key])


def assert_named(kind: Kind, checked: Checked) -> None:
    """The check failed at a key that the op keeps and the model does not, or the other way round."""
    assert checked.passed is False
    found = checked.difference
    assert found is not None
    assert truth(kind, found) != found.op
    assert found.model == (not found.op) if isinstance(found.model, bool) else found.op
    assert f"key {found.key} of query {found.query}" in checked.reason
    assert checked.reason.startswith("the mask was read as ")


@pytest.mark.parametrize("form", ["where -inf", "added min", "fused bool"])
@pytest.mark.parametrize("name", BANDS)
def test_a_misread_band_fails_at_a_key_that_differs(name: str, form: str) -> None:
    kind = KINDS[name.strip()]
    graph = masked(kind, form)
    assert_named(kind, check(graph.module, misread(graph.site, **BANDS[name])))


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "prefix"])
def test_a_misread_band_fails_in_a_graph_of_any_size(name: str) -> None:
    kind = KINDS[name]
    graph = masked(kind, "added min", dynamic=True)
    assert_named(kind, check(graph.module, misread(graph.site, **BANDS[name])))


@settings(QUIET, max_examples=60)
@given(st.sampled_from(["causal", "sliding", "chunked", "prefix", "sliding in chunks"]), st.data())
def test_the_check_fails_exactly_where_the_bands_differ(name: str, data: st.DataObject) -> None:
    graph = band_graph(name)
    told = {key: graph.site.attributes[key] for key in NAMES}
    changed = told | {"causal": data.draw(st.booleans())}
    changed |= {key: max(0, told[key] + data.draw(st.integers(-2, 2))) for key in NAMES[1:]}
    own, other = (kept_by(**attributes) for attributes in (told, changed))
    alike = torch.equal(own, other)
    checked = check(graph.module, misread(graph.site, **changed))
    assert checked.passed is alike
    if not alike:
        assert_named(KINDS[name], checked)


def kept_by(**attributes: Any) -> Tensor:
    """What the op keeps by places alone, at the size that the graph has."""
    kept_keys = band(12, 12, device=torch.device("cpu"), **attributes)
    return torch.ones(12, 12, dtype=torch.bool) if kept_keys is None else kept_keys


@cache
def band_graph(name: str) -> Graph:
    return masked(KINDS[name], "where -inf")


class Padded(nn.Module):
    """Causal attention under the first of two masks; the second goes elsewhere."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, other: Tensor) -> Tensor:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT * 0.3).masked_fill(~(causal & of_keys(keep)), -torch.inf)
        return scores.softmax(-1) @ v * other[:, None, :, None]


def renamed(node: Node, name: str) -> Node:
    """Another input of the same graph."""
    (found,) = (other for other in node.graph.nodes if other.op == "placeholder" and other.name == name)
    assert isinstance(found, Node)
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_padding_by_another_input_fails_at_a_key_that_the_band_keeps(dynamic: bool) -> None:
    kind = Kind(KINDS["causal"].keep, "", data=(kept(), kept()))
    module, inputs = Padded(), inputs_of(kind, SIZES, 0)
    graph = graph_of(module, inputs, dynamic_shapes(module, inputs, inputs_of(kind, RESIZED, 1)) if dynamic else None)
    site, padding = graph.site, graph.site.operands["padding"]
    assert check(graph.module, site).passed
    other = replace(padding, node=renamed(padding.node, "other"))
    checked = check(graph.module, replace(site, operands={**site.operands, "padding": other}))
    assert checked.passed is False
    assert checked.difference is not None
    assert checked.difference.key <= checked.difference.query


@pytest.mark.parametrize(("name", "operand"), [("causal and padding", "padding"), ("causal and packed", "documents")])
def test_an_input_that_is_left_out_fails_at_a_key_that_the_op_keeps(name: str, operand: str) -> None:
    graph = masked(KINDS[name], "where -inf")
    operands = {key: value for key, value in graph.site.operands.items() if key != operand}
    checked = check(graph.module, replace(graph.site, operands=operands))
    assert checked.passed is False
    assert checked.difference is not None
    assert checked.difference.op
    assert checked.difference.key <= checked.difference.query


def test_padding_that_is_turned_round_fails() -> None:
    graph = masked(KINDS["padding"], "filled -inf")
    turned = graph.site.operands["padding"].then(torch.ops.aten.logical_not.default)
    checked = check(graph.module, replace(graph.site, operands={**graph.site.operands, "padding": turned}))
    assert checked.passed is False


def test_an_added_number_that_is_not_what_was_read_fails_and_is_named() -> None:
    graph = graph_of(Written(CAUSAL_ADDED["triu of -1e4"]), inputs_of(KINDS["causal"], SIZES, 0))
    (claim,) = graph.site.claims
    assert check(graph.module, graph.site).passed
    checked = check(graph.module, replace(graph.site, claims=(replace(claim, levels=(-1e9, 0.0)),)))
    assert checked.passed is False
    assert "is -10000.0 in the model" in checked.reason


def test_beside_a_mask_without_a_tensor_the_op_may_keep_less_but_not_more() -> None:
    graph = masked(KINDS["causal"], "where -inf")
    site = replace(graph.site, claims=(*graph.site.claims, Claim(None)))
    narrower = check(graph.module, misread(site, window=3))
    assert narrower.passed
    assert narrower.partial
    assert check(graph.module, misread(site, causal=False)).passed is False


# ── sparse attention ──────────────────────────────────────────────────────────────────────────────────────────


@cache
def sparse() -> Graph:
    graph = graph_of(deepseek_v4(), {"input_ids": torch.arange(96).reshape(2, 48) % VOCAB})
    return Graph(graph.module, tuple(site for site in graph.sites if site.op is SPARSE_ATTENTION))


LAYERS = {SLIDING: 0, CSA: 1, HCA: 2}


@pytest.mark.parametrize("layer", LAYERS)
def test_windows_entries_and_selections_hold(layer: str) -> None:
    graph = sparse()
    assert check(graph.module, graph.sites[LAYERS[layer]]).passed


@pytest.mark.parametrize(
    ("layer", "attributes"),
    [(SLIDING, {"window": 15}), (CSA, {"window": 17}), (HCA, {"ratio": 15}), (HCA, {"offset": 1})],
)
def test_a_misread_window_or_ratio_fails(layer: str, attributes: Mapping[str, int]) -> None:
    graph = sparse()
    checked = check(graph.module, misread(graph.sites[LAYERS[layer]], **attributes))
    assert checked.passed is False
    assert checked.difference is not None
    on_entries = checked.difference.key >= 48
    assert on_entries == ("ratio" in attributes)


def test_entries_that_an_indexer_selected_are_not_all_that_are_ready() -> None:
    graph = sparse()
    site = graph.sites[LAYERS[CSA]]
    operands = {name: operand for name, operand in site.operands.items() if name != "indices"}
    checked = check(graph.module, replace(site, operands=operands))
    assert checked.passed is False
    assert checked.difference is not None
    assert checked.difference.key >= 48


# ── selected attention ────────────────────────────────────────────────────────────────────────────────────────


class Selecting(nn.Module):
    """Attention to keys, or blocks of keys, that an input names, among those before the query that are no padding."""

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block = block

    def forward(self, q: Tensor, k: Tensor, v: Tensor, names: Tensor, keep: Tensor) -> Tensor:
        places = torch.arange(k.shape[2])
        blocks = torch.zeros(*q.shape[:1], 1, q.shape[2], k.shape[2] // self.block, dtype=torch.bool)
        named = blocks.scatter(-1, names, True).repeat_interleave(self.block, dim=-1)
        kept = named & (places[None, :] <= places[:, None]) & keep[:, None, None, :]
        return (q @ k.mT * 0.3).masked_fill(~kept, -torch.inf).softmax(-1) @ v


@cache
def selecting(block: int) -> Graph:
    q, k, v = inputs_of(KINDS["causal"], SIZES, 0)
    names = torch.randint(0, 12 // block, (2, 1, 12, 3))
    graph = graph_of(Selecting(block), (q, k, v, names, torch.ones(2, 12, dtype=torch.bool)))
    assert graph.site.op is SELECTED_ATTENTION
    found = read(Lifter(), graph.site.anchor)
    claims = graph.site.claims or masking(found, extents(found)).claims
    return Graph(graph.module, (replace(graph.site, claims=claims),))


@pytest.mark.parametrize("block", [1, 3])
def test_a_selection_holds(block: int) -> None:
    graph = selecting(block)
    checked = check(graph.module, graph.site)
    assert checked.passed, checked.reason
    assert not checked.partial


@pytest.mark.parametrize(
    ("block", "attributes"), [(1, {"causal": False}), (1, {"window": 3}), (3, {"offset": 2}), (3, {"block": 4})]
)
def test_a_misread_selection_fails_at_a_key(block: int, attributes: Mapping[str, int]) -> None:
    graph = selecting(block)
    checked = check(graph.module, misread(graph.site, **attributes))
    assert checked.passed is False
    assert checked.difference is not None
    assert checked.difference.model != checked.difference.op


def test_a_selection_without_its_padding_fails_at_a_key_that_the_op_keeps() -> None:
    graph = selecting(1)
    operands = {name: operand for name, operand in graph.site.operands.items() if name != "padding"}
    checked = check(graph.module, replace(graph.site, operands=operands))
    assert checked.passed is False
    assert checked.difference is not None
    assert checked.difference.op is True


# ── how it is run ─────────────────────────────────────────────────────────────────────────────────────────────


class Stack(nn.Module):
    """Layers that each make their own mask, of one of two kinds."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(6):
            i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
            keep = j <= i if layer % 2 else (j <= i) & (i - j < 4)
            x = x + (x @ x.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ x
        return x


def test_layers_that_mask_alike_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ran = Task.run, []

    def counted(this: Task) -> Checked:
        ran.append(this)
        return run(this)

    monkeypatch.setattr(Task, "run", counted)
    graph = graph_of(Stack(), (torch.randn(2, 12, 8),))
    assert len(graph.sites) == 6
    assert all(check(graph.module, site).passed for site in graph.sites)
    assert len(ran) == 2


def test_a_misread_operator_keeps_the_site_with_the_key_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.ops.aten.tril.default
    right = lift_ops.POINTWISE[target]

    def wrong(lifter: Lifter, node: Node, index: Index) -> n.Expr | None:
        return right(lifter, node, (*index[:-2], n.add(index[-2], n.ONE), index[-1]))

    inputs = inputs_of(KINDS["causal"], SIZES, 0)
    module = Written(lambda length: torch.ones(length, length).tril().bool())
    (site,) = kreg.analyse(module, inputs).sites
    assert site.status == "replaced"
    monkeypatch.setitem(lift_ops.POINTWISE, target, wrong)
    (site,) = kreg.analyse(module, inputs).sites
    assert site.status == "kept"
    assert site.reason == (
        "the mask was read as causal (offset 1), but key 1 of query 0 is masked in the model and kept by the op "
        "(batch 0, head 0, of 1x1x12x12)"
    )


class FusedCausal(nn.Module):
    """The mask of PyTorch's own operator, of which there is no tensor."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_causal(dynamic: bool) -> Graph:
    module, kind = FusedCausal(), KINDS["causal"]
    inputs = inputs_of(kind, SIZES, 0)
    return graph_of(module, inputs, dynamic_shapes(module, inputs, inputs_of(kind, RESIZED, 1)) if dynamic else None)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_mask_of_the_fused_operator_itself_is_run(dynamic: bool) -> None:
    graph = fused_causal(dynamic)
    assert_passes(graph, dynamic)
    assert_named(KINDS["causal"], check(graph.module, misread(graph.site, causal=False)))
    assert_named(KINDS["causal"], check(graph.module, misread(graph.site, offset=1)))
    assert_named(KINDS["causal"], check(graph.module, misread(graph.site, window=4)))


class AddedNumbers(nn.Module):
    """What is added is a mask with numbers of its own, which is passed on as a bias."""

    def __init__(self, fused: bool, sink: bool = False) -> None:
        super().__init__()
        self.fused, self.sink = fused, sink

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        places = torch.arange(k.shape[2])
        slope = (places[None, :] - places[:, None]).to(q.dtype) * 0.125
        added = slope + (1.0 - keep[:, None, None, :].to(q.dtype)) * -1e4
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v, added)
        scores = q @ k.mT * 0.3 + added
        if self.sink:
            scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        return scores.softmax(-1)[..., : k.shape[2]] @ v


ADDED = {"written": AddedNumbers(False), "with a sink": AddedNumbers(False, sink=True), "fused": AddedNumbers(True)}


def added_numbers(form: str) -> Graph:
    return graph_of(ADDED[form], inputs_of(Kind(KINDS["full"].keep, "", data=(ones_and_zeros(),)), SIZES, 0))


@pytest.mark.parametrize("form", ADDED)
def test_a_mask_that_went_in_as_a_bias_is_run(form: str) -> None:
    graph = added_numbers(form)
    assert "bias" in graph.site.operands
    checked = check(graph.module, graph.site)
    assert checked.passed, checked.reason
    assert not checked.partial


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize(
    "misread_as",
    [
        lambda bias: bias.then(torch.ops.aten.mul.Scalar, 0.5),
        lambda bias: bias.then(torch.ops.aten.neg.default),
        lambda bias: bias.then(torch.ops.aten.roll.default, [1], [-1]),
        lambda bias: bias.then(torch.ops.aten.clamp_min.default, -1.0),
        None,
    ],
    ids=["halved", "negated", "shifted by a key", "clamped", "left out"],
)
def test_a_bias_that_is_not_what_the_model_adds_fails_by_what_a_key_weighs(form: str, misread_as: Any) -> None:
    graph = added_numbers(form)
    operands = dict(graph.site.operands)
    bias = operands.pop("bias")
    if misread_as is not None:
        operands["bias"] = misread_as(bias)
    checked = check(graph.module, replace(graph.site, operands=operands))
    assert checked.passed is False
    assert checked.difference is not None
    assert checked.difference.model != checked.difference.op
    assert "has a weight of" in checked.reason


def test_a_bias_beside_a_band_that_was_misread_fails() -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
            later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
            return (q @ k.mT * 0.3 + added).masked_fill(later, -torch.inf).softmax(-1) @ v

    q, k, v = inputs_of(KINDS["causal"], SIZES, 0)
    graph = graph_of(Both(), (q, k, v, torch.randn(12, 12)))
    assert check(graph.module, graph.site).passed
    assert check(graph.module, misread(graph.site, causal=False)).passed is False
    assert check(graph.module, misread(graph.site, window=5)).passed is False


def test_the_report_says_why_a_mask_was_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(KINDS["causal"], SIZES, 0)
    module = Written(lambda length: torch.ones(length, length).tril().bool())
    (site,) = kreg.analyse(module, inputs).sites
    assert "mask was not run" not in site.reason
    monkeypatch.setattr(task, "LARGEST", 143)
    (site,) = kreg.analyse(module, inputs).sites
    assert site.status == "replaced"
    assert site.reason.endswith("; its mask was not run by itself: a tensor of 0 million elements is needed")


def test_a_mask_that_is_too_large_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "LARGEST", 143)
    graph = masked(KINDS["causal"], "where -inf")
    checked = check(graph.module, graph.site)
    assert checked.passed is None
    assert "elements" in checked.reason


def test_what_attention_keeps_is_where_its_reference_has_weight() -> None:
    for call in ATTENTION.samples(torch.float64, torch.Generator().manual_seed(0)):
        batch, _, queries, _ = call["q"].shape
        kv_heads, keys = call["k"].shape[1:3]
        blank = {"q": torch.zeros_like(call["q"]), "k": torch.zeros_like(call["k"])}
        one_hot = torch.eye(keys, dtype=torch.float64).expand(batch, kv_heads, -1, -1)
        rest = {name: v for name, v in call.items() if name not in ("bias", "sinks", "softcap", "empty")}
        weights, _ = ATTENTION.reference(**rest | blank | {"v": one_hot})
        kept_keys = OPS["attention"].keeps(call, told(ATTENTION.defaults, call), queries, keys)
        assert torch.equal(kept_keys.expand_as(weights), weights > 0)


def test_what_selected_attention_keeps_is_where_its_reference_has_weight() -> None:
    for call in SELECTED_ATTENTION.samples(torch.float64, torch.Generator().manual_seed(0)):
        (_, heads_, queries, _), (batch, kv_heads, keys, _) = call["q"].shape, call["k"].shape
        blank = {"q": torch.zeros_like(call["q"]), "k": torch.zeros_like(call["k"])}
        one_hot = torch.eye(keys, dtype=torch.float64).expand(batch, kv_heads, -1, -1)
        rest = {name: v for name, v in call.items() if name not in ("sinks", "softcap", "empty")}
        weights, _ = SELECTED_ATTENTION.reference(**rest | blank | {"v": one_hot})
        facts = told(SELECTED_ATTENTION.defaults, call) | {"heads": heads_}
        kept_keys = OPS["selected_attention"].keeps(call, facts, queries, keys)
        assert torch.equal(kept_keys.expand_as(weights), weights > 0)


def test_what_sparse_attention_keeps_is_where_its_reference_has_weight() -> None:
    for call in SPARSE_ATTENTION.samples(torch.float64, torch.Generator().manual_seed(0)):
        batch, count, queries, _ = call["q"].shape
        keys = call["kv"].shape[1]
        entries = call["compressed"].shape[1] if "compressed" in call else 0
        one_hot = torch.eye(keys + entries, dtype=torch.float64).expand(batch, -1, -1)
        rest = {name: v for name, v in call.items() if name != "sinks"}
        rest |= {"q": torch.zeros(batch, count, queries, keys + entries).double(), "kv": one_hot[:, :keys]}
        if "compressed" in call:
            rest["compressed"] = one_hot[:, keys:]
        weights, _ = SPARSE_ATTENTION.reference(**rest)
        kept_keys = OPS["sparse_attention"].keeps(call, told(SPARSE_ATTENTION.defaults, call), queries, keys)
        assert torch.equal(kept_keys.expand_as(weights), weights > 0)


def told(defaults: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a call, left out ones included."""
    return {**defaults, **call}
