"""Operators called by PyTorch's bindings give what the operators gave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule

from kreg.rewriters.graph import aten
from kreg.rewriters.live.bindings import bind

PLACES = st.one_of(st.none(), st.integers(-9, 9), st.just(2**63 - 1))


def sliced(value: torch.Tensor, *args: object) -> GraphModule:
    graph = Graph()
    tensor = graph.placeholder("tensor")
    node = graph.call_function(aten.slice.Tensor, (tensor, *args))
    tensor.meta["val"], node.meta["val"] = value, aten.slice.Tensor(value, *args)
    graph.output((node,))
    return GraphModule(torch.nn.Module(), graph)


@given(size=st.integers(0, 6), dim=st.integers(-2, 1), start=PLACES, end=PLACES)
def test_a_slice_is_the_same_part_of_its_tensor(size: int, dim: int, start: int | None, end: int | None) -> None:
    value = torch.arange(4.0 * size).reshape((4, size) if dim % 2 else (size, 4))
    module = sliced(value, dim, start, end)
    before = module(value)[0]
    bind(module)
    assert aten.slice.Tensor not in {node.target for node in module.graph.nodes}
    after = module(value)[0]
    assert torch.equal(before, after) and before.stride() == after.stride()
    assert before.storage_offset() == after.storage_offset() or not before.numel()


@pytest.mark.parametrize("args", [(0, 0, 4, 2), (0, 1, 9, 3)])
def test_a_slice_with_steps_stays_the_operator(args: tuple[int, ...]) -> None:
    value = torch.arange(12.0).reshape(6, 2)
    module = sliced(value, *args)
    bind(module)
    assert aten.slice.Tensor in {node.target for node in module.graph.nodes}
    assert torch.equal(module(value)[0], value[args[1] : args[2] : args[3]])
