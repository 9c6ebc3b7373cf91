"""The quickest way to call an operator from Python: PyTorch's own binding, which does not go through the schema.

Each is the same entry of the dispatcher as the overload in the graph; modes and subclasses see the same operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from kreg.rewriters.graph import aten

FUNCTIONS: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.flatten.using_ints: torch.flatten,
    aten.linear.default: torch._C._nn.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.sigmoid.default: torch.sigmoid,
    aten.silu.default: torch._C._nn.silu,
    aten.squeeze.dim: torch.squeeze,
    aten.sub.Tensor: torch.sub,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
}
"""Overloads, and the function with the same positional arguments."""

METHODS: dict[Any, str] = {
    aten.add_.Tensor: "add_",
    aten.div_.Tensor: "div_",
    aten.expand.default: "expand",
    aten.mul_.Tensor: "mul_",
    aten.sub_.Tensor: "sub_",
    aten.unflatten.int: "unflatten",
    aten.view.default: "view",
}
"""Overloads, and the method of their first argument."""


def bind(module: GraphModule) -> None:
    """Calls what it can by PyTorch's bindings: calls whose first argument is a tensor, with no keywords."""
    for node in module.graph.nodes:
        if node.op != "call_function" or node.kwargs or not node.args:
            continue
        if node.target is aten.slice.Tensor and (part := _narrowed(node)) is not None:
            node.target, node.args = torch.narrow, part
        elif node.target in METHODS and isinstance(node.args[0], Node):
            node.op, node.target = "call_method", METHODS[node.target]
        elif node.target in FUNCTIONS and isinstance(node.args[0], (Node, list, tuple)):
            node.target = FUNCTIONS[node.target]
    module.recompile()


def _narrowed(node: Node) -> tuple[Any, ...] | None:
    """A slice of a dimension of known size as the arguments of ``torch.narrow``, which has a binding."""
    given: list[Any] = [*node.args, *(0, 0)[len(node.args) - 1 :]]
    tensor, dim, start, *rest = given
    before, after = tensor.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or rest[1:] not in ([], [1]):
        return None
    size, length, start = before.shape[dim], after.shape[dim], start or 0
    if not all(type(number) is int for number in (size, length, start)):
        return None
    return tensor, dim, min(max(start + size, 0) if start < 0 else start, size), length
