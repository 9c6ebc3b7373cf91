"""The ops around selections: what they compute, and that their kernels compute it, in memory linear in the keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kreg.kernels.block_indexer import cpu as blocks
from kreg.kernels.lightning_indexer import cpu as indexer
from kreg.kernels.selected_attention import cpu as selected
from kreg.registry.calls import facts_names
from kreg.registry.catalogue import catalogue
from kreg.registry.constraints import Constraint
from kreg.registry.ops import ATTENTION, BLOCK_INDEXER, LIGHTNING_INDEXER, SELECTED_ATTENTION
from kreg.registry.ops.attention import EMPTY
from kreg.registry.ops.selected_attention import named, random_indices

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Call = dict[str, Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_double(call: Call) -> Call:
    """The same arguments in float64, as leaves."""
    return {
        name: x.double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in call.items()
    }


@contextmanager
def tiles(sparse_above: int, pairs: int) -> Iterator[None]:
    """Tiles of few queries; 1: sparse ones wherever they can be."""
    with patch.object(selected, "SPARSE_ABOVE", sparse_above), patch.object(selected, "PAIRS_PER_TILE", pairs):
        yield


def check(call: Call) -> None:
    """Outputs, strides and gradients of the kernel are the reference's in float64."""
    tolerance = SELECTED_ATTENTION.tolerances[call["q"].dtype]
    exact = in_double(call)
    want = SELECTED_ATTENTION.reference(**exact)
    with torch.no_grad():
        got = selected.forward(**call)
    for mine, fake in zip(got, SELECTED_ATTENTION.fake(**call), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
    plain = tuple(x.detach() for x in want)
    assert tolerance.accepts(SELECTED_ATTENTION.error(call, got, plain), largest(plain[0]))
    assert torch.equal(got[1].isneginf(), plain[1].isneginf())
    assert tolerance.accepts(largest(got[1].double() - plain[1]), largest(plain[1]))
    names = [name for name in SELECTED_ATTENTION.differentiable if call.get(name) is not None]
    grad = torch.randn(got[0].shape, generator=generator(), dtype=torch.float64).to(got[0].dtype)
    expected = torch.autograd.grad((want[0] * grad.double()).sum(), [exact[name] for name in names])
    with torch.no_grad():
        found = selected.backward((grad, None), got, frozenset(names), **call)
    for name, theirs in zip(names, expected, strict=True):
        mine = found[name]
        assert (mine.shape, mine.dtype) == (call[name].shape, call[name].dtype)
        assert torch.equal(mine.isnan(), theirs.isnan()), name
        assert tolerance.accepts(largest(mine.double() - theirs), largest(theirs)), name


def largest(x: Tensor) -> float:
    """Largest finite absolute value."""
    x = x.abs()[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sparse_above", "pairs"), [(3, 1 << 18), (1, 128)])
def test_selected_attention_is_the_reference_on_every_sample(dtype: torch.dtype, sparse_above: int, pairs: int) -> None:
    for call in SELECTED_ATTENTION.samples(dtype, generator()):
        with tiles(sparse_above, pairs):
            check(call)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    g = generator(draw(st.integers(0, 1000)))
    size = st.integers(1, 40)
    batch, group, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    queries, keys, dim, block = draw(size), draw(size), draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 3, 8]))
    heads = kv_heads * group
    index_heads = draw(st.sampled_from([1, kv_heads, heads]))

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    call = {
        "q": make(batch, heads, queries, dim),
        "k": make(batch, kv_heads, keys, dim),
        "v": make(batch, kv_heads, keys, 5),
        "sinks": make(heads) if draw(st.booleans()) else None,
        "padding": make(batch, keys) > -0.5 if draw(st.booleans()) else None,
        "scale": 0.4,
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 5])),
        "offset": draw(st.sampled_from([0, 0, 3, 30, -4])),
        "block": block,
        "empty": draw(st.sampled_from(sorted(EMPTY))),
    }
    shape = (batch, index_heads, queries, draw(st.sampled_from([0, 1, 3, 12])))
    found = random_indices(shape, draw(st.sampled_from([torch.int32, torch.int64])), g, call)
    return call | {"indices": found.masked_fill(torch.rand(shape, generator=g) < 0.3, -1)}


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_mix_of_arguments_gives_the_references_result(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(call=calls(), sparse_above=st.sampled_from([1, 3]), pairs=st.sampled_from([50, 1 << 18]))
    def holds(call: Call, sparse_above: int, pairs: int) -> None:
        with tiles(sparse_above, pairs):
            check(call)

    holds()


@pytest.mark.parametrize("empty", EMPTY)
def test_a_selection_is_attention_under_its_mask(empty: str) -> None:
    g = generator()
    q, k, v = (torch.randn(2, 4, 30, 8, generator=g, dtype=torch.float64) for _ in range(3))
    padding = torch.rand(2, 30, generator=g) < 0.7
    indices = torch.randint(-1, 13, (2, 2, 30, 4), generator=g)  # some name no block
    more: Call = {"padding": padding, "scale": 0.3, "causal": True, "empty": empty}
    mask = named(indices, 30, 3).repeat_interleave(2, dim=1)
    want = ATTENTION.reference(q, k, v, mask=mask, **more)
    for got in (selected.forward, SELECTED_ATTENTION.reference):
        for mine, theirs in zip(got(q, k, v, indices, block=3, **more), want, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor) and x.layout is torch.strided]
        self.numel = max(self.numel, *made, 0)
        return out


