"""Masks that are made under `torch.vmap`, as the plain ATen that they come to.

``torch.export`` keeps such a part as it was called: tensors gain hidden dimensions between two calls of functorch,
which no index notation reads. So the part is traced by itself, below functorch, and put back. What autograd would
record of it is lost that way, which is why it is done to integers and booleans alone.
"""

from __future__ import annotations

import copy
import logging
import operator

import torch
from torch._dynamo._trace_wrapped_higher_order_op import ModIndex
from torch._functorch import predispatch
from torch._functorch.predispatch import _vmap_decrement_nesting as leave
from torch._functorch.predispatch import _vmap_increment_nesting as enter
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger("kreg")

MOD_INDEX = f"{ModIndex.__module__}.{ModIndex.__qualname__}"
"""How a graph names the autograd function by which ``A[i]`` with a tensor ``i`` is indexed under vmap."""


def without_vmap(module: GraphModule) -> GraphModule:
    """The module with its masks under vmap written out; as it is where there are none, or where sizes are symbolic."""
    if not any(map(_is_mask, _parts(module.graph))) and not any(map(_is_mod_index, module.graph.nodes)):
        return module
    module = copy.deepcopy(module)
    _index_plainly(module.graph)
    for part in filter(_is_mask, _parts(module.graph)):
        if (plain := _traced(module, part)) is not None:
            _put_back(module.graph, part, plain)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _index_plainly(graph: Graph) -> None:
    """Mask functions written for FlexAttention index by a custom autograd function; what it computes is an index."""
    for node in filter(_is_mod_index, graph.nodes):
        node.target, node.args = torch.ops.aten.index.Tensor, (node.args[3], list(node.args[4:]))
    graph.eliminate_dead_code()


def _is_mod_index(node: Node) -> bool:
    return node.target is torch.ops.higher_order.flat_apply and MOD_INDEX in node.args[2:3]


def _parts(graph: Graph) -> list[list[Node]]:
    """Runs of nodes from the outermost entry to its leave."""
    parts: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is enter:
            if depth == 0:
                parts.append([])
            depth += 1
        if depth:
            parts[-1].append(node)
        if node.target is leave:
            depth -= 1
    return parts


def _inputs(part: list[Node]) -> list[Node]:
    inside = set(part)
    return list(dict.fromkeys(source for node in part for source in node.all_input_nodes if source not in inside))


def _outputs(part: list[Node]) -> list[Node]:
    inside = set(part)
    return [node for node in part if any(user not in inside for user in node.users)]


def _is_mask(part: list[Node]) -> bool:
    """Whether integers and booleans of known sizes are made of such, and nothing else is done."""
    inputs = _inputs(part)
    values = [node.meta.get("val") for node in (*inputs, *_outputs(part))]
    return bool(inputs) and all(map(_is_whole, values)) and not any(map(_does_more, part))


def _is_whole(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        return False
    return all(isinstance(size, int) for size in value.shape)


def _does_more(node: Node) -> bool:
    """Whether a node writes, draws random numbers, switches gradients, or calls a graph of its own."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
    return getattr(node.target, "__module__", None) not in (predispatch.__name__, operator.getitem.__module__)


def _traced(module: GraphModule, part: list[Node]) -> Graph | None:
    """What a part comes to; None if it cannot be told without its values."""
    graph, copies = Graph(), dict[Node, Node]()
    inputs = _inputs(part)
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in _outputs(part)])
    values = [node.meta["val"] for node in inputs]
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with values[0].fake_mode:
            plain = make_fx(GraphModule(module, graph))(*values).graph
    except Exception:  # such as a branch on data: the part stays as it is
        log.debug("a part under vmap cannot be written out", exc_info=True)
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        return None
    return plain if all(node.op in ("placeholder", "call_function", "output") for node in plain.nodes) else None


def _put_back(graph: Graph, part: list[Node], plain: Graph) -> None:
    places = {key: value for key, value in part[0].meta.items() if key in ("nn_module_stack", "stack_trace")}
    given, new = iter(_inputs(part)), dict[Node, Node]()
    with graph.inserting_before(part[0]):
        for node in plain.nodes:
            if node.op == "placeholder":
                new[node] = next(given)
            elif node.op == "output":
                for old, result in zip(_outputs(part), node.args[0], strict=True):
                    old.replace_all_uses_with(new[result])
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
                new[node].meta = places | node.meta
    for node in reversed(part):
        graph.erase_node(node)
