"""The serving indexer computes its op: packed tokens of many requests, lengths, pages, offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kreg.registry.ops import INDEXER_TOPK as OP

pytest.importorskip("triton")

from kreg.kernels.gpu import record
from kreg.kernels.indexer_topk import triton as serving
from kreg.kernels.lightning_indexer import triton as indexer
from kreg.kernels.lightning_indexer import triton_scores


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def check(arguments: dict[str, Any]) -> torch.Tensor:
    exact = {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in arguments.items()
    }
    got, want, fake = serving.forward(**arguments), OP.reference(**exact), OP.fake(**arguments)[0]
    assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
    tolerance = OP.tolerances[arguments["q"].dtype]
    assert OP.error(arguments, (got,), want) <= tolerance.atol + tolerance.rtol
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_picks_are_the_references_on_every_sample(dtype: torch.dtype, device: str) -> None:
    for sample in OP.samples(dtype, torch.Generator().manual_seed(0)):
        check(on(device, sample))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tokens, heads, dim, block = (draw(st.integers(1, n)) for n in (24, 9, 20, 9))
    requests, pages, blocks = (draw(st.integers(1, n)) for n in (4, 4, 9))
    dtype, ints = (
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
        draw(st.sampled_from([torch.int32, torch.int64])),
    )
    paged = draw(st.booleans())
    entries = pages * block if paged else block

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=g).to(ints)

    call: dict[str, Any] = {
        "q": make(tokens, heads, dim),
        "kv": make(blocks if paged else requests, block, dim),
        "weights": make(tokens, heads).to(draw(st.sampled_from([dtype, torch.float32]))),
        "positions": below(draw(st.sampled_from([1, 8, 200])), tokens) - draw(st.sampled_from([0, 1])),
        "topk": draw(st.sampled_from([0, 1, 4, 100])),
        "ratio": draw(st.sampled_from([0, 1, 4])),
        "offset": draw(st.sampled_from([0, 128])),
    }
    if draw(st.booleans()):
        call["requests"] = below(requests, tokens)
        if draw(st.booleans()):
            call["requests"] = call["requests"].sort().values
    if draw(st.booleans()):
        call["lengths"] = below(entries + 1, requests)
    if paged:
        call["block_table"] = below(blocks, requests, pages)
    return call


@pytest.mark.parametrize("examples", [15, pytest.param(600, marks=pytest.mark.slow)])
def test_any_requests_in_any_order_get_the_references_picks(
    examples: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(call=calls(), processors=st.sampled_from([1, 132]), workspace=st.sampled_from([512, 1 << 20]))
    def holds(call: dict[str, Any], processors: int, workspace: int) -> None:
        monkeypatch.setattr(triton_scores, "processors", lambda device: processors)
        monkeypatch.setattr(indexer, "WORKSPACE", workspace)
        check(on(device, call))

    holds()


def test_pages_hold_what_the_same_keys_in_a_row_do(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    call = on(
        device,
        {
            "q": torch.randn(6, 4, 16, generator=g),
            "weights": torch.randn(6, 4, generator=g),
            "positions": torch.tensor([3, 40, 79, 80, 21, 60]),
            "requests": torch.tensor([0, 0, 0, 1, 1, 1]),
        },
    )
    kv = torch.randn(2, 20, 16, generator=g).to(device)
    order = torch.randperm(10, generator=g).to(device)
    pages = torch.empty(10, 4, 16, device=device)
    pages[order] = kv.view(10, 4, 16)
    rest: dict[str, Any] = {"topk": 3, "ratio": 4, "offset": 128}
    dense = serving.forward(**call, kv=kv, **rest)
    assert torch.equal(dense, serving.forward(**call, kv=pages, block_table=order.view(2, 5).int(), **rest))
    assert dense[0].tolist() == [128, -1, -1]


def test_pages_beyond_a_requests_length_are_not_read(device: str) -> None:
    kv = torch.ones(3, 4, 8, device=device)
    kv[2] = float("nan")
    call = on(device, {"q": torch.ones(2, 1, 8), "weights": torch.ones(2, 1), "positions": torch.tensor([99, 99])})
    table = torch.tensor([[0, 1, 2], [1, 2, 1 << 30]], dtype=torch.int32, device=device)
    found = serving.forward(
        **call,
        kv=kv,
        requests=torch.tensor([0, 1], device=device),
        lengths=torch.tensor([8, 4], device=device),
        block_table=table,
        topk=6,
        ratio=4,
    )
    assert found.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, -1, -1]]


def test_tokens_for_which_no_more_are_ready_than_are_selected_are_not_scored(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([11, 12, 40, 41], device=device)  # 3, 3, 10 and 10 entries
    out = torch.full((1, 4, 20), 7.0, device=device)
    arguments = {"q": torch.randn(1, 4, 128, 8, generator=g), "weights": torch.randn(1, 4, 128, generator=g)}
    scoring = {"first_position": 0, "entries": 20, "unscored": 3, "ratio": 4, "scale": 1.0}
    kv = torch.randn(1, 20, 8, generator=g).to(device)
    packed = triton_scores.Packed(positions, None, None, None)
    triton_scores.scores_into(indexer.TABLE, out, **on(device, arguments), k=kv, **scoring, packed=packed)
    assert torch.equal(out[0, :2], torch.full((2, 20), 7.0, device=device))
    assert not (out[0, 2:, :10] == 7.0).any()


def test_where_every_entry_is_selected_nothing_is_launched_but_their_enumeration() -> None:
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    call = (make(9, 64, 128), make(1, 300, 128), make(9, 64), make(9, dtype=torch.int32))
    names = [one.name for one in record("sm_90", serving.forward, *call, topk=512, ratio=4)]
    assert names == ["enumerate_kernel"]
    names = [one.name for one in record("sm_90", serving.forward, *call, topk=299, ratio=4)]
    assert names == ["scores_kernel", "select_kernel"]


def test_the_operator_runs_the_reference_on_the_cpu_and_traces() -> None:
    sample = next(iter(OP.samples(torch.float32, torch.Generator().manual_seed(0))))
    found = torch.ops.kreg.indexer_topk(**sample)
    assert torch.equal(found, OP.reference(**sample)[0])
    torch.library.opcheck(torch.ops.kreg.indexer_topk.default, (), sample)
