"""A mask that a long way of activations leads to is checked for any values of what its reading does not look into."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import kreg
from kreg.rewriters import program
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find
from kreg.rewriters.mask_check import check
from kreg.rewriters.mask_check.nodes import NODES
from kreg.rewriters.site import Site


class ByActivations(nn.Module):
    """Keys are dropped where what many layers give is negative, by what is added or as a boolean of the operator's."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        for _ in range(NODES // 2):
            x = x.sin() * 1.01
        dropped = (nn.functional.interpolate(x, size=(q.shape[2], k.shape[2])).sigmoid() < 0.5).detach()
        dropped = dropped & ~dropped.all(-1, keepdim=True)
        if self.form == "added":
            added = torch.zeros_like(dropped, dtype=q.dtype).masked_fill(dropped, -torch.inf)
            return (q @ k.mT * 0.3 + added).softmax(-1) @ v
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~dropped)


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, x = (torch.randn(2, 2, s, 8, generator=generator) for s in (6, 9, 9, 4))
    return q, k, v, x


def graph_of(form: str) -> tuple[GraphModule, Site]:
    module = program.functional(export_model(ByActivations(form), inputs())).module
    (site,) = find(module.graph).sites
    return module, site


@pytest.mark.parametrize("form", ["added", "fused"])
def test_a_mask_behind_many_layers_is_raised_and_verified(form: str) -> None:
    (site,) = kreg.analyse(ByActivations(form), inputs()).sites
    assert site.status == "replaced", site.reason
    assert site.mask == {"kind": "input", "input": ["mask"]}
    assert site.verify is not None
    assert site.verify.passed


@pytest.mark.parametrize("form", ["added", "fused"])
def test_a_mask_behind_many_layers_that_is_turned_round_fails(form: str) -> None:
    module, site = graph_of(form)
    assert check(module, site).passed
    turned = site.operands["mask"].then(torch.ops.aten.logical_not.default)
    checked = check(module, replace(site, operands={**site.operands, "mask": turned}))
    assert checked.passed is False
    assert checked.difference is not None
