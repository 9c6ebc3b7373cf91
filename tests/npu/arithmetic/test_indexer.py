"""`lightning_indexer` on Ascend: MindSpeed's LI and torch_npu's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kreg.registry.spec import KernelSpec

from .calls import indexer
from .judge import SPECS, check, mindspeed, strided, takes
from .meaning import reading

LI, OWN = SPECS["mindspeed.li"], SPECS["torch_npu.lightning_indexer"]
EXACT = (torch.float64,)
READINGS = [(missing, shuffled) for missing in ("-1", "masked", "zero") for shuffled in (False, True)]


@contextlib.contextmanager
def read_as(missing: str, shuffled: bool) -> Iterator[None]:
    """One reading of what both indexers leave open."""
    with (
        reading(missing=missing, shuffled=shuffled, dtypes=EXACT),
        mindspeed.reading(missing=missing, shuffled=shuffled, dtypes=EXACT),
    ):
        yield


CALLS = {
    "keys": (OWN, indexer(9, 9, 4)),
    "keys, all of them": (OWN, indexer(9, 9, 9)),
    "the last queries": (OWN, indexer(3, 9, 4, offset=6)),
    "no order of time": (OWN, indexer(4, 9, 3, 0)),
    "no order of time, all": (OWN, indexer(4, 9, 9, 0)),
    "one of each": (OWN, indexer(1, 1, 1)),
    "li: keys": (LI, indexer(9, 9, 4)),
    "li: entries of 4": (LI, indexer(20, 5, 3, 4)),
    "li: entries of 4, all": (LI, indexer(20, 5, 5, 4)),
    "li: entries of 128": (LI, indexer(256, 2, 1, 128, batch=1)),
}


@pytest.mark.parametrize("sentinel", [True, False])
@pytest.mark.parametrize(("missing", "shuffled"), READINGS)
@pytest.mark.parametrize(("spec", "arguments"), CALLS.values(), ids=CALLS)
def test_the_picks_are_the_ops_whatever_is_written_where_nothing_is_ready(
    spec: KernelSpec, arguments: dict[str, Any], missing: str, shuffled: bool, sentinel: bool
) -> None:
    for scale in (arguments["scale"], -arguments["scale"]):
        call = arguments | {"sentinel": sentinel, "scale": scale}
        assert takes(spec, call)
        with read_as(missing, shuffled):
            check(spec, call)


@pytest.mark.parametrize("missing", ["-1", "masked"])
@pytest.mark.parametrize("scale", [0.1, -0.1])
@pytest.mark.parametrize("name", ["keys", "keys, all of them", "the last queries", "no order of time"])
def test_scores_and_their_gradients_are_the_ops(name: str, missing: str, scale: float) -> None:
    _, arguments = CALLS[name]
    with read_as(missing, True):
        check(OWN, arguments | {"scored": True, "scale": scale})


@pytest.mark.parametrize("spec", [LI, OWN], ids=lambda s: s.name)
def test_bfloat16_and_any_strides_are_taken_and_weights_may_be_float32(spec: KernelSpec) -> None:
    arguments = indexer(9, 9, 4, dtype=torch.bfloat16)
    check(spec, arguments)
    check(spec, {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})
    check(spec, arguments | {"weights": arguments["weights"].float()})


def test_scores_are_taken_with_the_sizes_that_the_gradient_is_documented_for() -> None:
    arguments = indexer(9, 9, 4)
    assert takes(OWN, arguments) and not takes(OWN, arguments | {"scored": True})
    full = indexer(2, 2048, 2048, heads=64, batch=1, offset=2046, dtype=torch.bfloat16, scored=True)
    assert takes(OWN, full)
    check(OWN, full)


def test_neither_is_asked_where_it_documents_nothing() -> None:
    for spec, good in ((OWN, indexer(9, 9, 4)), (LI, indexer(20, 5, 3, 4))):
        assert takes(spec, good)
        entries = good["k"].shape[1]
        changes: list[dict[str, Any]] = [
            {"padding": torch.ones(2, entries, dtype=torch.bool)},
            {"ends": torch.zeros(2, entries, dtype=torch.int64)},
            {"offset": 1},
            {"ratio": 7},
            {"topk": 0},
            {"topk": 2049},
            {"scored": True},
            {"q": good["q"][..., :64], "k": good["k"][..., :64]},
            {"q": good["q"].repeat(1, 1, 30, 1), "weights": good["weights"].repeat(1, 1, 30)},
        ]
        for change in changes:
            assert not takes(spec, good | change), change


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 12),
    ratio=st.sampled_from([0, 1, 2, 4]),
    seed=st.integers(0, 1000),
    read=st.sampled_from(READINGS),
    data=st.data(),
)
def test_any_call_gives_the_references_picks(
    queries: int, ratio: int, seed: int, read: tuple[str, bool], data: st.DataObject
) -> None:
    entries = data.draw(st.integers(1, 12)) if ratio == 0 else queries
    spec, positions = (OWN, queries) if ratio < 2 else (LI, queries * ratio)
    topk = data.draw(st.integers(1, entries))
    arguments = indexer(positions, entries, topk, ratio, seed=seed, sentinel=data.draw(st.booleans()))
    if ratio == 1:
        arguments["offset"] = data.draw(st.integers(0, 3))
        more = indexer(1, arguments["offset"] or 1, 1, seed=seed)["k"][:, : arguments["offset"]]
        arguments["k"] = torch.cat([arguments["k"], more], dim=1)
    assert takes(spec, arguments), arguments.keys()
    with read_as(*read):
        check(spec, arguments)
        if spec is OWN and read[0] != "zero":
            check(spec, arguments | {"scored": True})
