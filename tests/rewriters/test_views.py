"""Chains of views as the fewest calls: the same numbers, from fewer calls."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx

from kreg.rewriters.graph import aten
from kreg.rewriters.views import PERMUTED, RESHAPED, compose

VIEWS = RESHAPED | PERMUTED


def traced(views, x):
    """The views between two operators that are none."""
    module = make_fx(lambda t: views(t.neg()).cos(), pre_dispatch=True, tracing_mode="fake")(x)
    before = count(module)
    compose(module)
    return module, before


def count(module):
    return sum(node.target in VIEWS for node in module.graph.nodes)


@st.composite
def chains(draw):
    """A shape, and views of it one after the other."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    steps, now = [], shape
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["transpose", "permute", "reshape", "squeeze", "unsqueeze"]))
        if kind == "transpose":
            a, b = (draw(st.integers(-len(now), len(now) - 1)) for _ in range(2)) if now else (0, 0)
            steps.append(("transpose", a, b))
            order = list(range(len(now)))
            order[a], order[b] = order[b], order[a]
            now = tuple(now[d] for d in order)
        elif kind == "permute":
            order = draw(st.permutations(range(len(now))))
            steps.append(("permute", *order))
            now = tuple(now[d] for d in order)
        elif kind == "reshape":
            now = draw(shapes(prod(now)))
            steps.append(("reshape", *now))
        elif kind == "squeeze" and len(now) > 1 and 1 in now:
            steps.append(("squeeze", now.index(1)))
            now = now[: now.index(1)] + now[now.index(1) + 1 :]
        else:
            d = draw(st.integers(0, len(now)))
            steps.append(("unsqueeze", d))
            now = (*now[:d], 1, *now[d:])
    return shape, steps


@st.composite
def shapes(draw, elements):
    sizes = []
    while elements > 1 or not sizes:
        size = draw(st.sampled_from([d for d in range(1, elements + 1) if elements % d == 0]))
        sizes.append(size)
        elements //= size
        if len(sizes) == 4:
            return (*sizes, elements)
    return tuple(sizes)


@settings(max_examples=60, deadline=None)
@given(chains())
def test_a_chain_gives_what_it_gave_with_no_more_calls(chain):
    shape, steps = chain

    def views(t):
        for name, *arguments in steps:
            t = getattr(t, name)(*arguments)
        return t

    x = torch.arange(float(prod(shape))).reshape(shape).requires_grad_()
    module, before = traced(views, x)
    found, wanted = module(x), views(x.neg()).cos()
    assert found.shape == wanted.shape and torch.equal(found, wanted)
    assert count(module) <= before
    weight = torch.randn_like(wanted)
    assert torch.equal(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted)))


def test_views_around_an_attention_are_a_reshape_and_a_permute():
    def keys(t):
        return t.unflatten(2, (2, 8)).squeeze(0).permute(1, 0, 2).unsqueeze(1)

    def heads(t):
        return t.unsqueeze(0).flatten(1, 2).reshape(1, 4, 16, 8).transpose(1, 2).reshape(1, 16, -1)

    for views, shape, calls in ((keys, (1, 16, 16), 2), (heads, (2, 2, 16, 8), 2)):
        module, _ = traced(views, torch.randn(shape))
        assert count(module) == calls, module.code


def test_a_view_with_another_use_stays():
    def f(t):
        seen = t.neg().unflatten(0, (2, 3))
        return seen.transpose(0, 1).unsqueeze(0).cos(), seen.sin()

    module = make_fx(f, pre_dispatch=True, tracing_mode="fake")(torch.randn(6, 4))
    compose(module)
    assert sum(node.target is aten.unflatten.int or node.target is aten.view.default for node in module.graph.nodes)
    x = torch.randn(6, 4)
    assert all(torch.equal(a, b) for a, b in zip(module(x), f(x), strict=True))


def test_views_that_undo_each_other_are_gone_and_what_they_viewed_stays_what_it_is():
    def f(t):
        seen = t.neg()
        return seen.transpose(0, 1).transpose(0, 1).cos() + seen

    module, _ = traced(f, x := torch.randn(6, 4))
    assert count(module) == 0
    assert torch.equal(module(x), f(x.neg()).cos())
    assert all(tuple(n.meta["val"].shape) == (6, 4) for n in module.graph.nodes if "val" in n.meta)
