"""How `grouped_matmul` is recognised: by the operators that libraries define for it.

A program that holds a library's own operator needs that library to load. As an op of kreg's it does not.
"""

from __future__ import annotations

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import GROUPED_MATMUL
from kreg.rewriters.graph import dtype_of
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Operand, Output, Refused, Site

OP: Op = GROUPED_MATMUL

OPERATORS = frozenset({"transformers::grouped_mm_fallback"})
"""Qualified names of operators of signature (input, weight, offsets), of the op's meaning."""


def is_anchor(node: Node) -> bool:
    """A call of one of the operators."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in OPERATORS


def find(context: Context, anchor: Node) -> Site:
    """The call, operand by operand."""
    operands = [argument for argument in anchor.args if isinstance(argument, Node)]
    if len(operands) != 3 or anchor.kwargs:
        raise Refused("the grouped product is called in a way that is not read", anchor)
    x, weight, ends = operands
    if dtype_of(x) != dtype_of(weight):
        raise Refused(f"rows are {dtype_of(x)} and weights {dtype_of(weight)}", anchor)
    tensors = {"x": Operand(x), "weight": Operand(weight), "ends": Operand(ends)}
    return Site(OP, anchor, tensors, {}, (Output(anchor, 0),))


RULE = Rule(op=OP, is_anchor=is_anchor, find=find)
