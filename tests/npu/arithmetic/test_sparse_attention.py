"""`sparse_attention` on Ascend: MindSpeed's SAS, torch_npu's SFA and its fused attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .calls import sparse
from .judge import OPS, SPECS, bound, check, generator, mindspeed, samples, strided, takes
from .meaning import reading

SAS, SFA = SPECS["mindspeed.sas"], SPECS["torch_npu.sparse_flash_attention"]
FUSED = {name: spec for name, spec in SPECS.items() if name.startswith("torch_npu.fusion_") and spec.op == SAS.op}
EXACT = (torch.float64,)

LAYERS = {
    "sliding": lambda **more: sparse(140, heads=64, **more),
    "sliding, short": lambda **more: sparse(9, heads=64, **more),
    "top-k 1:4": lambda **more: sparse(140, 4, selected=12, **more),
    "top-k 1:4, two sequences": lambda **more: sparse(12, 4, selected=3, batch=2, **more),
    "all of 1:128": lambda **more: sparse(256, 128, **more),
    "128 heads": lambda **more: sparse(8, 4, selected=2, heads=128, **more),
    "one position": lambda **more: sparse(4, 4, selected=1, **more),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", FUSED.values(), ids=FUSED)
def test_fused_attention_takes_every_sample(spec: Any, dtype: torch.dtype) -> None:
    found = list(samples(spec, dtype))
    assert len(found) >= (3 if "window" in spec.name else 10)
    with reading(dtypes=EXACT):
        for arguments in found:
            check(spec, arguments)
            check(spec, {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})


@pytest.mark.parametrize("minus_one", ["skipped", "ends"])
@pytest.mark.parametrize("layer", LAYERS)
def test_sas_and_its_gradient_are_the_op_if_named_entries_are_held_to_the_causal_bound(
    layer: str, minus_one: str
) -> None:
    arguments = LAYERS[layer]()
    assert takes(SAS, arguments)
    with mindspeed.reading(minus_one=minus_one, causal_again=True, dtypes=EXACT):
        check(SAS, arguments)


@pytest.mark.parametrize("minus_one", ["skipped", "ends"])
def test_where_they_are_not_sas_is_the_op_and_its_gradient_is_nan_rather_than_wrong(minus_one: str) -> None:
    arguments, op = LAYERS["top-k 1:4, two sequences"](), OPS["sparse_attention"]
    with mindspeed.reading(minus_one=minus_one, causal_again=False, dtypes=EXACT):
        got = SAS.entry_point()(**bound(op, arguments))
        want = op.reference(**arguments)
        assert op.tolerances[torch.float64].accepts(op.error(arguments, got, want), 1.0)
        backward = SAS.backward_point()
        assert backward is not None
        found = backward((torch.ones_like(got[0]), None), got, frozenset(op.differentiable), **bound(op, arguments))
    assert all(x.isnan().all() for x in found.values())


def test_of_the_last_query_an_entry_that_is_ready_may_be_left_out() -> None:
    arguments = LAYERS["top-k 1:4, two sequences"]()
    arguments["indices"][:, -1] = torch.tensor([-1, 1, -1])
    with mindspeed.reading(dtypes=EXACT):
        check(SAS, arguments)


@pytest.mark.parametrize("layer", ["sliding, short", "top-k 1:4, two sequences"])
def test_sas_is_the_op_in_bfloat16_from_any_strides(layer: str) -> None:
    arguments = LAYERS[layer](dtype=torch.bfloat16)
    check(SAS, {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})


def test_sas_is_not_asked_where_it_documents_nothing() -> None:
    good = LAYERS["top-k 1:4, two sequences"]()
    assert takes(SAS, good)
    changes: list[dict[str, Any]] = [
        {"sinks": None},
        {"window": 64},
        {"offset": 4},
        {"padding": torch.ones(2, 12, dtype=torch.bool)},
        {"indices": None},
        {"indices": torch.zeros(2, 12, 1025, dtype=torch.int64)},
        {"compressed": good["compressed"][:, :2]},
        {"ratio": 8},
        {"q": good["q"][..., :256], "kv": good["kv"][..., :256], "compressed": good["compressed"][..., :256]},
        {"q": good["q"][:, :32], "sinks": good["sinks"][:32]},
    ]
    for change in changes:
        assert not takes(SAS, good | change), change


SELECTED = {
    "sliding": lambda **more: sparse(20, heads=4, window=7, **more),
    "no sinks": lambda **more: sparse(9, heads=2, window=7, **more) | {"sinks": None},
    "top-k 1:4": lambda **more: sparse(20, 4, selected=3, heads=4, window=5, batch=2, **more),
    "all of 1:4": lambda **more: sparse(21, 4, heads=2, window=5, **more),
    "all 2048 slots": lambda **more: sparse(4, 4, selected=1, heads=1, window=2047, **more),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", SELECTED)
def test_sfa_is_the_op(layer: str, dtype: torch.dtype) -> None:
    arguments = SELECTED[layer](dtype=dtype)
    assert takes(SFA, arguments)
    with reading(dtypes=EXACT):
        check(SFA, arguments)
        check(SFA, {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})


@pytest.mark.parametrize("sinks", [True, False])
def test_sfa_gives_what_the_op_says_to_queries_that_see_nothing(sinks: bool) -> None:
    padding = torch.arange(12).expand(2, -1) >= torch.tensor([[9], [0]])
    arguments = sparse(12, 4, selected=2, heads=2, window=4, batch=2, padding=padding)
    if not sinks:
        arguments["sinks"] = None
    blank = OPS["sparse_attention"].reference(**(arguments | {"sinks": None}))[1].isneginf()
    assert blank.any() and not blank.all()
    with reading(dtypes=EXACT):
        check(SFA, arguments)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    queries, ratio = draw(st.integers(1, 12)), draw(st.sampled_from([0, 1, 2, 4]))
    selected = draw(st.integers(0, queries // ratio)) if ratio else 0
    seed, heads = draw(st.integers(0, 1000)), draw(st.sampled_from([1, 2, 4]))
    arguments = sparse(queries, ratio, selected=selected, heads=heads, seed=seed, batch=draw(st.integers(1, 2)))
    arguments["window"], offset = draw(st.integers(1, 20)), draw(st.sampled_from([0, 0, 5, -2]))
    if offset and "indices" not in arguments:
        more = torch.randn(len(arguments["q"]), max(0, offset), 512, dtype=torch.float64, generator=generator(seed))
        arguments |= {"offset": offset, "kv": torch.cat([more, arguments["kv"]], dim=1)}
    if draw(st.booleans()):
        arguments["kv"] = arguments["kv"][:, : draw(st.integers(1, 12))]
    if draw(st.booleans()):
        arguments["sinks"] = None
    if draw(st.booleans()):
        arguments["padding"] = torch.rand(arguments["kv"].shape[:2], generator=generator(seed)) < 0.7
    if draw(st.booleans()) and "indices" in arguments:
        arguments["indices"] = arguments["indices"].to(torch.int32)
    return arguments


@settings(max_examples=40, deadline=None, derandomize=True)
@given(arguments=calls())
def test_any_mix_of_arguments_gives_the_references_result(arguments: dict[str, Any]) -> None:
    eligible = [spec for spec in (SFA, *FUSED.values()) if takes(spec, arguments)]
    assert SFA in eligible and FUSED["torch_npu.fusion_sparse_attention"] in eligible
    with reading(dtypes=EXACT):
        for spec in eligible:
            check(spec, arguments)
