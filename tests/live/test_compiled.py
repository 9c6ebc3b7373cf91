"""Calls past Dynamo's wrapper: only where Dynamo's own guards hold, and only for what is wholly in one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kreg
from kreg.rewriters.live.calls import attached
from kreg.rewriters.live.compiled import CompiledCall


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.scale = 0.5
        self.chatty = False

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        if self.chatty:
            torch._dynamo.graph_break()
        return x + self.o(out.transpose(1, 2).flatten(2))


def stack(chatty=False):
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(3))).eval()
    for layer in model:
        layer.chatty = chatty
    return model, copy.deepcopy(model)


X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


class Wrapped:
    """Counts the calls that go through ``torch.compile``."""

    def __init__(self, call: CompiledCall, monkeypatch):
        self.count, compiled = 0, call._compiled

        def counting(*args, **kwargs):
            self.count += 1
            return compiled(*args, **kwargs)

        counting._isolate_recompiles_id = compiled._isolate_recompiles_id
        monkeypatch.setattr(call, "_compiled", counting)


@pytest.fixture
def rewritten(monkeypatch):
    model, original = stack()
    kreg.rewrite(model, verify=False, example_inputs=(X,))
    return model, original, Wrapped(attached(model).fixed, monkeypatch)


def same(model, original, x=X):
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))


@torch.no_grad()
def test_a_covered_call_does_not_go_through_the_wrapper(rewritten):
    model, original, wrapped = rewritten
    same(model, original)  # without gradients: another graph than the first
    before = wrapped.count
    same(model, original, X + 1)
    assert wrapped.count == before
    assert kreg.report(model).calls.rewritten == 2


def test_what_the_guards_saw_change_goes_back_to_it(rewritten):
    model, original, wrapped = rewritten
    same(model, original)
    for each in (model, original):
        each[1].scale = 0.25
    before = wrapped.count
    same(model, original)
    assert wrapped.count > before

    def shifted(module, args, output):
        return output + 1

    for each in (model, original):
        each[2].qkv.register_forward_hook(shifted)
    same(model, original)


def test_a_reset_of_dynamo_leaves_nothing_behind(rewritten):
    model, original, wrapped = rewritten
    same(model, original)
    torch._dynamo.reset()
    before = wrapped.count
    same(model, original)
    assert wrapped.count > before


def test_a_stance_is_heard(rewritten):
    model, original, _ = rewritten
    same(model, original)
    before = kreg.report(model).calls
    with torch.compiler.set_stance("force_eager"):
        same(model, original)
    after = kreg.report(model).calls
    assert (after.rewritten, after.original) == (before.rewritten, before.original + 1)


def test_a_layer_in_two_graphs_is_left_to_dynamo(monkeypatch):
    model, original = stack(chatty=True)
    kreg.rewrite(model, verify=False, example_inputs=(X,))
    wrapped = Wrapped(attached(model).fixed, monkeypatch)
    same(model, original)
    before = wrapped.count
    same(model, original)
    assert wrapped.count == before + 3
    assert kreg.report(model).calls.original == 0
