"""Index notation simplifies by identities only: every expression built means what it says, at every index."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten
from tests.rewriters.evaluate import Chain, environments, evaluate, lifted, whole

S = sympy.Symbol("s", positive=True, integer=True)
X, Y, Z, W = n.Var("x", 4), n.Var("y", 3), n.Var("z", 1), n.Var("w", S)
VARIABLES = (X, Y, Z, W)
RANGE = (2, 4)
"""What is known of the symbolic size; each value in it is tried."""

Env = dict[n.Var, int]


@dataclass(frozen=True)
class Both:
    """An expression as the constructors built it, and what it should be worth."""

    expr: n.Expr
    worth: Callable[[Env, int], int]


def constant(value: int) -> Both:
    return Both(n.Const(value), lambda env, s: value)


def variable(v: n.Var) -> Both:
    return Both(v, lambda env, s: env[v])


LEAVES = st.one_of(
    st.integers(-9, 9).map(constant),
    st.sampled_from(VARIABLES).map(variable),
    st.just(Both(n.size(S), lambda env, s: s)),
    st.just(Both(n.size(3 * S - 2), lambda env, s: 3 * s - 2)),
)
DIVISORS = st.one_of(
    st.integers(1, 6).map(constant),
    st.integers(-4, -1).map(constant),
    st.just(Both(n.size(S), lambda env, s: s)),
)


@st.composite
def integers(draw: st.DrawFn, depth: int) -> Both:
    """A random integer expression."""
    if depth == 0:
        return draw(LEAVES)
    kind = draw(st.sampled_from(["leaf", "add", "sub", "mul", "times", "floordiv", "mod", "where", "indicator"]))
    if kind == "leaf":
        return draw(LEAVES)
    if kind == "indicator":
        p = draw(booleans(depth - 1))
        return Both(n.indicator(p.expr), lambda env, s: int(p.worth(env, s)))
    a = draw(integers(depth - 1))
    if kind == "mul":
        c = draw(st.integers(-4, 4))
        return Both(n.mul(n.Const(c), a.expr), lambda env, s: c * a.worth(env, s))
    if kind in ("floordiv", "mod"):
        d = draw(DIVISORS)
        if kind == "mod":
            return Both(n.mod(a.expr, d.expr), lambda env, s: a.worth(env, s) % d.worth(env, s))
        return Both(n.floordiv(a.expr, d.expr), lambda env, s: a.worth(env, s) // d.worth(env, s))
    if kind == "times":
        d = draw(DIVISORS)
        return Both(n.times(a.expr, d.expr), lambda env, s: a.worth(env, s) * d.worth(env, s))
    b = draw(integers(depth - 1))
    if kind == "where":
        p = draw(booleans(depth - 1))
        return Both(
            n.where(p.expr, a.expr, b.expr),
            lambda env, s: a.worth(env, s) if p.worth(env, s) else b.worth(env, s),
        )
    if kind == "sub":
        return Both(n.sub(a.expr, b.expr), lambda env, s: a.worth(env, s) - b.worth(env, s))
    return Both(n.add(a.expr, b.expr), lambda env, s: a.worth(env, s) + b.worth(env, s))


@st.composite
def booleans(draw: st.DrawFn, depth: int) -> Both:
    """A random condition."""
    kinds = ["le0", "eq0", "truth"] + (["not", "and", "or", "where"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    if kind in ("le0", "eq0", "truth"):
        a = draw(integers(max(0, depth - 1)))
        if kind == "le0":
            return Both(n.le0(a.expr), lambda env, s: a.worth(env, s) <= 0)
        if kind == "eq0":
            return Both(n.eq0(a.expr), lambda env, s: a.worth(env, s) == 0)
        return Both(n.truth(a.expr), lambda env, s: a.worth(env, s) != 0)
    p = draw(booleans(depth - 1))
    if kind == "not":
        return Both(n.not_(p.expr), lambda env, s: not p.worth(env, s))
    q = draw(booleans(depth - 1))
    if kind == "and":
        return Both(n.and_(p.expr, q.expr), lambda env, s: p.worth(env, s) and q.worth(env, s))
    if kind == "or":
        return Both(n.or_(p.expr, q.expr), lambda env, s: p.worth(env, s) or q.worth(env, s))
    c = draw(booleans(depth - 1))
    return Both(
        n.where(c.expr, p.expr, q.expr),
        lambda env, s: p.worth(env, s) if c.worth(env, s) else q.worth(env, s),
    )


def known(size: sympy.Expr) -> tuple[int, int | None]:
    """The range of an expression in the one symbolic size, which is monotone in it."""
    ends = [int(size.subs(S, value)) for value in RANGE]
    return min(ends), max(ends)


def holds(both: Both, variables: tuple[n.Var, ...] = VARIABLES) -> None:
    """The expression is worth what it should be, at every index and every size in range."""
    for s in range(RANGE[0], RANGE[1] + 1):
        for env in environments(variables, {S: s}):
            got, want = evaluate(both.expr, env, sizes={S: s}), both.worth(env, s)
            assert got == want, f"{both.expr} is {got}, not {want}, at {env}, s={s}"


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_integer_expressions_keep_their_value_through_every_simplification(data: st.DataObject) -> None:
    with n.sizes_within(known):
        holds(data.draw(integers(3)))


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_conditions_keep_their_value_through_every_simplification(data: st.DataObject) -> None:
    with n.sizes_within(known):
        holds(data.draw(booleans(3)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_conditions_keep_their_value_where_nothing_is_known_of_the_sizes(data: st.DataObject) -> None:
    holds(data.draw(booleans(2)))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_bounds_hold_at_every_index(data: st.DataObject) -> None:
    with n.sizes_within(known):
        both = data.draw(integers(3))
        low, high = n.lower(both.expr), n.upper(both.expr)
        for s in range(RANGE[0], RANGE[1] + 1):
            worth = [both.worth(env, s) for env in environments(VARIABLES, {S: s})]
            assert low is None or evaluate(low, {}, sizes={S: s}) <= min(worth)
            assert high is None or evaluate(high, {}, sizes={S: s}) >= max(worth)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_substitution_is_evaluation_at_the_substituted_index(data: st.DataObject) -> None:
    """What is put in for an index stays within its range."""
    into = data.draw(
        st.sampled_from([Y, n.add(Y, n.ONE), n.ZERO, n.Const(3), n.sub(n.Const(3), Y), n.floordiv(X, n.Const(2))])
    )
    with n.sizes_within(known):
        both = data.draw(st.one_of(integers(3), booleans(2)))
        new = n.substitute(both.expr, {X: into})
        holds(Both(new, lambda env, s: both.worth({**env, X: evaluate(into, env)}, s)))


def test_an_index_replaced_by_another_is_gone() -> None:
    e = n.where(n.le0(n.sub(X, Y)), n.floordiv(n.add(X, n.ONE), n.Const(2)), n.ZERO)
    assert X in e.variables and n.substitute(e, {X: Y}).variables <= {Y}


def test_expressions_that_are_equal_by_arithmetic_are_one_expression() -> None:
    assert n.le0(n.sub(X, Y)) == n.not_(n.le0(n.add(n.sub(Y, X), n.ONE)))
    assert n.floordiv(n.add(n.mul(n.Const(4), Y), X), n.Const(4)) == Y
    assert n.mod(n.add(n.mul(n.Const(4), Y), X), n.Const(4)) == X
    j, p = n.Var("j", 9), n.Var("p", 40)
    ready = n.le0(n.add(n.sub(j, n.floordiv(n.add(p, n.ONE), n.Const(4))), n.ONE))
    assert ready == n.le0(n.sub(n.mul(n.Const(4), n.add(j, n.ONE)), n.add(p, n.ONE)))


def regroupings(total: list[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes with the product of ``total``: its factors shuffled, joined in runs, ones strewn in."""

    @st.composite
    def shape(draw: st.DrawFn) -> tuple[int, ...]:
        factors = draw(st.permutations(total))
        sizes: list[int] = []
        for factor in factors:
            if sizes and draw(st.booleans()):
                sizes[-1] *= factor
            else:
                sizes.append(factor)
            if draw(st.integers(0, 5)) == 0:
                sizes.append(1)
        return tuple(sizes[:8]) if prod(sizes[:8]) == prod(total) else (prod(total),)

    return shape()


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4).flatmap(lambda f: st.tuples(regroupings(f), regroupings(f))))
@settings(max_examples=300, deadline=None)
def test_a_reshape_reads_where_row_major_order_says(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    chain = Chain()
    source = torch.arange(prod(old)).reshape(old)
    node = chain.call(aten.reshape.default, chain.input(source), list(new))
    e, index = lifted(node)
    assert isinstance(e, n.Load) and e.node is node.args[0], "a reshape of known sizes is always looked through"
    assert torch.equal(whole(e, index, chain.data, node.meta["val"]), source.reshape(new))


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, torch.fx.Node]:
    """Random layout operators one after the other, on a tensor of distinct numbers."""
    chain = Chain()
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    node = chain.input(torch.arange(prod(shape)).reshape(shape))
    for _ in range(draw(st.integers(1, 5))):
        value = node.meta["val"]
        rank, sizes = value.dim(), list(value.shape)
        kinds = ["unsqueeze", "flatten", "repeat", "cat", "pad", "stack"] + ([] if rank == 0 else _WITH_DIM)
        kind = draw(st.sampled_from(kinds))
        if value.numel() > 400 or rank > 5:
            kind = "slice" if rank else "flatten"
        dim = draw(st.integers(-rank, rank - 1)) if rank else 0
        size = sizes[dim] if rank else 1
        match kind:
            case "unsqueeze":
                node = chain.call(aten.unsqueeze.default, node, draw(st.integers(-rank - 1, rank)))
            case "flatten":
                node = chain.call(aten.reshape.default, node, [-1])
            case "repeat":
                extra = draw(st.integers(0, 1))
                node = chain.call(aten.repeat.default, node, [draw(st.integers(1, 2)) for _ in range(rank + extra)])
            case "cat" if rank:
                node = chain.call(aten.cat.default, [node, node], dim)
            case "stack" if rank:
                node = chain.call(aten.stack.default, [node, node], dim)
            case "pad" if rank:
                pads = [draw(st.integers(0, 2)) for _ in range(2)]
                node = chain.call(aten.constant_pad_nd.default, node, pads, -7)
            case "permute":
                node = chain.call(aten.permute.default, node, draw(st.permutations(range(rank))))
            case "transpose":
                node = chain.call(aten.transpose.int, node, dim, draw(st.integers(-rank, rank - 1)))
            case "slice":
                start, end = draw(st.integers(-size - 3, size - 1)), draw(st.integers(1, size + 2))
                step = draw(st.integers(1, 2))
                if len(range(size)[start:end:step]):
                    node = chain.call(aten.slice.Tensor, node, dim, start, end, step)
            case "select":
                node = chain.call(aten.select.int, node, dim, draw(st.integers(-size, size - 1)))
            case "flip":
                node = chain.call(aten.flip.default, node, [dim])
            case "repeat_interleave":
                node = chain.call(aten.repeat_interleave.self_int, node, draw(st.integers(1, 3)), dim)
            case "squeeze":
                node = chain.call(aten.squeeze.dim, node, dim)
            case "expand":
                node = chain.call(aten.expand.default, node, [2, *(-1 for _ in sizes)])
            case "split":
                pieces = chain.call(aten.split.Tensor, node, draw(st.integers(1, 3)), dim)
                which = draw(st.integers(0, len(pieces.meta["val"]) - 1))
                node = _item(chain, pieces, which)
            case "unbind":
                node = _item(chain, chain.call(aten.unbind.int, node, dim), draw(st.integers(0, size - 1)))
    return chain, node


