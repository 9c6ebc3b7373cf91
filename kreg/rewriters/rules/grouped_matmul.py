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

OPERATORS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
"""Qualified names of operators of the op's meaning, whose first arguments are rows, weights, and where groups end.

PyTorch's leaves the rows after the last group undefined; here they are 0.
"""


def is_anchor(node: Node) -> bool:
    """A call of one of the operators."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in OPERATORS


def find(context: Context, anchor: Node) -> Site:
    """The call, operand by operand."""
    given = [argument for argument in (*anchor.args, *anchor.kwargs.values()) if argument is not None]
    operands = [argument for argument in given if isinstance(argument, Node)]
    if len(operands) != 3 or len(given) != 3 or anchor.kwargs.get("bias") is not None:
        raise Refused("the grouped product has no group ends, or a bias or dtype of its own", anchor)
    x, weight, ends = operands
    if [x.meta["val"].dim(), weight.meta["val"].dim()] != [2, 3]:
        raise Refused("the grouped product is not one of rows and a matrix for each group", anchor)
    if dtype_of(x) != dtype_of(weight):
        raise Refused(f"rows are {dtype_of(x)} and weights {dtype_of(weight)}", anchor)
    tensors = {"x": Operand(x), "weight": Operand(weight), "ends": Operand(ends)}
    return Site(OP, anchor, tensors, {}, (Output(anchor, 0),))


RULE = Rule(op=OP, is_anchor=is_anchor, find=find)
