"""What is shown around a near miss: a region read from product to product, whichever of its nodes failed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from kreg.rewriters.capture import export_model
from kreg.rewriters.program import functional
from kreg.rewriters.site import NearMiss
from kreg.rewriters.surroundings import surroundings


class Biased(nn.Module):
    """Attention whose bias takes a few steps to compute, between projections that are no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, distance: Tensor) -> Tensor:
        q = self.before(x)
        bias = distance.exp().sin().tanh().neg()
        weights = (q @ x.transpose(-1, -2) * 0.25 + bias).softmax(-1)
        out: Tensor = self.after((weights @ x).relu())
        return out


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Its graph."""
    return functional(export_model(Biased(), (torch.randn(2, 8, 16), torch.randn(8, 8)))).module.graph


def named(graph: Graph, name: str) -> Node:
    """A node by its name."""
    return next(node for node in graph.nodes if node.name == name)


def around(graph: Graph, failed: str, anchor: str = "softmax") -> dict[str, str]:
    """Names of what is shown around an anchor, each with its marks."""
    shown = surroundings(NearMiss("attention", named(graph, anchor), "it fails", named(graph, failed)))
    return {node.name: "".join(mark for mark in ("anchor", "failed", "read") if getattr(node, mark)) for node in shown}


def test_the_region_goes_from_the_products_of_the_scores_to_that_of_the_values(graph: Graph) -> None:
    found = around(graph, "add")
    region = [name for name, mark in found.items() if mark != "read"]
    assert region == ["matmul", "mul", "add", "softmax", "matmul_1"]
    assert {name for name, mark in found.items() if mark == "read"} == {"linear", "transpose", "neg", "x"}
    assert found["add"] == "failed" and found["softmax"] == "anchor"


def test_an_anchor_at_which_it_failed_has_both_marks(graph: Graph) -> None:
    assert around(graph, "softmax")["softmax"] == "anchorfailed"


@pytest.mark.parametrize("failed", ["neg", "sin", "distance"])
def test_a_node_beside_the_region_is_shown_with_its_way_into_it(graph: Graph, failed: str) -> None:
    way = ["distance", "exp", "sin", "tanh", "neg", "add"]
    found = around(graph, failed)
    assert set(way[way.index(failed) :]) <= set(found) and found[failed] == "failed"


def test_a_node_behind_the_region_is_shown_with_its_way_out_of_it(graph: Graph) -> None:
    found = around(graph, "linear_1")
    assert found["relu"] == "" and found["linear_1"] == "failed"


def test_an_anchor_without_products_is_shown_with_what_is_near(graph: Graph) -> None:
    found = around(graph, "sin", anchor="sin")
    assert {"distance", "exp", "sin", "tanh", "neg"} <= set(found)


def test_nodes_come_in_the_graphs_order_with_their_shapes(graph: Graph) -> None:
    shown = surroundings(NearMiss("attention", named(graph, "softmax"), "it fails"))
    order = [node.name for node in graph.nodes]
    assert [order.index(node.name) for node in shown] == sorted(order.index(node.name) for node in shown)
    softmax = next(node for node in shown if node.anchor)
    assert softmax.call == "aten.softmax.int(%add, -1)" and softmax.value == "float32[2, 8, 8]"
    assert softmax.failed and "test_surroundings.py:" in softmax.source
