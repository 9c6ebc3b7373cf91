"""A captured graph continued past its inputs, by the operators that made them in the call at hand.

The operators come from `provenance`. Their sizes were numbers when they ran, and are symbols in the graph: a number
that equals a symbol is taken for it, and what is so guessed is checked at every call (`Continuation.given`), operator
by operator and number by number. A call whose mask was made in another way does not match, and is answered by another
graph. So nothing rests on the guess.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import _ShapeEnvGuardError

from kreg.rewriters.graph import aten, sized
from kreg.rewriters.live.provenance import Given, Made

OUTSIDE = "kreg_outside"
"""Key in the ``meta`` of nodes that were added: the input that has the node's value, or "" where none has."""

Sizes = Mapping[sympy.Expr, int]


@dataclass(frozen=True)
class Size:
    """In a pattern: a number that is this expression in the graph's symbols."""

    expression: sympy.Expr


@dataclass(frozen=True, eq=False)
class MadePattern:
    """In a pattern: what the operator was called with."""

    target: Any
    args: Any
    kwargs: Any


@dataclass(frozen=True, eq=False)
class GivenPattern:
    """In a pattern: the tensor that becomes the graph's further input ``position``."""

    position: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Continuation:
    """A graph with the makers of some of its inputs in it.

    Attributes:
        module: the graph; further inputs come after its own.
        patterns: by the position of an input, how it has to have been made.
        symbols: where the value of each symbol is found in a call: an input, and its dimension or -1 for itself.
        count: how many further inputs there are.
    """

    module: GraphModule
    patterns: Mapping[int, MadePattern]
    symbols: Mapping[sympy.Expr, tuple[int, int]]
    count: int

    def given(self, made: Mapping[int, Made], sizes: Sizes) -> list[torch.Tensor] | None:
        """The further inputs for a call, or None if an input of it was made in another way.

        Args:
            made: how inputs of the call were made, by position.
            sizes: what the symbols are in the call.
        """
        found: dict[int, Given] = {}
        for position, pattern in self.patterns.items():
            origin = made.get(position)
            if origin is None or not _matches(pattern, origin, sizes, found):
                return None
        return [found[i].tensor for i in range(self.count)]


