"""Raising: a new graph in which each site is one op node. The rest stays as it was, node for node."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from kreg.registry.library import overload
from kreg.rewriters.graph import aten, upstream
from kreg.rewriters.layouts import loosen, restored
from kreg.rewriters.site import Calls, Extent, Operand, Output, Site, positional

log = logging.getLogger("kreg")

SITE = "kreg_site"
"""Key in an op node's ``meta``: the id of the site it stands for."""


@dataclass(frozen=True)
class Raised:
    """A graph of ops.

    Attributes:
        module: the new graph.
        ops: the op node of each site, by site id.
        removed: names of the captured nodes that each site made unnecessary; a node that several sites shared
            counts for the first of them.
        refused: by site id, why a site has no op node after all.
    """

    module: GraphModule
    ops: Mapping[str, Node]
    removed: Mapping[str, tuple[Node, ...]]
    refused: Mapping[str, str]


def raise_sites(module: GraphModule, sites: Sequence[Site]) -> Raised:
    """A copy of the graph with each site replaced by its op, kernels still open."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    ops: dict[str, Node] = {}
    refused: dict[str, str] = {}
    by_output = {site.outputs[0].node: site for site in sites}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        site = by_output.get(node)
        if site is None:
            continue
        try:
            ops[site.id], results = emit(graph, site, lambda n: copies[n])
        except Exception as error:  # what was added for it is dead code now
            log.debug("%s cannot be raised", site.id, exc_info=True)
            refused[site.id] = f"the op does not take its operands: {' '.join(str(error).split())[:200]}"
            continue
        for output, result in zip(site.outputs, results, strict=True):
            copies[output.node] = result
    loosen(ops.values())
    raised = [site for site in sites if site.id in ops]
    graph.eliminate_dead_code()
    _keep_gradients(graph, raised, copies)
    new = GraphModule(module, graph)
    new.meta = dict(module.meta)
    graph.lint()
    return Raised(new, ops, _removed(raised, copies, set(graph.nodes)), refused)


def _keep_gradients(graph: Graph, sites: Sequence[Site], copies: Mapping[Node, Node]) -> None:
    """What shifts all logits alike has a gradient of zero, which is another thing than none to who trains it.

    It is added to the result, times zero: an optimizer, and who waits for each parameter's gradient, get one.
    """
    lost = {
        node
        for node, copy in copies.items()
        if node.op == "placeholder" and node.meta.get("trains", False) and node.users and not copy.users
    }
    for site in sites if lost else ():
        result = site.outputs[0].node
        new, used = copies[result], lost.intersection(upstream([result], set()))
        lost -= used
        for node in sorted(used):
            readers = list(new.users)
            with graph.inserting_before(new.next):
                zero = graph.call_function(aten.mul.Scalar, (copies[node], 0))
                summed = graph.call_function(aten.sum.default, (zero,))
                total = graph.call_function(aten.add.Tensor, (new, summed))
            for reader in readers:
                reader.replace_input_with(new, total)
            for added in (zero, summed, total):
                added.meta = {"val": infer(added), "trains": True}
            new = total


def _removed(sites: Sequence[Site], copies: Mapping[Node, Node], alive: set[Node]) -> dict[str, tuple[Node, ...]]:
    counted: set[Node] = set()
    removed: dict[str, tuple[Node, ...]] = {}
    for site in sites:
        outputs = [output.node for output in site.outputs]
        inner = set(upstream(outputs, {node for operand in site.operands.values() for node in operand.nodes}))
        gone = {node for node in inner if node in outputs or copies[node] not in alive}
        removed[site.id] = tuple(sorted(gone - counted))
        counted |= gone
    return removed


def emit(graph: Graph, site: Site, copy: Callable[[Node], Node], kernel: str = "") -> tuple[Node, list[Node]]:
    """Adds the op node of a site, and the views around it, to a graph.

    Returns:
        The op node, and for each output of the site the node that takes its place.
    """
    like = site.anchor

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = infer(node)
        node.meta["trains"] = any(source.meta.get("trains", False) for source in node.all_input_nodes)
        return node

    def fill(argument: Any) -> Any:
        if isinstance(argument, Operand):
            return bring(argument)
        if isinstance(argument, Extent):
            return call(aten.sym_size.int, copy(argument.node), argument.dim)
        return [fill(part) for part in argument] if isinstance(argument, list) else argument

    def apply(node: Node, calls: Calls) -> Node:
        for target, args in calls:
            node = call(target, *positional(target, node, [fill(argument) for argument in args]))
        return node

    def bring(operand: Operand | None) -> Node | None:
        return None if operand is None else apply(copy(operand.node), operand.calls)

    tensors = [bring(site.operands.get(name)) for name in site.op.tensors]
    while tensors and tensors[-1] is None:
        tensors.pop()
    defaults = site.op.defaults
    attributes = {
        name: copy(value) if isinstance(value, Node) else value
        for name, value in site.attributes.items()
        if isinstance(value, Node) or name not in defaults or defaults[name] != value
    }
    op = call(overload(site.op), *tensors, **attributes, **({"kernel": kernel} if kernel else {}))
    site.op.dims({name: node.meta["val"] for name, node in zip(site.op.tensors, tensors, strict=False) if node})
    op.meta |= {SITE: site.id, "trains": site.trains}

    def result(position: int) -> Node:
        return op if site.op.outputs == 1 else call(operator.getitem, op, position)

    def in_place_of(output: Output) -> Node:
        new = apply(result(output.position), output.calls)
        return apply(new, restored(output.node, new.meta["val"]))

    return op, [in_place_of(output) for output in site.outputs]


def infer(node: Node) -> Any:
    """The (fake) value of a node from its arguments' values."""
    values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for v in _tensors(values) if hasattr(v, "fake_mode")), None)
    if mode is None:
        return node.target(*values[0], **values[1])  # type: ignore[operator]
    with mode:
        return node.target(*values[0], **values[1])  # type: ignore[operator]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
