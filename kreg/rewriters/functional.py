"""One dialect for both front ends: functional, pre-dispatch ATen that autograd still differentiates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch.fx import GraphModule, Node

from kreg.rewriters.graph import STORED, aten


def functionalize(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any]:
    """The module without mutation, parameters and buffers as inputs, and the signature of its new graph.

    Args:
        module: a graph from ``torch.export`` or Dynamo.
        inputs: fake tensors, SymInts and constants, one for each of its inputs.
    """
    graph_module, signature = aot_export_module(
        without_idle_dropout(module), list(inputs), trace_joint=False, pre_dispatch=True
    )
    assert isinstance(graph_module, GraphModule)
    normalize(graph_module)
    trace_gradients(graph_module, inputs)
    return graph_module, signature


def without_idle_dropout(module: GraphModule) -> GraphModule:
    """The module with its own input in place of dropout that is off: what is written into one is written into both."""
    if not any(_is_idle(node) for part in _graphs(module) for node in part.graph.nodes):
        return module
    module = copy.deepcopy(module)
    for part in _graphs(module):
        for node in list(part.graph.nodes):
            if _is_idle(node):
                node.replace_all_uses_with(node.args[0])
                part.graph.erase_node(node)
        part.recompile()
    return module


def _graphs(module: GraphModule) -> list[GraphModule]:
    return [part for part in module.modules() if isinstance(part, GraphModule)]


def _is_idle(node: Node) -> bool:
    """Dropout that is off, called as an operator or, in Dynamo's graphs, as a function."""
    if node.target not in (aten.dropout.default, torch.nn.functional.dropout) or len(node.args) < 3:
        return False
    return bool(node.args[1] == 0.0 or not node.args[2])


def trace_gradients(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Marks the nodes through which gradients flow (``meta["trains"]``), from the inputs that require one.

    Also those that stop a gradient (``meta["cut"]``), which may be that of an input that requires none as yet.
    """
    given = iter(inputs)
    enabled = torch.is_grad_enabled()
    could: dict[Node, bool] = {}
    for node in module.graph.nodes:
        floating = _carries_gradient(node.meta.get("val"))
        if node.op == "placeholder":
            trains = bool(getattr(next(given, None), "requires_grad", False))
            could[node] = floating and STORED not in node.meta
        elif node.target is torch._C._set_grad_enabled:
            enabled, trains = node.args[0], False
            could[node] = False
        else:
            passes = enabled and floating and node.target is not aten.detach.default
            trains = passes and any(source.meta["trains"] for source in node.all_input_nodes)
            reached = any(could[source] for source in node.all_input_nodes)
            could[node] = passes and reached
            node.meta["cut"] = floating and reached and not passes
        node.meta["trains"] = trains


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    return isinstance(value, (tuple, list)) and any(_carries_gradient(v) for v in value)


def normalize(module: GraphModule) -> None:
    """Drops what has no meaning for a rule: metadata assertions, dead nodes.

    Copies get a derivative.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.copy.default:
            _differentiable_copy(node)
    graph.eliminate_dead_code()
    module.recompile()


def drop_idle_switches(module: GraphModule) -> None:
    """Drops gradient switches with nothing between them and the next, or that change nothing: gradients start on."""
    enabled = True
    for node in list(module.graph.nodes):
        if node.target is not torch._C._set_grad_enabled:
            continue
        if node.next.target is node.target or node.args[0] == enabled:
            module.graph.erase_node(node)
        else:
            enabled = node.args[0]
    module.recompile()


def _differentiable_copy(node: Node) -> None:
    """``copy(dst, src)`` has no derivative; the value it is, src broadcast to dst's shape and dtype, has one."""
    destination, source = node.args[:2]
    assert isinstance(destination, Node) and isinstance(source, Node)
    graph = node.graph
    with graph.inserting_before(node):
        new = source
        if source.meta["val"].shape != destination.meta["val"].shape:
            new = graph.call_function(aten.expand_as.default, (source, destination))
            new.meta = dict(node.meta)
            new.meta["val"] = source.meta["val"].expand(destination.meta["val"].shape)
        if source.meta["val"].dtype != destination.meta["val"].dtype:
            new = graph.call_function(aten.to.dtype, (new, destination.meta["val"].dtype))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
