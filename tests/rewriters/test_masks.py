"""What a conjunction of conditions is read as is that conjunction, whichever of them go together."""

from __future__ import annotations

import itertools

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from kreg.rewriters import masks
from kreg.rewriters import notation as n
from tests.rewriters.evaluate import evaluate

BATCH, QUERIES, KEYS = 2, 5, 6
GRAPH = Graph()
DOCUMENTS, PADDING = GRAPH.placeholder("documents"), GRAPH.placeholder("padding")
DATA = {
    DOCUMENTS: torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 2, 3, 3, 3]]),
    PADDING: torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}
B, Q, K = n.Var("b", BATCH), n.Var("s", QUERIES), n.Var("t", KEYS)

OFFSETS = st.integers(-1, 3)
WIDTHS = st.integers(2, 4)


def at(offset: int) -> n.Expr:
    return n.add(Q, n.Const(offset))


def load(node: Node, place: n.Expr) -> n.Expr:
    return n.Load(node, (B, place), True)


def at_most(a: n.Expr, b: n.Expr) -> n.Expr:
    return n.le0(n.sub(a, b))


def near(offset: int, width: int) -> n.Expr:
    return at_most(at(offset - width + 1), K)


def same_chunk(offset: int, width: int) -> n.Expr:
    return n.eq0(n.sub(n.floordiv(at(offset), n.Const(width)), n.floordiv(K, n.Const(width))))


def same_document(offset: int) -> n.Expr:
    return n.eq0(n.sub(load(DOCUMENTS, at(offset)), load(DOCUMENTS, K)))


def compressed(ratio: int, offset: int) -> n.Expr:
    return at_most(n.mul(n.Const(ratio), n.add(K, n.ONE)), at(offset + 1))


CAUSAL = st.builds(lambda c: at_most(K, at(c)), OFFSETS)
BANDS = CAUSAL | st.builds(near, OFFSETS, WIDTHS) | st.builds(same_chunk, OFFSETS, WIDTHS)
CONDITIONS = st.one_of(
    BANDS,
    st.builds(same_document, st.integers(0, 3)),
    st.builds(compressed, st.integers(2, 3), OFFSETS),
    st.builds(lambda p, band: n.or_(at_most(K, n.Const(p - 1)), band), st.integers(1, 3), BANDS),
    st.builds(lambda value: n.not_(n.eq0(n.sub(load(PADDING, K), n.Const(value)))), st.just(0)),
    st.builds(lambda c: at_most(n.add(Q, K), n.Const(c)), st.integers(3, 8)),
)


def keeps(s: masks.Structure, b: int, q: int, k: int) -> bool:
    """Whether a structure keeps a key, by the meaning that its fields are given."""
    p, env = q + s.offset, {B: b, Q: q, K: k}
    band = not s.causal or k <= p
    band &= not s.window or (k > p - s.window and (s.causal or k < p + s.window))
    band &= not s.chunk or k // s.chunk == p // s.chunk
    found = band or k < s.prefix
    found &= not s.ratio or (k + 1) * s.ratio <= p + 1
    if s.documents is not None:
        assert s.documents.node is DOCUMENTS
        found &= bool(DATA[DOCUMENTS][b, k] == DATA[DOCUMENTS][b, p])
    return found and all(evaluate(condition, env, DATA) for condition in (*s.padding, *s.rest))


@settings(max_examples=150, deadline=None)
@given(conditions=st.lists(CONDITIONS, min_size=1, max_size=4), square=st.booleans())
def test_a_conjunction_is_what_it_is_read_as(conditions: list[n.Expr], square: bool) -> None:
    keep = n.TRUE
    for condition in conditions:
        keep = n.and_(keep, condition)
    found = masks.read(keep, Q, K, (B,), square)
    event("read as more than tensors" if found.causal or found.chunk or found.ratio else "tensors")
    for b, q, k in itertools.product(range(BATCH), range(QUERIES), range(KEYS)):
        want = all(evaluate(condition, {B: b, Q: q, K: k}, DATA) for condition in conditions)
        assert keeps(found, b, q, k) == want, (b, q, k, found)
