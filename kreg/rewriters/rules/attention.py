"""How `attention` is recognised: any softmax between a product of queries with keys and one with values."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import ATTENTION
from kreg.rewriters import notation as n
from kreg.rewriters.anchors import is_attention
from kreg.rewriters.arrange import Group, arrange, arranged_back, bind, laid_out
from kreg.rewriters.graph import aten, dtype_of, shape_of
from kreg.rewriters.masking import masking
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Calls, Extent, Operand, Output, Refused, Site
from kreg.rewriters.softmax import Attention, read

OP: Op = ATTENTION


def find(context: Context, anchor: Node) -> Site:
    """The attention around a softmax."""
    found = read(context.lifter, anchor)
    roles, result = found.roles, dtype_of(found.output)
    like = extents(found)

    def operand(element: Expr, want: tuple[Group, ...], what: str) -> Operand:
        return laid_out(element, roles.key, want, what, result, like)

    operands = {
        "q": tempered(found, operand(found.q, roles.of_q, "queries"), like),
        "k": operand(found.scores.product.keys, roles.of_k, "keys"),
        "v": operand(found.values, roles.of_v, "values"),
    }
    masked = masking(found, like)
    if found.sinks is not None:  # one for each query has become a bias, and is 0
        operands["sinks"] = sinks(replace(found, sinks=n.Const(0.0)) if found.sinks_by_query else found, like)
    attributes = {"scale": found.scores.scale, "softcap": found.scores.softcap, **masked.attributes}
    return Site(OP, anchor, operands | masked.operands, attributes, (output(found),), masked.mask, masked.claims)


def tempered(found: Attention, q: Operand, like: list[Extent]) -> Operand:
    """The queries times what the model multiplies the scores by, row by row."""
    for factor in found.scores.product.tempers:
        q = q.then(aten.mul.Tensor, bind(found.lifter, factor, (*found.roles.of_q[:3], ()), "temperature", like))
    return q


def output(found: Attention) -> Output:
    """The product with the values, as the op's first result."""
    back: Calls = arranged_back(found.output, found.index, found.roles.of_out)
    if found.factor != 1.0:
        back = (*back, (aten.mul.Scalar, (found.factor,)))
    return Output(found.output, 0, back)


def extents(found: Attention) -> list[Extent]:
    """Where the sizes of an attention's dimensions can be read: its operands."""
    return [Extent(node, d) for node in found.operands for d in range(len(shape_of(node)))]


def sinks(found: Attention, like: list[Extent]) -> Operand:
    """The sink as a vector over heads."""
    heads = found.roles.heads + found.roles.repeats
    match found.sinks:
        case n.Load(node, index) if found.sinks.variables <= set(heads):
            return arrange(node, index, (heads,), "sink", full=True, like=like)
        case n.Const(value):
            count = 1
            for head in heads:
                if not isinstance(head.size, int):
                    raise Refused("the number of heads is symbolic", found.anchor)
                count *= head.size
            return Operand(found.q.node).then(aten.new_full.default, [count], float(value))
    raise Refused("the logit without a value is not one number a head", found.anchor)


RULE = Rule(op=OP, is_anchor=is_attention, find=find)
