"""Results written over operands: only where nobody can tell."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from kreg.rewriters import capture, program
from kreg.rewriters.memory import IN_PLACE, reuse


def captured(model: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return program.functional(capture.export_model(model, inputs)).module


def in_place(module: GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes if node.target in IN_PLACE.values()]


class Sums(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = x @ y
        kept = y * 2
        view = kept.transpose(0, 1)
        return fresh + kept, (kept - view) / (x + 1)


def test_a_fresh_operand_is_written_over_and_inputs_and_viewed_ones_are_not() -> None:
    x, y = torch.randn(5, 5), torch.randn(5, 5)
    module = captured(Sums(), x, y)
    want = Sums()(x, y)
    reuse(module)
    assert len(in_place(module)) == 2  # onto x @ y, and onto kept - view
    before = x.clone(), y.clone()
    got = module(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class LateUse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fresh = x @ x
        total = fresh + x
        return total * fresh


def test_an_operand_that_is_read_again_is_left_alone() -> None:
    x = torch.randn(4, 4)
    module = captured(LateUse(), x)
    reuse(module)
    assert len(in_place(module)) == 1  # the product, onto total or fresh; never the sum
    assert torch.equal(module(x)[0], LateUse()(x))


def test_nothing_is_written_over_where_gradients_flow() -> None:
    x = torch.randn(4, 4)
    exported = capture.export_model(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), (x,))
    module = program.functional(exported).module
    reuse(module)
    assert in_place(module) == []
