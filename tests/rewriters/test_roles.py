"""Which dimension is batch and which is heads, where sizes alone do not say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kreg.rewriters import program as programs
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find
from kreg.rewriters.raising import raise_sites


class Grouped(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Repeated(nn.Module):
    def forward(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return (q @ k.mT * 0.5).softmax(-1) @ v


class OneHead(nn.Module):
    def forward(self, q, k, v):
        return (q @ k[:, None].mT * 0.5).softmax(-1) @ v[:, None]


def shapes(module, *inputs):
    graph = programs.functional(export_model(module, inputs, None)).module
    raised = raise_sites(graph, find(graph.graph).sites)
    ((node, *rest),) = [tuple(raised.ops.values())]
    assert not rest
    return [tuple(arg.meta["val"].shape) for arg in node.args[:3]]


@pytest.mark.parametrize("module", [Grouped(), Repeated()])
@pytest.mark.parametrize("batch", [1, 3])
def test_grouped_heads_stay_heads_also_in_a_batch_of_one(module, batch):
    q, k, v = (torch.randn(batch, heads, 5, 8) for heads in (4, 2, 2))
    assert shapes(module, q, k, v) == [(batch, 4, 5, 8), (batch, 2, 5, 8), (batch, 2, 5, 8)]


def test_one_head_that_all_share_leaves_the_batch_a_batch():
    q, k, v = torch.randn(3, 4, 5, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    assert shapes(OneHead(), q, k, v) == [(3, 4, 5, 8), (3, 1, 5, 8), (3, 1, 5, 8)]
