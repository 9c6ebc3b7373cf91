"""One dialect for both front ends: functional, pre-dispatch ATen that autograd still differentiates.

A graph is traced once, by `make_fx` before dispatch. PyTorch's functional tensors take every mutation out of it but
cost more than all the rest, so they are used only where they are needed: most graphs write nothing, or only into
tensors of their own that nothing else shares, and there the operator that writes is replaced by the one that returns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import preserve_rng_state
from torch._functorch import predispatch
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, has_metadata_mutation, to_fun
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    PropagateUnbackedSymInts,
    ShapeEnv,
    statically_known_true,
    sym_eq,
)
from torch.fx.node import has_side_effect
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kreg.rewriters.graph import PARAMETER, STORED, WRITTEN, aten
from kreg.rewriters.vmapped import without_vmap

for _bracket in (predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting):
    has_side_effect(_bracket)  # what stands between them means something else without them


@dataclass(frozen=True)
class Signature:
    """What the outputs of a functional graph are, beside those of the graph it was made of.

    Attributes:
        written: the positions of inputs that the graph wrote into, in ascending order: their new values are the first
            outputs, and whoever calls the graph writes them back.
    """

    written: tuple[int, ...] = ()


def functionalize(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Signature]:
    """The module without mutation, and what its outputs are.

    Args:
        module: a graph from ``torch.export`` or Dynamo.
        inputs: fake tensors, SymInts and constants, one for each of its inputs.
    """
    source = without_idle_dropout(without_vmap(module))
    if next(source.parameters(), None) is not None or next(source.buffers(), None) is not None:
        raise NotImplementedError("a graph that holds parameters or buffers itself, instead of being given them")
    if any(is_traceable_wrapper_subclass(value) for value in inputs):
        raise NotImplementedError("inputs that are tensors made of tensors, such as DTensor")
    mode = _fake_mode(source, inputs)
    fakes = [_faked(value, mode) for value in inputs]
    with preserve_rng_state(), _switches_kept(), mode, enable_python_dispatcher(), _not_kept(mode, fakes):
        traced = None if _calls_graphs(source) else _traced_as_it_is(source, fakes, mode)
        functional, signature = (traced, Signature()) if traced else _traced_functional(source, fakes, mode)
    _refuse_lost(functional)
    normalize(functional)
    _name_classes(functional)
    for node, value in zip(functional.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta[PARAMETER] = isinstance(value, torch.nn.Parameter)
    _mark_written(functional, signature)
    trace_gradients(functional, inputs)
    return functional, signature


def _mark_written(module: GraphModule, signature: Signature) -> None:
    """Says of the inputs that are written into, and of every view of them."""
    inputs = module.graph.find_nodes(op="placeholder")
    memories = {_memory(inputs[position].meta["val"]) for position in signature.written}
    for node in module.graph.nodes if memories else ():
        values = pytree.tree_leaves(node.meta.get("val"))
        if any(isinstance(value, torch.Tensor) and _memory(value) in memories for value in values):
            node.meta[WRITTEN] = True


def _fake_mode(module: GraphModule, inputs: Sequence[Any]) -> FakeTensorMode:
    known = detect_fake_mode(list(inputs))
    if known is None:
        known = detect_fake_mode([node.meta["val"] for node in module.graph.nodes if "val" in node.meta])
    return known or FakeTensorMode(shape_env=ShapeEnv())


def _faked(value: Any, mode: FakeTensorMode) -> Any:
    """A value of the mode under which Dynamo has its back ends work, which is not the one of its own capture."""
    if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is mode):
        return value
    return mode.from_tensor(value)


@contextlib.contextmanager
def _switches_kept() -> Iterator[None]:
    """A trace runs the graph's gradient switches and its vmap: one that ends early leaves them on."""
    enabled = torch.is_grad_enabled()
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        torch._C._set_grad_enabled(enabled)


def _maps(module: GraphModule) -> bool:
    return any(getattr(node.target, "__module__", None) == predispatch.__name__ for node in module.graph.nodes)