@pytest.mark.parametrize("topk", [8, 700], ids=["sparse", "dense"])
def test_no_tensor_is_over_queries_and_keys(topk: int) -> None:
    g, length = generator(), 2048
    q, k, v = (torch.randn(1, 2, length, 8, generator=g) for _ in range(3))
    indices = torch.randint(0, length, (1, 1, length, topk), generator=g)
    with torch.no_grad(), Largest() as made:
        got = selected.forward(q, k, v, indices, scale=0.3, causal=True)
        grad = torch.ones_like(got[0])
        call: Call = {"q": q, "k": k, "v": v, "indices": indices, "scale": 0.3, "causal": True}
        selected.backward((grad, None), got, frozenset("qkv"), **call)
    assert made.numel <= length * length // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", [1 << 20, 500])
def test_block_indexer_selects_what_the_reference_does(dtype: torch.dtype, held: int) -> None:
    for call in BLOCK_INDEXER.samples(dtype, generator()):
        with patch.object(blocks, "SCORES_HELD", held):
            got = blocks.forward(**call)
        want = BLOCK_INDEXER.reference(**{n: x.double() if isinstance(x, Tensor) else x for n, x in call.items()})
        assert BLOCK_INDEXER.tolerances[dtype].accepts(BLOCK_INDEXER.error(call, (got,), want), 1.0)


def test_a_selection_of_blocks_that_is_wrong_is_told() -> None:
    call = {"q": torch.randn(1, 1, 12, 4), "k": torch.randn(1, 12, 4), "topk": 2, "block": 3, "local": 1}
    want = BLOCK_INDEXER.reference(**call)
    for wrong in (
        want[0].clone().fill_(0),  # twice
        want[0].roll(1, 2),  # of another query
        want[0].where(want[0] != want[0].amax(-1, keepdim=True), -1),  # one too few
        want[0].where(want[0] >= 0, 3),  # not begun
    ):
        assert BLOCK_INDEXER.error(call, (wrong,), want) > 1e-3


