"""A graph of Dynamo's as something to call: cut where a part of it has to stay a part.

What a graph checkpoints is computed again in the backward pass, and what leaves the process is done once by each rank:
the graph around them runs as Dynamo gave it, and the parts are captured each by itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.utils.checkpoint
from torch.fx import GraphModule, Node

from kreg.rewriters.live.cuts import local_parts
from kreg.rewriters.live.fingerprint import fingerprint
from kreg.rewriters.live.variants import CapturedGraph, Compiled

Known = dict[Hashable, CapturedGraph]
"""The graphs of a model so far, by what they compute."""


def captured(module: GraphModule, *rest: Any, known: Known | None = None, **options: Any) -> Compiled:
    """A graph of Dynamo's as something to call; the other arguments are those of `CapturedGraph`."""
    known = {} if known is None else known
    checkpoint = torch.ops.higher_order.tag_activation_checkpoint
    checkpoints = [node for node in module.graph.nodes if node.target is checkpoint]
    if checkpoints:
        for node in checkpoints:
            body = module.get_submodule(str(node.args[0].target))
            assert isinstance(body, GraphModule)
            _replace(node, _checkpointed(captured(body, *rest, known=known, **options), node), node.args[1:])
        return _finished(module)
    cut = local_parts(module)
    if cut is None:
        return _graph(module, known, *rest, **options)
    line, local = cut
    for node in local:
        part = line.get_submodule(str(node.target))
        assert isinstance(part, GraphModule)
        _replace(node, _function(_graph(part, known, *rest, **options)), node.args)
    return _finished(line)


def _graph(module: GraphModule, known: Known, *rest: Any, **options: Any) -> Compiled:
    """The graph, or one that is the same code: what that one assumed of sizes is checked at each call."""
    key = fingerprint(module)
    if key is None:
        return CapturedGraph(module, *rest, **options)
    if key not in known:
        known[key] = CapturedGraph(module, *rest, **options)
        return known[key]
    same, original = known[key], module.forward

    def call(*inputs: Any) -> Any:
        return same(*inputs) if same.holds(inputs) else original(*inputs)

    return call


def _replace(node: Node, function: Compiled, args: Any) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_function(function, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _finished(module: GraphModule) -> Compiled:
    module.recompile()
    forward: Compiled = module.forward
    return forward


def _function(body: Compiled) -> Compiled:
    """What a node calls has to be a function."""

    def part(*inputs: Any) -> Any:
        return body(*inputs)

    return part


def _checkpointed(body: Compiled, node: Node) -> Compiled:
    options: dict[str, Any] = dict(node.kwargs)
    if context := node.meta.get("_checkpoint_context_fn"):
        options["context_fn"] = context

    def checkpointed(*inputs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(body, *inputs, **options)

    return checkpointed