@contextlib.contextmanager
def _vmap_traced() -> Iterator[None]:
    """Calls that begin and end a vmap are traced only while PyTorch exports."""
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


@contextlib.contextmanager
def _not_kept(mode: FakeTensorMode, inputs: Sequence[Any]) -> Iterator[None]:
    """While a graph of symbolic sizes is traced: fake results are not kept for another call of the same sizes.

    To keep one takes three times as long as to compute it, and few are asked for again.
    """
    enabled = mode.cache_enabled
    mode.cache_enabled = enabled and not any(_is_symbolic(value) for value in inputs)
    try:
        yield
    finally:
        mode.cache_enabled = enabled


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, torch.SymInt) or any(isinstance(s, torch.SymInt) for s in getattr(value, "shape", ()))


_INLINED = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Operators on graphs that are the graph's own nodes between two switches, which is how they are traced."""


def _calls_graphs(module: GraphModule) -> bool:
    targets = (node.target for part in _graphs(module) for node in part.graph.nodes)
    return any(isinstance(target, HigherOrderOperator) and target.name() not in _INLINED for target in targets)


def _run(module: GraphModule, mode: FakeTensorMode, arguments: Sequence[Any]) -> list[Any]:
    """The module's outputs, each node traced with the stack and the module that it came from."""
    with preserve_node_meta():
        mode.epoch += 1
        return list(pytree.tree_leaves(_Interpreter(module).run(*arguments)))


class _Interpreter(PropagateUnbackedSymInts):
    """Runs the graphs between two switches node by node, too: what is traced of them keeps its modules and lines."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator) and target.name() in _INLINED:
            args = tuple(_Interpreter(part).run if isinstance(part, GraphModule) else part for part in args)
        return super().call_function(target, args, kwargs)


# ---- without functional tensors


class _NotOwn(Exception):
    """Something is written that is not the graph's own."""


class _Composite(Mapping[OpOverload, Callable[..., Any]]):
    """The operators that functional tensors take apart, and how: composite ones whose result may share memory.

    Raises `_NotOwn` where a tensor of the inputs is written.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.outside = {_memory(value) for value in inputs if isinstance(value, torch.Tensor)}
        self.rules = FunctionalTensorMode(pre_dispatch=True, export=True)

    def __contains__(self, op: object) -> bool:
        assert isinstance(op, OpOverload)
        if op in FunctionalTensor.metadata_fns:
            return op is aten.sym_numel.default
        return op._schema.is_mutable or (self.rules._can_decompose(op, (), {}) and _has_kernel(op))

    def __getitem__(self, op: OpOverload) -> Callable[..., Any]:
        if op is aten.sym_numel.default:
            numel: Callable[..., Any] = torch._decomp.decompositions.sym_numel
            return numel
        return self._checked(op) if op._schema.is_mutable else op.decompose

    def _checked(self, op: OpOverload) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if _functional_variant(op) is None or not self._owns(args[0]):
                raise _NotOwn(str(op))
            return op.decompose(*args, **kwargs) if op._can_decompose() else NotImplemented

        return write

    def _owns(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        return _memory(value) not in self.outside

    def __iter__(self) -> Iterator[OpOverload]:
        return iter(())

    def __len__(self) -> int:
        return 1


def _has_kernel(op: OpOverload) -> bool:
    return bool(torch._C._dispatch_has_kernel(op.name()))


def _memory(tensor: torch.Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # under vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def _traced_as_it_is(module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> GraphModule | None:
    """The module's operators as they are called; None if what it writes is more than a functional variant can say."""
    # what autograd records is thrown away: nothing in a trace before dispatch depends on it
    leaves = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]

    def trace(*arguments: Any) -> list[Any]:
        proxy = get_proxy_mode()
        assert proxy is not None
        with proxy.enable_decompositions(_Composite(arguments)):
            return _run(module, mode, arguments)

    pending = [] if mode.shape_env is None else mode.shape_env.pending_fresh_unbacked_symbols
    before = list(pending)
    try:
        with _switches_kept(), _vmap_traced() if _maps(module) else contextlib.nullcontext():
            traced = make_fx(trace, pre_dispatch=True)(*leaves)
    except _NotOwn:
        pending[:] = before  # what the trace that was given up has made, no node will hold
        return None
    return traced if _without_writes(traced) else None