def test_entries_that_end_every_few_positions_are_what_a_ratio_says() -> None:
    g = generator()
    call: Call = {"q": torch.rand(2, 30, 2, 8, generator=g), "k": torch.rand(2, 7, 8, generator=g)}  # no score is 0
    call |= {"weights": torch.rand(2, 30, 2, generator=g), "scale": 0.3, "topk": 3, "offset": 1}
    ends = torch.arange(3, 31, 4).expand(2, -1)
    for run in (indexer.forward, LIGHTNING_INDEXER.reference):
        assert torch.equal(run(**call, ratio=0, ends=ends)[0].sort()[0], run(**call, ratio=4)[0].sort()[0])
        late = run(**call, ratio=4, ends=ends + 1)[0]
        assert not torch.equal(late, run(**call, ratio=4)[0])
        order = torch.randperm(7, generator=g)
        moved = run(**(call | {"k": call["k"][:, order]}), ratio=0, ends=ends[:, order])[0]
        found = torch.where(moved < 0, -1, order[moved.clamp(min=0)])
        assert torch.equal(found.sort()[0], run(**call, ratio=4)[0].sort()[0])


def test_an_entry_selected_before_its_end_is_told() -> None:
    call: Call = {"q": torch.rand(1, 6, 1, 4), "k": torch.rand(1, 3, 4), "weights": torch.rand(1, 6, 1)}
    call |= {"scale": 1.0, "topk": 1, "ratio": 0, "ends": torch.tensor([[5, 3, 4]])}
    for sentinel in (True, False):
        call["sentinel"] = sentinel
        want = LIGHTNING_INDEXER.reference(**call)
        assert LIGHTNING_INDEXER.error(call, want, want) == 0.0
        for entry in (0, 2):  # of which query 3 may select neither
            wrong = want[0].clone()
            wrong[0, 3] = entry
            assert LIGHTNING_INDEXER.error(call, (wrong, want[1]), want) == float("inf")


def test_the_kernel_for_ascend_takes_no_ends() -> None:
    names = facts_names(LIGHTNING_INDEXER)
    spec = next(s for s in catalogue().kernels_for("lightning_indexer") if s.name == "mindspeed.li")
    facts: dict[str, Any] = {
        "ratio": 4,
        "sentinel": True,
        "has_padding": False,
        "offset": 0,
        "topk": 8,
        "scored": False,
    }
    facts |= {"entries": 16, "queries": 64, "scale": 0.1, "batch": 1, "index_heads": 64, "index_dim": 128}

    def takes(has_ends: bool) -> bool:
        return all(Constraint.parse(text, names).holds(facts | {"has_ends": has_ends}) for text in spec.constraints)

    assert takes(has_ends=False) and not takes(has_ends=True)


@pytest.mark.parametrize("ends", [None, torch.arange(30).flip(0).view(1, 30)], ids=["causal", "ends"])
def test_without_a_sentinel_the_gradient_of_what_is_not_ready_is_none(ends: Tensor | None) -> None:
    g = generator()
    make = {"q": (1, 30, 2, 8), "k": (1, 30, 8), "weights": (1, 30, 2)}
    call: Call = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in make.items()}
    call |= {"scale": 0.3, "topk": 6, "ratio": 1, "scored": True, "sentinel": False, "ends": ends}
    exact = in_double(call)
    with torch.no_grad():
        got = indexer.forward(**call)
    want = LIGHTNING_INDEXER.reference(**exact)
    assert LIGHTNING_INDEXER.error(call, got, tuple(x.detach() for x in want)) < 1e-9
    assert int(got[0].min()) >= 0 and all(len(set(row)) == 6 for row in got[0][0].tolist())
    finite = want[1].detach().isfinite()
    expected = torch.autograd.grad(want[1][finite].square().sum(), [exact[name] for name in make])
    grad = got[1].mul(2).nan_to_num(neginf=7.0)  # whatever comes to slots that are not ready
    with torch.no_grad():
        found = indexer.backward((None, grad), got, frozenset(make), **call)
    for name, theirs in zip(make, expected, strict=True):
        torch.testing.assert_close(found[name], theirs)