def symbols_of(placeholders: Sequence[Node]) -> dict[sympy.Expr, tuple[int, int]]:
    """Where each symbol of a graph's sizes can be read off its inputs: (input, dimension), -1 for the input itself."""
    found: dict[sympy.Expr, tuple[int, int]] = {}
    for i, node in enumerate(placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found[value.node.expr] = (i, -1)
        elif isinstance(value, torch.Tensor):
            for d, size in enumerate(value.shape):
                expression = sized(size)
                if isinstance(expression, sympy.Symbol):
                    found.setdefault(expression, (i, d))
    return found


def values(symbols: Mapping[sympy.Expr, tuple[int, int]], inputs: Sequence[Any]) -> dict[sympy.Expr, int]:
    """The numbers that a graph's symbols stand for in a call."""
    return {s: int(inputs[i] if d < 0 else inputs[i].shape[d]) for s, (i, d) in symbols.items()}


def continue_past(module: GraphModule, made: Mapping[int, Made], inputs: Sequence[Any]) -> Continuation | None:
    """The graph with the makers of some inputs put in front of what reads them.

    Args:
        module: a functional graph.
        made: by the position of an input, how it was made.
        inputs: the call at hand.

    Returns:
        None if the makers do not fit the graph: another shape or dtype comes out than the graph was captured with.
    """
    builder = _Builder(module, inputs)
    try:
        patterns = {position: builder.put(position, origin) for position, origin in made.items()}
    except (_Misfit, _ShapeEnvGuardError):
        return None
    builder.graph.lint()
    new = GraphModule(module, builder.graph)
    new.meta = dict(module.meta)
    return Continuation(new, patterns, builder.symbols, len(builder.further))


def settle(module: GraphModule) -> bool:
    """Reads an input again where all that is left of its makers is its value; True if nothing large is made twice."""
    graph = module.graph
    inputs = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    for node in list(graph.nodes):
        name = node.meta.get(OUTSIDE)
        if name and node.op != "placeholder":
            node.replace_all_uses_with(inputs[name])
    graph.eliminate_dead_code()
    module.recompile()
    return not any(
        node.op == "call_function" and OUTSIDE in node.meta and _is_large(node.meta.get("val")) for node in graph.nodes
    )


def _is_large(value: Any) -> bool:
    """More than a row or a column for each batch: a mask of queries by keys."""
    return isinstance(value, torch.Tensor) and sum(size != 1 for size in value.shape) > 2


class _Misfit(Exception):
    """The makers do not fit the graph."""


class _Builder:
    def __init__(self, module: GraphModule, inputs: Sequence[Any]) -> None:
        self.graph = Graph()
        copies: dict[Node, Node] = {}
        self.inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.symbols = symbols_of(self.inputs)
        self.sizes = values(self.symbols, inputs)
        for node in module.graph.nodes:
            copies[node] = self.graph.node_copy(node, lambda n: copies[n])
        self.copies = [copies[n] for n in self.inputs]
        self.body = self.copies[-1].next
        self.further: list[Node] = []
        self.patterns: dict[int, Any] = {}
        self.nodes: dict[int, Node] = {}
        self.size_nodes: dict[sympy.Expr, Node] = {}
        fakes = (n.meta["val"] for n in self.inputs if isinstance(n.meta.get("val"), torch.Tensor))
        self.mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)

    def put(self, position: int, origin: Made) -> MadePattern:
        """Puts the makers of an input in front of its readers."""
        placeholder = self.copies[position]
        expected = placeholder.meta["val"]
        prefer = [sized(s) for s in expected.shape]
        pattern, node = self.made(origin, prefer)
        value = node.meta["val"]
        if value.dtype != expected.dtype or value.device != expected.device:
            raise _Misfit
        if [sized(s) for s in value.shape] != prefer:
            raise _Misfit
        if node.meta[OUTSIDE]:
            raise _Misfit  # one tensor given twice; the graph tells them apart
        node.meta[OUTSIDE] = placeholder.target
        placeholder.replace_all_uses_with(node)
        return pattern

    def made(self, origin: Made, prefer: list[Any]) -> tuple[MadePattern, Node]:
        if id(origin) in self.patterns:
            return self.patterns[id(origin)], self.nodes[id(origin)]
        sizes, order = _sizes(origin.target)
        args = [self.argument(a, prefer, i < len(order) and order[i] in sizes) for i, a in enumerate(origin.args)]
        kwargs = {name: self.argument(a, prefer, name in sizes) for name, a in origin.kwargs.items()}
        pattern = MadePattern(origin.target, [p for p, _ in args], {name: p for name, (p, _) in kwargs.items()})
        node = self.call(origin.target, tuple(n for _, n in args), {name: n for name, (_, n) in kwargs.items()})
        self.patterns[id(origin)], self.nodes[id(origin)] = pattern, node
        return pattern, node

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        with self.graph.inserting_before(self.body):
            node = self.graph.call_function(target, args, kwargs)
        concrete = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode or contextlib.nullcontext(), self.frozen(), torch.no_grad():
            value = target(*concrete[0], **concrete[1])
        node.meta |= {"val": value, "trains": False, "cut": False, OUTSIDE: ""}
        return node

    def frozen(self) -> Any:
        """While values are computed: a wrong guess is an error, and fixes no size."""
        environment = getattr(self.mode, "shape_env", None)
        return contextlib.nullcontext() if environment is None else environment.error_on_new_guards()

    def argument(self, value: Any, prefer: list[Any], size: bool) -> tuple[Any, Any]:
        """An argument as a pattern and as the graph has it."""
        if isinstance(value, Made):
            return self.made(value, prefer)
        if isinstance(value, Given):
            return self.given(value, prefer)
        if isinstance(value, (tuple, list)):
            both = [self.argument(item, prefer, size) for item in value]
            return [p for p, _ in both], [n for _, n in both]
        if size and type(value) is int:
            expression = self.symbolic(value, prefer)
            if expression is not None:
                return Size(expression), self.size(expression)
        return value, value

    def symbolic(self, value: int, prefer: list[Any]) -> sympy.Expr | None:
        """The expression in the graph's symbols that a number most likely is."""
        if value < 2:
            return None
        ordered = [s for s in prefer if isinstance(s, sympy.Symbol)] + list(self.sizes)
        for offset in (0, 1, -1):
            for symbol in ordered:
                if self.sizes.get(symbol) == value - offset:
                    return symbol + offset
        return None

    def size(self, expression: sympy.Expr) -> Node:
        if expression not in self.size_nodes:
            self.size_nodes[expression] = self._size(expression)
        return self.size_nodes[expression]

    def _size(self, expression: sympy.Expr) -> Node:
        if expression.is_Symbol:
            position, dim = self.symbols[expression]
            return self.copies[position] if dim < 0 else self.call(aten.sym_size.int, (self.copies[position], dim), {})
        (symbol,) = expression.free_symbols
        return self.call(operator.add, (self.size(symbol), int(expression - symbol)), {})

    def given(self, origin: Given, prefer: list[Any]) -> tuple[Any, Node]:
        if id(origin) in self.patterns:
            return self.patterns[id(origin)], self.nodes[id(origin)]
        tensor = origin.tensor
        both = [self.argument(size, prefer, True) for size in tensor.shape]
        pattern = GivenPattern(len(self.further), tensor.dtype, tensor.device, tuple(p for p, _ in both))
        with self.graph.inserting_before(self.copies[-1].next):
            node = self.graph.placeholder(f"given_{len(self.further)}")
        self._fix_order(node)
        shape = [n.meta["val"] if isinstance(n, Node) else n for _, n in both]
        value = self._empty(shape, tensor)
        node.meta |= {"val": value, "trains": False, OUTSIDE: ""}
        self.further.append(node)
        self.patterns[id(origin)], self.nodes[id(origin)] = pattern, node
        return pattern, node

    def _fix_order(self, node: Node) -> None:
        """Inputs stand before everything else, in the order in which they are given."""
        last = self.further[-1] if self.further else self.copies[-1]
        last.append(node)

    def _empty(self, shape: list[Any], like: torch.Tensor) -> torch.Tensor:
        if self.mode is None:
            return torch.empty(shape, dtype=like.dtype, device="meta")
        with self.mode:
            return torch.empty(shape, dtype=like.dtype, device=like.device)


