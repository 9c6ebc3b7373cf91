"""Sizes that depend on data are verified at numbers that satisfy what the graph asserts of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from kreg.api import analyse
from kreg.rewriters.capture import export_model
from kreg.rewriters.report import Report
from kreg.rewriters.sizes import Sizes


class BiasOfAGrid(nn.Module):
    """Attention over a grid of keys, whose height and width are read from a tensor to make the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Linear(16, 2)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        height, width = grid[0], grid[1]
        rows = torch.arange(0, height, dtype=q.dtype) / height
        columns = torch.arange(0, width, dtype=q.dtype) / width
        places = (rows[:, None] - columns[None, :]).flatten()
        bias = self.slopes(q).transpose(1, 2)[..., None] * places
        q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v))
        return (q @ k.transpose(-1, -2) * 8**-0.5 + bias).softmax(-1) @ v


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16), torch.randn(2, 12, 16), torch.randn(2, 12, 16), torch.tensor([4, 3])


def replaced(report: Report) -> list[tuple[str, bool]]:
    return [(site.status, site.verify is not None and site.verify.passed) for site in report.sites]


def test_a_bias_of_as_many_places_as_there_are_keys_is_verified() -> None:
    report = analyse(export_model(BiasOfAGrid(), inputs()), None, device="cpu", verify=True)
    assert replaced(report) == [("replaced", True)], [site.reason for site in report.sites]


def test_so_it_is_where_the_number_of_keys_is_symbolic() -> None:
    keys = Dim("keys", min=4, max=4096)
    shapes = ({}, {1: keys}, {1: keys}, {})
    report = analyse(export_model(BiasOfAGrid(), inputs(), shapes), None, device="cpu", verify=True)
    assert replaced(report) == [("replaced", True)], [site.reason for site in report.sites]


@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_make_every_assertion_of_the_graph_true(dynamic: bool) -> None:
    shapes = ({}, {1: Dim("keys", min=4, max=4096)}, {1: Dim("keys", min=4, max=4096)}, {}) if dynamic else None
    graph = export_model(BiasOfAGrid(), inputs(), shapes).graph
    sizes = Sizes(graph, graph.nodes)
    asserted = [node.args[0] for node in graph.nodes if node.target is torch.ops.aten._assert_scalar.default]
    assert len(asserted) > 1
    assert all(sizes.number(condition.meta["val"]) for condition in asserted)
