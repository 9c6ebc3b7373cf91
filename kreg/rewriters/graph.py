"""Small questions about FX graphs that several stages ask."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx import Node

aten = torch.ops.aten

NOTE = "kreg"
"""Key of kreg's entry in the ``custom`` metadata that a node is saved with."""

STORED = "kreg_stored"
"""Key in an input's ``meta``: the tensor that the model stored there when it was captured (buffers and constants)."""

FIXED = "kreg_fixed"
"""Key in an input's ``meta``: the stored tensor is part of the code. No state_dict holds it, and nothing writes it."""

WRITTEN = "kreg_written"
"""Key in the ``meta`` of an input, and of each view of it: the program ends by writing a new value into it."""

PARAMETER = "kreg_parameter"
"""Key in an input's ``meta``: whether it is a parameter of the model."""

INERT = frozenset(
    {aten._assert_tensor_metadata.default, aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default}
)
"""Consumers that look at a value's metadata only."""


def shape_of(node: Node) -> tuple[int | sympy.Expr, ...]:
    """The sizes of a node's tensor, symbolic ones as sympy expressions."""
    return tuple(sized(s) for s in node.meta["val"].shape)


def sized(value: int | torch.SymInt) -> int | sympy.Expr:
    """A size as a number, or as the sympy expression behind a SymInt."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_Integer else expression


def is_tensor(node: object) -> bool:
    """Whether a node holds one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def users(node: Node) -> list[Node]:
    """Consumers of a value, without those that look at its metadata only. Captured graphs hold no dead nodes."""
    return [user for user in node.users if user.target not in INERT]


def unpacked(node: Node, position: int) -> Node | None:
    """The live item of a node that returns a tuple, or None if it is not used."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == position and user.users:
            return user
    return None


_ROOTS = ("L['module'].", "L['module']", "L__module___", "L__self___", "L['self'].", "L['self']", "L__self__", "self.")


def module_path(node: Node) -> str:
    """Path of the module that computed a value, from the root module; "" for the root itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    path = next((path.removeprefix(root) for root in _ROOTS if path.startswith(root)), path)
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".")


def source_line(node: Node) -> str:
    """``file:line, in function: code`` of the innermost frame that made a node, or "" where unknown."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for where, code in zip(reversed(frames[:-1]), reversed(frames), strict=False):
        if where.startswith("File "):
            name, line, function = (part.strip() for part in where.split(",", 2))
            return f"{name.split('/')[-1].strip(chr(34))}:{line.removeprefix('line ')} {function}: {code}"
    return ""


def upstream(outputs: list[Node], stops: set[Node]) -> Iterator[Node]:
    """Every node the outputs are computed from, not going past ``stops`` (which are not yielded)."""
    seen: set[Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in seen or node in stops:
            continue
        seen.add(node)
        yield node
        pending.extend(node.all_input_nodes)


def is_learnt(node: Node) -> bool:
    """Whether a value is made of parameters alone."""
    return all(source.meta.get(PARAMETER, False) for source in upstream([node], set()) if source.op == "placeholder")
