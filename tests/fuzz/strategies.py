"""What is drawn: hypothesis strategies over the descriptions, simplest first, so that examples shrink to little."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.fuzz.attention import SOFTMAXES
from tests.fuzz.forms import Attention, Indexed, Mask, Program
from tests.fuzz.layouts import LAYOUTS, SPREADS
from tests.fuzz.masks import BIASES, CONDITIONS, FILLS, IN_CODE
from tests.fuzz.twists import applicable

LENGTHS = (5, 4, 8, 7, 12, 17, 1, 2)
DTYPES = ("float32", "float32", "float64", "bfloat16")
VALUES: tuple[str | float, ...] = ("-inf", "min", -1e4, -1e9)
SELDOM = st.sampled_from([False] * 11 + [True])
"""Symbolic sizes make capture three to six times slower."""

SINGLE = frozenset({"nsd", "sd"})
"""Layouts with one head."""


@st.composite
def masks(draw: st.DrawFn, queries: int, keys: int, dtype: str) -> Mask:
    """One mask; queries stand at the first keys, or the last.

    A score that a number is added to loses digits. In float64 no wider type tells how many: there, only what
    swallows a score whole is drawn.
    """
    values = VALUES if dtype != "float64" else VALUES[:2]
    kind = draw(st.sampled_from([k for k in CONDITIONS if k != "documents" or queries == keys]))
    fill = draw(st.sampled_from(list(FILLS)))
    return Mask(
        kind=kind,
        made=draw(st.sampled_from(IN_CODE)) if kind in ("causal", "window", "chunked", "prefix") else "tril",
        fill=fill,
        value=draw(st.sampled_from(values if fill != "multiplied" else values[1:])),
        width=draw(st.integers(1, 6)) if kind in ("window", "band", "chunked", "prefix") else 3,
        offset=draw(st.sampled_from([max(keys - queries, 0), 0, 0, 1, -1]))
        if kind in ("causal", "window", "chunked")
        else 0,
    )


def _broadcasts(layout: str, groups: int, sdpa: bool) -> bool:
    """Whether key heads meet more query heads without being repeated."""
    return layout in ("bhsd", "bshd") and (groups == 1 or sdpa)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    """An attention that no twist has touched."""
    layout = draw(st.sampled_from(list(LAYOUTS)))
    single, whole = layout in SINGLE, layout == "sd"
    projection = draw(st.sampled_from(["given", "separate", "fused"]))
    groups = 1 if single else draw(st.sampled_from([2, 1, 3]))
    ratio = 1 if single else draw(st.sampled_from([1, 2, 3]))
    queries = draw(st.sampled_from(LENGTHS))
    crossed = projection != "fused" and draw(st.booleans())
    keys = draw(st.sampled_from(LENGTHS)) if crossed else 0
    dim = draw(st.sampled_from([4, 8, 5]))
    shared = projection != "fused" and draw(st.sampled_from([False, False, False, True]))
    products = ["matmul", "einsum", "reversed", "sdpa"] + (["bmm", "baddbmm"] if layout in ("bmm", "nsd") else [])
    product = draw(st.sampled_from(products))
    sdpa, added = product == "sdpa", product == "baddbmm"
    spreads = [s for s in SPREADS if s != "broadcast" or _broadcasts(layout, groups, sdpa)]
    dtype = draw(st.sampled_from(DTYPES))
    found = draw(st.lists(masks(queries, keys or queries, dtype), max_size=2).map(tuple))
    if sdpa and not found and draw(st.booleans()):
        found = (Mask(made="is_causal"),)
    whole_mask = any(mask.made == "is_causal" for mask in found)
    return Attention(
        layout=layout,
        projection=projection,
        batch=1 if whole else draw(st.sampled_from([2, 1, 3])),
        groups=groups,
        ratio=ratio,
        queries=queries,
        keys=keys,
        dim=dim,
        value_dim=dim if shared else draw(st.sampled_from([dim, dim, 4, 6])),
        spread=draw(st.sampled_from(spreads)) if ratio > 1 and layout != "bgrsd" else "expand",
        shared=shared,
        product=product,
        scale=draw(st.sampled_from([0.5, 0.3, 1.0, 0.125])),
        scaled="after" if added else draw(st.sampled_from(["after", "divided", "q", "k", "both"])),
        softcap=0.0 if sdpa or added else draw(st.sampled_from([0.0, 0.0, 0.0, 5.0])),
        masks=found,
        joined=len(found) > 1 and draw(st.booleans()),
        bias=draw(st.sampled_from(("", "", "", *BIASES))) if not whole_mask else "",
        sink="" if sdpa else draw(st.sampled_from(["", "", "", "behind", "in front"])),
        steadied=not sdpa and draw(st.sampled_from([False, False, False, True])),
        softmax="method" if sdpa else draw(st.sampled_from(list(SOFTMAXES))),
        dropout=not sdpa and draw(st.booleans()),
        merged=draw(st.booleans()),
        dtype=dtype,
        dynamic=draw(SELDOM),
        trained=draw(st.booleans()),
    )


@st.composite
def indexers(draw: st.DrawFn) -> Indexed:
    """An indexer and its attention that no twist has touched."""
    ratio = draw(st.sampled_from([2, 1, 3, 4]))
    queries = draw(st.sampled_from([12, 8, 13, 17]))
    scatter = draw(st.sampled_from(["bias", "bool", "bool sliced"]))
    return Indexed(
        batch=draw(st.sampled_from([2, 1])),
        queries=queries,
        heads=draw(st.sampled_from([2, 1, 3])),
        dim=draw(st.sampled_from([4, 8])),
        index_heads=draw(st.sampled_from([3, 2, 5])),
        index_dim=draw(st.sampled_from([4, 6])),
        ratio=ratio,
        topk=draw(st.sampled_from([3, 1, 2, 6])),
        window=draw(st.sampled_from([4, 4, 0, 1])),
        weighted=draw(st.sampled_from(["mul", "matmul", "einsum"])),
        future=draw(st.sampled_from(["masked_fill", "where", "added", "masked_fill", ""])),
        sentinel=draw(st.sampled_from(["where", "masked_fill", "where", ""])),
        scatter=scatter,
        fill="added" if scatter == "bias" else draw(st.sampled_from(["masked_fill", "where", "added"])),
        sink=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float32", "float64"])),
        dynamic=draw(SELDOM),
        trained=draw(st.booleans()),
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program: most are attention, and most are bent once or twice."""
    program: Program = draw(st.one_of(attentions(), attentions(), attentions(), indexers()))
    count = draw(st.sampled_from([1, 0, 1, 2]))
    names = applicable(program)
    twists = draw(st.lists(st.sampled_from(names), min_size=count, max_size=count, unique=True)) if names else []
    return replace(program, twists=tuple(twists))
