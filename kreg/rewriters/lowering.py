"""Lowering: a new graph in which each op node names its kernel. Only this step knows the device."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from kreg.registry.plan import Choice, Plan
from kreg.rewriters.facts import op_nodes, site_id


def kernel_name(choice: Choice) -> str:
    """What the op node's ``kernel`` says; a ``?`` asks for a check of the constraints at each call."""
    if choice.kernel is None:
        return ""
    return f"{choice.kernel.name}?" if choice.checks else choice.kernel.name


def lower(module: GraphModule, plan: Plan) -> GraphModule:
    """A copy of the graph with the plan's kernels."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    for node, _ in op_nodes(graph):
        choice = plan.choices.get(site_id(node))
        kernel = kernel_name(choice) if choice else ""
        node.kwargs = {**node.kwargs, "kernel": kernel} if kernel else node.kwargs
    lowered = GraphModule(module, graph)
    lowered.meta = dict(module.meta)
    return lowered