_WITH_DIM = [
    *(
        "permute",
        "transpose",
        "slice",
        "select",
        "flip",
        "repeat_interleave",
        "squeeze",
        "expand",
        "split",
        "unbind",
    ),
]


def _item(chain: Chain, pieces: torch.fx.Node, which: int) -> torch.fx.Node:
    node = chain.graph.call_function(operator.getitem, (pieces, which))
    node.meta["val"] = chain.data[node] = pieces.meta["val"][which]
    return node


@given(chains())
@settings(max_examples=400, deadline=None)
def test_a_chain_of_views_reads_what_torch_reads(built: tuple[Chain, torch.fx.Node]) -> None:
    chain, node = built
    e, index = lifted(node)
    assert torch.equal(whole(e, index, chain.data, node.meta["val"]), node.meta["val"]), f"{e}"


@pytest.mark.parametrize("start", [-9, -5, -2, 0, 3])
def test_a_slice_from_the_end_stops_at_the_front(start: int) -> None:
    chain = Chain()
    node = chain.call(aten.slice.Tensor, chain.input(torch.arange(5)), 0, start, 2**63 - 1)
    e, index = lifted(node)
    assert torch.equal(whole(e, index, chain.data, node.meta["val"]), torch.arange(5)[start:])


def test_a_product_is_rebuilt_as_it_was_made() -> None:
    a, b = (n.Load(name, (X,), True) for name in "ab")
    whole = n.mul(n.Const(-1), n.mul(a, b))
    at = {X: n.add(Y, n.ONE)}
    assert n.substitute(whole, at) == n.mul(n.Const(-1), n.mul(n.substitute(a, at), n.substitute(b, at)))
