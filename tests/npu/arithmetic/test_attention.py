"""`attention` on Ascend: the adapters compute the op if `npu_fusion_attention` computes what is documented."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kreg.kernels.attention import npu_varlen
from kreg.registry.ops.attention import EMPTY, random_documents
from kreg.registry.spec import KernelSpec

from .judge import OPS, SPECS, check, generator, samples, strided, takes
from .meaning import reading

FUSED = {name: spec for name, spec in SPECS.items() if spec.op == "attention"}
EXACT = (torch.float64,)
CASES = [
    pytest.param(spec, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, spec in FUSED.items()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if dtype in EXACT or str(dtype).removeprefix("torch.") in spec.dtypes
]


@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_outputs_and_gradients_are_the_references_on_every_sample(spec: KernelSpec, dtype: torch.dtype) -> None:
    found = list(samples(spec, dtype))
    assert found
    with reading(dtypes=EXACT):
        for arguments in found:
            check(spec, arguments)


@pytest.mark.parametrize("spec", FUSED.values(), ids=FUSED)
def test_inputs_may_have_any_strides(spec: KernelSpec) -> None:
    for arguments in samples(spec, torch.bfloat16):
        check(spec, {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})


@pytest.mark.parametrize("pse_before_scale", [True, False])
def test_a_bias_is_not_scaled_whenever_the_operator_adds_it(pse_before_scale: bool) -> None:
    spec = FUSED["torch_npu.fusion_attention_masked"]
    biased = [s for s in samples(spec, torch.float64) if s.get("bias") is not None]
    assert biased
    with reading(dtypes=EXACT, pse_before_scale=pse_before_scale):
        for arguments in biased:
            check(spec, arguments)


def test_what_no_kernel_takes_is_a_soft_cap_a_sink_in_float32_a_wide_value_or_no_key() -> None:
    for arguments in OPS["attention"].samples(torch.float32, generator()):
        if any(takes(spec, arguments) for spec in FUSED.values()):
            continue
        wide = arguments["v"].shape[-1] > arguments["q"].shape[-1]
        biased = arguments.get("bias") is not None and arguments.get("empty") in ("nan", "shifted")
        assert arguments.get("softcap") or wide or biased or not arguments["k"].shape[2]


PLACES = [
    {},
    {"causal": True},
    {"causal": True, "offset": "last"},
    {"causal": True, "window": 3, "offset": "last"},
    {"window": 4, "offset": "last"},
    {"causal": True, "window": 100, "offset": "last"},
]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_proven_mask_is_one_of_the_operators_modes(places: dict[str, Any], sinks: bool) -> None:
    g = generator()
    for queries, keys in ((7, 7), (3, 9), (1, 1), (9, 5)):
        more = places | ({"offset": keys - queries} if places.get("offset") else {})
        if queries > keys and places.get("offset"):
            continue
        make = torch.randn(2, 4, queries, 8, generator=g, dtype=torch.float64)
        kv = torch.randn(2, 2, 2, keys, 8, generator=g, dtype=torch.float64)
        arguments = {"q": make, "k": kv[0], "v": kv[1], "scale": 0.4} | more
        if sinks:
            arguments["sinks"] = torch.randn(4, generator=g, dtype=torch.float64)
        spec = FUSED["torch_npu.fusion_attention_sinks" if sinks else "torch_npu.fusion_attention"]
        assert takes(spec, arguments)
        with reading(dtypes=EXACT):
            check(spec, arguments)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    g = generator(draw(st.integers(0, 1000)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys, dim = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(2, 9))
    heads, value_dim = kv_heads * group, draw(st.sampled_from([dim, 2]))
    offset, by_document = draw(st.sampled_from([0, 0, 3, keys - queries, -4])), draw(st.booleans())
    if by_document:
        offset = max(offset, 0)
        keys = max(keys, queries + offset)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    broadcast = tuple(n if draw(st.booleans()) else 1 for n in (batch, heads, queries, keys))
    bias, empty = make(*broadcast) if draw(st.booleans()) else None, draw(st.sampled_from(sorted(EMPTY)))
    if bias is not None:
        lowest = draw(st.sampled_from([None, float("-inf"), torch.finfo(torch.float32).min, -1e30, -1e4]))
        bias = bias if lowest is None else bias.masked_fill(make(*broadcast) > 0.3, lowest)
        empty = {"nan": "zero", "shifted": "uniform"}.get(empty, empty)
    return {
        "q": make(batch, heads, queries, dim),
        "k": make(batch, kv_heads, keys, dim),
        "v": make(batch, kv_heads, keys, value_dim),
        "bias": bias,
        "mask": make(*broadcast) > -0.5 if draw(st.booleans()) else None,
        "sinks": make(heads) if draw(st.booleans()) else None,
        "padding": make(batch, keys) > draw(st.sampled_from([-1.0, 0.5])) if draw(st.booleans()) else None,
        "documents": random_documents((batch, keys), torch.int64, g, {}) if by_document else None,
        "scale": draw(st.sampled_from([0.4, -0.7, 1.0])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 5])),
        "chunk": draw(st.sampled_from([0, 0, 1, 7])),
        "prefix": draw(st.sampled_from([0, 0, 3, 50])),
        "offset": offset,
        "empty": empty,
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arguments=calls(), pse_before_scale=st.booleans())
def test_any_mix_of_masks_bias_sinks_and_scales_gives_the_references_result(
    arguments: dict[str, Any], pse_before_scale: bool
) -> None:
    eligible = [spec for spec in FUSED.values() if takes(spec, arguments)]
    assert any("masked" in spec.name for spec in eligible)
    with reading(dtypes=EXACT, pse_before_scale=pse_before_scale):
        for spec in eligible:
            check(spec, arguments)


# ---- documents as sequences

VARLEN = "torch_npu.fusion_attention_varlen"


def packed(documents: torch.Tensor, heads: int = 4, kv_heads: int = 2, **more: Any) -> dict[str, Any]:
    batch, keys = documents.shape
    g = generator()
    q = torch.randn(batch, heads, keys, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, keys, 8, generator=g, dtype=torch.float64)
    return {"q": q, "k": k, "v": v, "documents": documents, "scale": 0.4} | more


@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.booleans())
@settings(max_examples=25, deadline=None)
def test_documents_are_sequences_whatever_their_lengths(data: Any, batch: int, keys: int, causal: bool) -> None:
    rows = st.lists(st.integers(0, 3), min_size=keys, max_size=keys).map(sorted)
    documents = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    with reading(dtypes=EXACT):
        check(FUSED[VARLEN], packed(documents, causal=causal))


def test_the_ends_of_documents_are_counted_through_all_rows() -> None:
    assert npu_varlen.ends(torch.tensor([[5, 5, 2], [2, 2, 2], [0, 1, 2]])) == [2, 3, 6, 7, 8, 9]
    assert npu_varlen.ends(torch.tensor([[1], [1]])) == [1, 2]


@pytest.mark.parametrize(
    "documents",
    [torch.tensor([[0, 0, 1, 1, 0]]), torch.arange(npu_varlen.MOST + 1).unsqueeze(0)],
    ids=["a document in two pieces", "more documents than the operator takes"],
)
def test_what_are_no_sequences_is_left_to_the_mask(documents: torch.Tensor) -> None:
    assert npu_varlen.ends(documents) is None
    if documents.shape[1] < 100:  # the other one is large
        with reading(dtypes=EXACT):
            check(FUSED[VARLEN], packed(documents, causal=True))