_SIZED_BY_NUMBERS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})


@cache
def _sizes(target: Any) -> tuple[frozenset[str], tuple[str, ...]]:
    """The arguments of an operator that are sizes or places, which may be symbols; and all arguments in order."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return frozenset(), ()
    order = tuple(argument.name for argument in schema.arguments)
    found = re.findall(r"SymInt(?:\[\d*\])?\??\s+(\w+)", str(schema))
    numbers = ("start", "end", "step") if target in _SIZED_BY_NUMBERS else ()
    return frozenset((*found, *numbers)), order


def _matches(pattern: Any, origin: Any, sizes: Sizes, found: dict[int, Given]) -> bool:
    """Whether a tensor was made as a pattern says, given the sizes of this call."""
    if isinstance(origin, Made) and isinstance(pattern, MadePattern):
        inner = _givens(pattern, origin, sizes)
        return inner is not None and all(found.setdefault(i, given) is given for i, given in inner.items())
    if isinstance(origin, Given) and isinstance(pattern, GivenPattern):
        tensor = origin.tensor
        if tensor.dtype != pattern.dtype or tensor.device != pattern.device or tensor.dim() != len(pattern.shape):
            return False
        if not all(_number(p, sizes) == s for p, s in zip(pattern.shape, tensor.shape, strict=True)):
            return False
        return found.setdefault(pattern.position, origin) is origin
    return False


def _givens(pattern: MadePattern, origin: Made, sizes: Sizes) -> dict[int, Given] | None:
    """The tensors in a pattern's places, whatever stands in them elsewhere; None if this was made in another way."""
    memo = origin.verdicts.get(id(pattern))
    if memo is None or memo[0] is not pattern or memo[1] != sizes:
        inner: dict[int, Given] = {}
        same = origin.target is pattern.target and _match_all(
            (pattern.args, pattern.kwargs), (origin.args, origin.kwargs), sizes, inner
        )
        memo = origin.verdicts[id(pattern)] = (pattern, sizes, inner if same else None)
    found: dict[int, Given] | None = memo[2]
    return found


def _match_all(pattern: Any, value: Any, sizes: Sizes, found: dict[int, Given]) -> bool:
    if isinstance(pattern, (MadePattern, GivenPattern)):
        return _matches(pattern, value, sizes, found)
    if isinstance(pattern, Size):
        return type(value) is int and value == _number(pattern, sizes)
    if isinstance(pattern, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(pattern):
            return False
        return all(_match_all(p, v, sizes, found) for p, v in zip(pattern, value, strict=True))
    if isinstance(pattern, dict):
        if not isinstance(value, dict) or value.keys() != pattern.keys():
            return False
        return all(_match_all(p, value[name], sizes, found) for name, p in pattern.items())
    return type(pattern) is type(value) and bool(pattern == value)


def _number(pattern: Any, sizes: Sizes) -> int:
    if not isinstance(pattern, Size):
        return int(pattern)
    return int(pattern.expression.subs(sizes)) if not pattern.expression.is_Symbol else sizes[pattern.expression]
