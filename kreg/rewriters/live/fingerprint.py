"""When two graphs of Dynamo's are the same code: same operators, same constants, same inputs up to symbols' names.

A layer with a cache is captured for each place in the cache, for Dynamo guards the place. The graphs are the same.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


def fingerprint(module: GraphModule) -> Hashable | None:
    """What is the same for graphs that are the same code; None for a graph that holds more than operators."""
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    places: dict[Node, int] = {}
    parts: list[Hashable] = [_ambient()]
    for i, node in enumerate(module.graph.nodes):
        places[node] = i
        if node.op not in ("placeholder", "call_function", "call_method", "output"):
            return None
        target = "" if node.op == "placeholder" else node.target
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: _Place(places[n]))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        values = pytree.tree_leaves(node.meta.get("example_value"))
        parts.append((node.op, target, str(spec), tuple(_constant(leaf, symbols) for leaf in leaves)))
        parts.append(tuple(_value(value, symbols) for value in values))
    try:
        found = tuple(parts)
        hash(found)
    except TypeError:  # an argument that is no constant
        return None
    return found


class _Place(int):
    """A node among the arguments of another."""


def _ambient() -> Hashable:
    """What a call means may depend on this, and the graph does not say it."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu", accelerator.type) if accelerator is not None else ("cpu",)
    casts = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), casts


def _constant(leaf: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Hashable:
    if isinstance(leaf, torch.SymInt):
        return _size(leaf, symbols)
    if isinstance(leaf, slice):
        return slice, *(_constant(part, symbols) for part in (leaf.start, leaf.stop, leaf.step))
    return type(leaf), leaf


def _value(value: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Hashable:
    if isinstance(value, torch.Tensor):
        strides = tuple(_size(s, symbols) for s in value.stride()) if value.layout is torch.strided else ()
        shape = tuple(_size(s, symbols) for s in value.shape)
        kind = isinstance(value, torch.nn.Parameter)
        return value.dtype, value.device, shape, strides, value.requires_grad, kind, type(value)
    return _constant(value, symbols)


def _size(size: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Hashable:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(symbol, sympy.Symbol(f"n{len(symbols)}", integer=True))
    return str(expression.xreplace(symbols))
