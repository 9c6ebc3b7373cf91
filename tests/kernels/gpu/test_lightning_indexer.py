"""The Triton indexer computes its op on every shape: picks, scores, gradients, ties, strides, bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kreg.registry.calls import judged
from kreg.registry.ops import LIGHTNING_INDEXER as OP
from kreg.registry.ops.lightning_indexer import all_scores

pytest.importorskip("triton")

from kreg.kernels.gpu import TARGETS, Table, record
from kreg.kernels.lightning_indexer import triton as indexer
from kreg.kernels.lightning_indexer import triton_scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCH = {"num_warps": 4, "num_stages": 1}
GRADIENT = {"BLOCK_H": 16, "BLOCK_K": 16}

# Blocks for the interpreter, which takes about as long for a large one: few programs, or many parts of everything.
WIDE = {
    "scores_kernel": [{"BLOCK_N": 256, "BLOCK_T": 128}],
    "select_kernel": [
        {"when": "width <= 64", "BLOCK": 64, "ROWS": 64},
        {"when": "width <= 512", "BLOCK": 512, "ROWS": 64},
        {"BLOCK": 8192, "ROWS": 16},
    ],
    "merge_kernel": [{"BLOCK": 8192, "ROWS": 16}],
    "enumerate_kernel": [{"BLOCK": 64, "ROWS": 64}],
    "query_gradient_kernel": [GRADIENT | {"BLOCK_K": 64}],
    "key_gradient_kernel": [GRADIENT | {"BLOCK_K": 64}],
}
NARROW = {
    "scores_kernel": [{"BLOCK_N": 16, "BLOCK_T": 16}],
    "select_kernel": [{"BLOCK": 16, "ROWS": 32}],
    "merge_kernel": [{"BLOCK": 16, "ROWS": 32}],
    "enumerate_kernel": [{"BLOCK": 16, "ROWS": 16}],
    "query_gradient_kernel": [GRADIENT],
    "key_gradient_kernel": [GRADIENT],
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    facts = {"scores_kernel": ["bytes", "index_dim", "columns"], "select_kernel": ["width"], "merge_kernel": ["width"]}
    facts |= {"query_gradient_kernel": ["bytes", "index_dim"], "key_gradient_kernel": ["bytes", "index_dim"]}
    found = {}
    for name, kernels in (("wide", WIDE), ("narrow", NARROW)):
        path = tmp_path_factory.mktemp("tuning") / f"{name}.yaml"
        content = {
            kernel: {"facts": facts.get(kernel, []), "targets": {t: [LAUNCH | row for row in rows] for t in TARGETS}}
            for kernel, rows in kernels.items()
        }
        path.write_text(yaml.safe_dump(content))
        found[name] = Table.read(path)
    return found


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, tables: dict[str, Table]) -> None:
    monkeypatch.setattr(indexer, "TABLE", tables["wide"])


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tables: dict[str, Table]) -> None:
    monkeypatch.setattr(indexer, "TABLE", tables["narrow"])


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def largest(x: torch.Tensor) -> float:
    x = x.detach().abs()
    return float(x[x.isfinite()].max()) if x.isfinite().any() else 0.0


def check(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Compare outputs, and where there are scores their gradients, with the reference's in float64."""
    tolerance = OP.tolerances[arguments["q"].dtype]
    exact = {
        name: value.detach().double().requires_grad_(name in OP.differentiable)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    with torch.no_grad():
        got, want = indexer.forward(**arguments), OP.reference(**exact)
        for mine, fake in zip(got, OP.fake(**arguments), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
        assert OP.error(arguments, got, want) <= tolerance.atol + tolerance.rtol
    ascending = got[0].masked_fill(got[0] < 0, arguments["k"].shape[1])
    if not (arguments["topk"] and (got[0] < 0).any()):
        assert torch.equal(ascending, ascending.sort(-1).values)
    if not arguments.get("scored"):
        return got
    scores = all_scores(exact["q"], exact["k"], exact["weights"], exact["scale"])
    padded = torch.cat([scores, scores.new_zeros(*scores.shape[:2], 1)], dim=-1)
    picked = padded.gather(-1, torch.where(got[0] < 0, scores.shape[-1], got[0]))
    assert torch.equal(got[1].isneginf().sum(-1), want[1].isneginf().sum(-1))
    kept = ~got[1].isneginf()
    assert tolerance.accepts(largest((got[1].double() - picked)[kept]), largest(scores))
    grad = torch.randn(picked.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(picked.device)
    (picked * grad.masked_fill(~kept, 0.0)).sum().backward()
    needs = frozenset(OP.differentiable)
    with torch.no_grad():
        found = indexer.backward((None, grad.to(got[1].dtype)), got, needs, **arguments)
    for name in OP.differentiable:
        expected = exact[name].grad
        assert (found[name].shape, found[name].dtype) == (arguments[name].shape, arguments[name].dtype)
        assert tolerance.accepts(largest(found[name].double() - expected), largest(expected)), name
    return got


def samples(dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    return [on(device, sample) for sample in OP.samples(dtype, torch.Generator().manual_seed(0))]


def last(sample: dict[str, Any], count: int) -> dict[str, Any]:
    """The call for a sample's last queries only: a gradient takes programs of its own for each."""
    first = max(0, sample["q"].shape[1] - count)
    cut = {name: sample[name][:, first:] for name in ("q", "weights")}
    return sample | cut | {"offset": sample.get("offset", 0) + first}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_picks_scores_and_gradients_are_the_references_on_every_sample(dtype: torch.dtype, device: str) -> None:
    for sample in samples(dtype, device):
        check(last(sample, 4 if sample.get("scored") else 40))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_blocks_that_are_shipped_give_the_references_result_on_every_sample(
    dtype: torch.dtype, device: str
) -> None:
    for sample in samples(dtype, device):
        check(sample)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scored = draw(st.booleans())
    batch, queries, heads, dim, entries = (draw(st.integers(1, n)) for n in (2, 3 if scored else 40, 20, 33, 60))
    heads = draw(st.sampled_from([1, 3, 8, heads]))
    entries = draw(st.sampled_from([0, 1, 16, entries]))
    dtype = draw(st.sampled_from(DTYPES))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    call = {
        "q": make(batch, queries, heads, dim),
        "k": make(batch, entries, dim),
        "weights": make(batch, queries, heads).to(draw(st.sampled_from([dtype, torch.float32]))),
        "scale": draw(st.sampled_from([0.4, -0.4])),
        "topk": min(entries, draw(st.sampled_from([0, 1, 4, 8, entries]))),
        "ratio": draw(st.sampled_from([0, 1, 4, 7])),
        "offset": draw(st.sampled_from([0, 0, -3, 5, 100])),
        "scored": scored,
        "sentinel": draw(st.booleans()),
    }
    if draw(st.booleans()):
        call["padding"] = torch.rand(batch, entries, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    if draw(st.booleans()):
        end = torch.randint(-2, max(1, queries + call["offset"]) + 2, (batch, entries), generator=g)
        call["ends"] = end.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return call


@pytest.mark.parametrize("examples", [12, pytest.param(600, marks=pytest.mark.slow)])
def test_any_shape_and_any_mix_of_arguments_gives_the_references_result(
    examples: int, device: str, tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(call=calls(), processors=st.sampled_from([1, 132]), workspace=st.sampled_from([1, 4096, 1 << 20]))
    def holds(call: dict[str, Any], processors: int, workspace: int) -> None:
        monkeypatch.setattr(triton_scores, "processors", lambda device: processors)
        monkeypatch.setattr(indexer, "WORKSPACE", workspace)
        picks = set()
        for name in ("wide", "narrow"):
            if name == "wide" or call["topk"] <= 8:  # half of the narrow blocks
                monkeypatch.setattr(indexer, "TABLE", tables[name])
                picks.add(str(check(on(device, call))[0].tolist()))
        if call["q"].dtype is not torch.float32 and call["q"].shape[2] <= 16:
            assert len(picks) == 1  # products are exact in float32, and summed in one order

    holds()


def ties(queries: int, entries: int, levels: int, device: str) -> dict[str, Any]:
    """One head of one dimension: entry j scores its own key, which is one of a few whole numbers."""
    keys = torch.randint(1, levels + 1, (1, entries, 1), generator=torch.Generator().manual_seed(5)).float()
    call = {"q": torch.ones(1, queries, 1, 1), "k": keys, "weights": torch.ones(1, queries, 1), "scale": 1.0}
    return on(device, call)


@pytest.mark.parametrize("table", ["wide", "narrow"])
def test_of_equal_scores_the_lowest_entries_are_picked_in_ascending_order(
    table: str, device: str, tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "TABLE", tables[table])
    call = ties(9, 100, 3, device)
    keys = call["k"].flatten().tolist()
    for topk, offset in ((1, 90), (7, 0), (8, 90)):
        indices, scores = indexer.forward(**call, topk=topk, ratio=1, offset=offset, scored=True)
        for s in range(9):
            best = sorted(sorted(range(s + offset + 1), key=lambda j: (-keys[j], j))[:topk])
            left = topk - len(best)
            assert indices[0, s].tolist() == best + [-1] * left
            assert scores[0, s].tolist() == [keys[j] for j in best] + [float("-inf")] * left


@pytest.mark.usefixtures("narrow")
def test_a_row_cut_into_many_parts_and_merged_several_times_gives_torchs_top_k(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 600, 1, generator=g)
    call = ties(2, 600, 3, device) | {"k": keys.abs().to(device)}
    assert len(indexer.parts_of(indexer.TABLE, torch.device(device), 600, 8)) > 4
    indices, scores = indexer.forward(**call, topk=8, ratio=0, scored=True)
    want = keys.abs().flatten().topk(8)
    assert indices[0, 0].tolist() == indices[0, 1].tolist() == sorted(want.indices.tolist())
    assert torch.equal(scores[0, 0].sort(descending=True).values.cpu(), want.values)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.usefixtures("wide")
def test_nan_is_picked_first_and_minus_infinity_never_as_in_torchs_top_k(device: str) -> None:
    call = ties(1, 6, 1, device)
    call["k"] = torch.tensor([1.0, float("inf"), float("nan"), 2.0, 0.0, 3.0], device=device).view(1, 6, 1)
    assert indexer.forward(**call, topk=2, ratio=0)[0].tolist() == [[[1, 2]]]
    call["scale"] = -1.0
    assert indexer.forward(**call, topk=3, ratio=0)[0].tolist() == [[[0, 2, 4]]]
    assert sorted(indexer.forward(**call, topk=6, ratio=0, scored=True)[0].flatten().tolist()) == [-1, 0, 2, 3, 4, 5]


@pytest.mark.usefixtures("wide")
def test_negative_zero_and_zero_are_a_tie(device: str) -> None:
    call = ties(1, 4, 1, device)
    call["k"] = torch.tensor([-1.0, 1.0, -1.0, 1.0], device=device).view(1, 4, 1)
    call["weights"] = -call["weights"]  # scores -0.0, -1.0, -0.0, -1.0
    assert indexer.forward(**call, topk=2, ratio=0)[0].tolist() == [[[0, 2]]]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger tensor with its dimensions reversed."""
    wide = x.new_zeros(*(2 * n for n in reversed(x.shape)))
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@pytest.mark.usefixtures("wide")
def test_inputs_may_have_any_strides(device: str) -> None:
    every = samples(torch.float32, device)
    for sample in (last(every[place], 3) for place in (3, 4, 13, 15)):
        check(sample | {name: strided(x) for name, x in sample.items() if isinstance(x, torch.Tensor)})
        whole = {name: sample[name].expand(2, *sample[name].shape[1:]) for name in ("q", "k") if len(sample[name]) == 1}
        if whole:
            check(sample | whole | {"weights": sample["weights"].expand(2, -1, -1)})


def test_the_blocks_that_are_shipped_take_the_real_heads_and_dimension(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    call = {
        "q": torch.randn(1, 3, 64, 128, generator=g).bfloat16(),
        "k": torch.randn(1, 150, 128, generator=g).bfloat16(),
        "weights": torch.randn(1, 3, 64, generator=g).bfloat16(),
        "scale": 128**-0.5,
    }
    check(on(device, call) | {"topk": 20, "ratio": 4, "offset": 597, "scored": True})
    check(on(device, call) | {"topk": 20, "ratio": 4, "offset": 70})


def test_heads_too_far_apart_for_32_bits_are_brought_together() -> None:
    q = torch.empty(1, 64, 300_000, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(1, 4096, 128, dtype=torch.bfloat16, device="meta")
    call: dict[str, Any] = {"q": q, "k": k, "weights": q[..., 0], "scale": 1.0, "topk": 16, "ratio": 4, "scored": True}
    outputs = tuple(torch.empty(1, 300_000, 16, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
    launches = record("sm_90", indexer.forward, **call)
    launches += record("sm_90", indexer.backward, (None, outputs[1]), outputs, frozenset(("q", "k")), **call)
    reaches = [63 * one.arguments["q_head"] + 127 for one in launches if "q_head" in one.arguments]
    assert 63 * q.stride(2) >= 1 << 31
    assert len(reaches) >= 3 and max(reaches) < 1 << 31


def test_where_every_ready_entry_is_selected_nothing_is_launched_but_their_enumeration() -> None:
    def launched(offset: int, scored: bool) -> list[str]:
        q, k = (torch.empty(1, *shape, dtype=torch.bfloat16, device="meta") for shape in ((40, 64, 128), (900, 128)))
        call = {"scale": 1.0, "topk": 12, "ratio": 4, "offset": offset, "scored": scored}
        return [one.name for one in record("sm_90", indexer.forward, q, k, q[..., 0], **call)]

    assert launched(8, scored=False) == ["enumerate_kernel"]
    assert launched(12, scored=False) == launched(8, scored=True) == ["scores_kernel", "select_kernel"]


@pytest.mark.usefixtures("wide")
def test_an_enumeration_leaves_out_what_is_not_ready(device: str) -> None:
    q, k = torch.ones(1, 9, 2, 4, device=device), torch.ones(1, 3, 4, device=device)
    indices, scores = indexer.forward(q, k, q[..., 0], scale=1.0, topk=3, ratio=3)
    assert [indices[0, s].tolist() for s in (1, 2, 8)] == [[-1, -1, -1], [0, -1, -1], [0, 1, 2]]
    assert scores.shape == (1, 9, 0)


@pytest.mark.usefixtures("narrow")
def test_tiles_of_queries_with_no_more_ready_entries_than_are_selected_are_not_scored(device: str) -> None:
    q, k = torch.ones(1, 16, 2, 4, device=device), torch.ones(1, 5, 4, device=device)  # eight queries a tile
    out = torch.full((1, 16, 5), 7.0, device=device)
    rest = {"first_position": 0, "entries": 5, "ratio": 3, "scale": 1.0}
    triton_scores.scores_into(indexer.TABLE, out, q, k, q[..., 0], **rest, unscored=2)
    assert torch.equal(out[0, :8], torch.full((8, 5), 7.0, device=device))
    assert torch.equal(out[0, 8:], torch.full((8, 5), 8.0, device=device))


class Allocated(TorchDispatchMode):
    """Records the most bytes that any tensor made under it has."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("scored", [False, True])
def test_no_tensor_has_a_score_for_every_query_and_key(
    scored: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, heads, dim, entries, topk, limit = 20, 2, 2, 4096, 4, 64 << 10
    g = torch.Generator().manual_seed(0)
    call = on(
        device,
        {
            "q": torch.randn(1, queries, heads, dim, generator=g),
            "k": torch.randn(1, entries, dim, generator=g),
            "weights": torch.randn(1, queries, heads, generator=g),
        },
    )
    call |= {"scale": 1.0, "topk": topk, "ratio": 0, "scored": scored}
    monkeypatch.setattr(indexer, "WORKSPACE", limit)
    with Allocated() as seen:
        outputs = indexer.forward(**call)
        grad = torch.ones_like(outputs[1])
        indexer.backward((None, grad), outputs, frozenset(OP.differentiable), **call)
    assert 0 < seen.bytes <= limit  # the workspace was there, and nothing is larger: neither inputs nor results are
    assert limit < 4 * queries * entries / 4
    monkeypatch.setattr(indexer, "WORKSPACE", 1 << 30)
    with Allocated() as all_at_once:
        indexer.forward(**call)
    assert all_at_once.bytes == 4 * queries * entries  # what the limit is for


@pytest.mark.usefixtures("wide")
def test_only_the_gradients_that_are_needed_are_computed_and_none_without_a_gradient(device: str) -> None:
    sample = last(samples(torch.float32, device)[4], 3)
    outputs = indexer.forward(**sample)
    grads = (None, torch.ones_like(outputs[1]))
    every = indexer.backward(grads, outputs, frozenset(OP.differentiable), **sample)
    for name in OP.differentiable:
        alone = indexer.backward(grads, outputs, frozenset([name]), **sample)
        assert set(alone) == {name}
        assert torch.equal(alone[name], every[name])
    nothing = indexer.backward((None, None), outputs, frozenset(OP.differentiable), **sample)
    assert all(not x.any() for x in nothing.values())


@pytest.mark.usefixtures("wide")
def test_the_operator_runs_and_differentiates_by_the_kernels_name(device: str) -> None:
    sample = last(samples(torch.float32, device)[4], 3)
    leaves = {name: sample[name].clone().requires_grad_() for name in OP.differentiable}
    both = []
    for kernel in ("kreg.triton_indexer", ""):
        with judged():  # a kernel that raises is not answered for by the reference
            indices, scores = torch.ops.kreg.lightning_indexer(**(sample | leaves), kernel=kernel)
            ranked = scores.masked_fill(scores.isneginf(), 0.0).gather(-1, indices.argsort(-1))
            gradients = torch.autograd.grad((ranked**2).sum(), list(leaves.values()))
        both.append((indices.sort(-1).values, gradients))
    (mine, found_gradients), (reference, expected) = both
    assert torch.equal(mine, reference)
    for found, wanted in zip(found_gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_more_picks_than_a_program_holds_are_refused_with_what_to_do(device: str) -> None:
    q = torch.zeros(1, 1, 1, 8, device=device)
    k = torch.zeros(1, 5000, 8, device=device)
    with pytest.raises(ValueError, match=r"topk is 4097.*4096 entries at most"):
        indexer.forward(q, k, q[..., 0], scale=1.0, topk=4097, ratio=0)


@pytest.mark.usefixtures("narrow")
def test_a_table_whose_blocks_would_never_shorten_a_row_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="twice topk"):
        indexer.parts_of(indexer.TABLE, torch.device(device), 100, 9)


def test_shipped_blocks_hold_twice_the_largest_topk_and_no_more_than_the_scan_counts() -> None:
    for kernel in ("select_kernel", "merge_kernel"):
        for rows in indexer.TABLE.rows[kernel].values():
            assert rows[-1].config["BLOCK"] == 2 * indexer.LARGEST_TOPK
            assert all(row.config["BLOCK"] <= 2**13 for row in rows)