def _without_writes(module: GraphModule) -> bool:
    """Replaces operators that write by those that return; False if one writes what is still read by another name.

    A trace already reads what was written where the tensor itself is used afterwards. What it cannot see are views
    that were made before.
    """
    nodes = list(module.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    writes = [node for node in nodes if isinstance(node.target, OpOverload) and node.target._schema.is_mutable]
    for write in writes:
        target = _functional_variant(write.target)
        written = write.args[0] if write.args else None
        if target is None or not isinstance(written, Node) or not isinstance(written.meta.get("val"), torch.Tensor):
            return False
        memory = _memory(written.meta["val"])
        for node in nodes[: order[write]]:
            if memory in _memories(node) and any(order[user] > order[write] for user in node.users):
                return False
    return all(_returns(write) for write in writes)


def _memories(node: Node) -> set[int]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {_memory(value) for value in leaves if isinstance(value, torch.Tensor)}


def _returns(write: Node) -> bool:
    """Makes a write its functional variant, if that is the same in shape, dtype and layout."""
    target = _functional_variant(write.target)
    args, kwargs = torch.fx.map_arg((write.args, write.kwargs), lambda node: node.meta["val"])
    old = write.meta["val"]
    with torch.no_grad():
        new = target(*args, **kwargs)  # type: ignore[misc]
    if new.dtype != old.dtype or new.dim() != old.dim() or new.storage_offset() != old.storage_offset():
        return False
    if not statically_known_true(sym_eq((new.shape, new.stride()), (old.shape, old.stride()))):
        return False
    write.target = target  # type: ignore[assignment]
    write.meta["val"] = new
    return True


def _functional_variant(op: Any) -> OpOverload | None:
    """What returns the value that an operator writes into its first argument: ``add.Tensor`` of ``add_.Tensor``."""
    schema = op._schema
    name = op._opname
    if op is aten.detach_.default:  # writes nothing
        return aten.detach.default
    if op.namespace != "aten" or not name.endswith("_") or torch.Tag.inplace_view in op.tags:
        return None
    if [argument.name for argument in schema.arguments if argument.alias_info is not None] != ["self"]:
        return None
    found = getattr(getattr(aten, name[:-1], None), op._overloadname, None)
    if not isinstance(found, OpOverload) or found._schema.is_mutable:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in schema.arguments]
    return found if [(a.name, str(a.type)) for a in found._schema.arguments] == wanted else None


# ---- with functional tensors


def _traced_functional(
    module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode
) -> tuple[GraphModule, Signature]:
    """The module traced through functional tensors, which take any mutation out of it."""
    written: list[int] = []

    def trace(*arguments: Any) -> list[Any]:
        # functionalization is Python's here, and not to be done again in C++ above it
        above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with contextlib.ExitStack() as stack:
            stack.enter_context(above)
            wrapped = [to_fun(argument) for argument in arguments]
            outputs = _run(module, mode, wrapped)
            for i, (value, given) in enumerate(zip(wrapped, arguments, strict=True)):
                if not isinstance(value, torch.Tensor):
                    continue
                if has_metadata_mutation(value, given, check_only_storage_mutation=False):
                    raise RuntimeError(f"input {i} is given another shape, strides or storage by the graph")
                if has_data_mutation(value):
                    written.append(i)
            return [from_fun(wrapped[i]) for i in written] + [from_fun(output) for output in outputs]

    with FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=True):
        traced = make_fx(trace, pre_dispatch=True)(*inputs)
    _refuse_shared(inputs, written)
    for node in traced.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            raise RuntimeError(f"{node.target} is left in the graph")
    return traced, Signature(tuple(written))


