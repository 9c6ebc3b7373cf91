"""Index notation run naively, one element at a time: the judge of everything that is lifted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from kreg.rewriters import notation as n
from kreg.rewriters.lift import Lifter, variables

Environment = Mapping[n.Var, int]
OUTSIDE = 7919
"""What is read past a tensor's edge: conditions beside it must keep it from counting."""
LETTERS = "abcdefgh"


def evaluate(
    e: n.Expr,
    env: Environment,
    data: Mapping[Node, torch.Tensor] | None = None,
    sizes: Mapping[sympy.Symbol, int] | None = None,
) -> Any:
    """The value of an expression.

    Args:
        env: a number for each index variable.
        data: the tensors that loads read from.
        sizes: a number for each symbolic size.
    """

    def run(e: n.Expr, env: Environment) -> Any:
        match e:
            case n.Const(value):
                return value
            case n.Var():
                return env[e]
            case n.Size(value):
                return int(value.subs(sizes or {}))
            case n.Linear(terms, constant):
                return sum(c * run(atom, env) for atom, c in terms) + constant
            case n.Load(node, index, _):
                tensor = (data or {})[node]
                place = tuple(run(i, env) for i in index)
                inside = all(0 <= i < s for i, s in zip(place, tensor.shape, strict=True))
                return tensor[place].item() if inside else OUTSIDE
            case n.Reduce(kind, variable, body):
                each = (run(body, {**env, variable: i}) for i in range(_extent(variable, sizes)))
                return any(each) if kind == "any" else sum(each)
            case n.Apply("where", (c, yes, no)):
                return run(yes if run(c, env) else no, env)
            case n.Apply("and", arguments):
                return all(run(a, env) for a in arguments)
            case n.Apply("or", arguments):
                return any(run(a, env) for a in arguments)
            case n.Apply(function, arguments):
                return FUNCTIONS[function](*(run(a, env) for a in arguments))
        raise NotImplementedError(e)

    return run(e, env)


def _rounded(dtype: torch.dtype) -> Callable[[float], float]:
    return lambda value: torch.tensor(value, dtype=torch.float64).to(dtype).item()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *values: sum(values),
    "mul": lambda *values: math.prod(values),
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "times": lambda a, b: a * b,
    "le0": lambda a: a <= 0,
    "eq0": lambda a: a == 0,
    "indicator": int,
    "truth": lambda a: a != 0,
    "not": lambda a: not a,
    "less": lambda a, b: a < b,
    "equal": lambda a, b: a == b,
    "relu": lambda a: max(a, 0.0),
    "max": max,
    "min": min,
    "tanh": math.tanh,
    "exp": math.exp,
    "abs": abs,
    "pow": lambda a, b: a**b,
    "rounded:float16": _rounded(torch.float16),
    "rounded:bfloat16": _rounded(torch.bfloat16),
    "rounded:float32": _rounded(torch.float32),
    "truncated:int64": math.trunc,
    "truncated:int32": math.trunc,
}


def _extent(variable: n.Var, sizes: Mapping[sympy.Symbol, int] | None) -> int:
    return variable.size if isinstance(variable.size, int) else int(variable.size.subs(sizes or {}))


def environments(found: Iterable[n.Var], sizes: Mapping[sympy.Symbol, int] | None = None) -> Iterator[dict[n.Var, int]]:
    """Every value of the index variables."""
    found = tuple(found)
    for values in itertools.product(*(range(_extent(v, sizes)) for v in found)):
        yield dict(zip(found, values, strict=True))


def whole(e: n.Expr, index: tuple[n.Var, ...], data: Mapping[Node, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The tensor that an expression over ``index`` stands for, in the shape and dtype of ``like``."""
    places = environments(index)
    flat = [evaluate(e, env, data) for env in places]
    return torch.tensor(flat, dtype=torch.float64).reshape(like.shape).to(like.dtype)


def lifted(node: Node) -> tuple[n.Expr, tuple[n.Var, ...]]:
    """A node's element, and the index variables it is an element at."""
    index = variables(node, LETTERS[: node.meta["val"].dim()])
    return Lifter().element(node, index), index


class Chain:
    """A graph built call by call, each value computed along the way."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.data: dict[Node, torch.Tensor] = {}

    def input(self, value: torch.Tensor) -> Node:
        """A value that nothing is known of."""
        node = self.graph.placeholder(f"x{len(self.data)}")
        node.meta["val"] = self.data[node] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One operator."""
        node = self.graph.call_function(target, args, kwargs)
        values = torch.fx.map_arg((args, kwargs), lambda a: a.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        if isinstance(node.meta["val"], torch.Tensor):
            self.data[node] = node.meta["val"]
        return node