def _refuse_shared(inputs: Sequence[Any], written: Sequence[int]) -> None:
    """An input that is written and shares its memory with another: the other's new value would be missing."""
    memories = [_memory(value) if isinstance(value, torch.Tensor) else None for value in inputs]
    for i in written:
        if memories.count(memories[i]) > 1:
            raise RuntimeError(f"input {i} is written by the graph and shares its memory with another input")


# ---- either way


def _refuse_lost(module: GraphModule) -> None:
    """A fake tensor that the graph holds is a value whose making was not traced."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(module, node.target, None), FakeTensor):
            raise RuntimeError(f"how {node.target} is made cannot be traced")


def _name_classes(module: GraphModule) -> None:
    """Classes in module stacks by their names, as a program is saved with them."""
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and any(isinstance(of, type) for _, of in stack.values()):
            node.meta["nn_module_stack"] = {
                key: (path, f"{of.__module__}.{of.__qualname__}" if isinstance(of, type) else of)
                for key, (path, of) in stack.items()
            }


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

    Also those that stop a gradient (``meta["cut"]``), which may be that of an input that requires none as yet, in a
    program that is captured without gradients and may be trained: only what the graph itself says counts.
    """
    given = iter(inputs)
    recorded = torch.is_grad_enabled()
    enabled = True
    could: dict[Node, bool] = {}
    for node in module.graph.nodes:
        floating = _carries_gradient(node.meta.get("val"))
        if node.op == "placeholder":
            trains = bool(getattr(next(given, None), "requires_grad", False))
            could[node] = floating and STORED not in node.meta
        elif node.target is torch._C._set_grad_enabled:
            enabled = recorded = node.args[0]
            trains = False
            could[node] = False
        else:
            passes = enabled and floating and node.target is not aten.detach.default
            trains = passes and recorded and any(source.meta["trains"] for source in node.all_input_nodes)
            reached = any(could[source] for source in node.all_input_nodes)
            could[node] = passes and reached
            node.meta["cut"] = floating and reached and not passes
        node.meta["trains"] = trains


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    return isinstance(value, (tuple, list)) and any(_carries_gradient(v) for v in value)


SYNONYMS = {
    **{"absolute": "abs", "negative": "neg", "clip": "clamp", "concat": "cat", "concatenate": "cat"},
    **{"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub"},
    **{"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"},
}
"""Operators of PyTorch that are another one by another name, of the same arguments."""

ONE_NAME: dict[Any, Any] = {
    getattr(getattr(aten, other), overload): getattr(getattr(aten, name), overload)
    for other, name in SYNONYMS.items()
    for overload in getattr(aten, other).overloads()
    if overload in getattr(aten, name).overloads()
}
"""The same by overload."""


def normalize(module: GraphModule) -> None:
    """Drops what has no meaning for a rule: metadata assertions, dead nodes, empty operands of a ``cat``.

    Copies get a derivative, and what has two names gets one.
    """
    graph = module.graph
    for node in list(graph.nodes):
        node.target = ONE_NAME.get(node.target, node.target)
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.copy.default:
            _differentiable_copy(node)
        elif node.target is aten.cat.default:
            _cat_of_what_is_there(node)
    graph.eliminate_dead_code()
    module.recompile()


def _cat_of_what_is_there(node: Node) -> None:
    """``cat`` passes over a tensor of shape [0], which is what a cache holds before it is filled."""
    parts = list(node.args[0])  # type: ignore[arg-type]
    there = [part for part in parts if not _holds_nothing(part.meta["val"])]
    if len(there) == len(parts) or not there:
        return
    if len({part.meta["val"].dtype for part in parts}) > 1:
        return
    if len(there) > 1:
        node.args = (there, *node.args[1:])
    else:  # still a tensor of its own, in one piece: a cache may be written into, and viewed
        node.target, node.args = aten.clone.default, (there[0],)
        node.kwargs = {"memory_format": torch.contiguous_format}


def _holds_nothing(value: torch.Tensor) -> bool:
    return value.dim() == 1 and type(value.shape[0]) is int and value.shape[0] == 0


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
