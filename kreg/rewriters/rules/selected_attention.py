"""How `selected_attention` is recognised: attention in which a tensor names the keys, or blocks of keys, of each query.

Whoever made the indices: a key counts if it is named, however often, and no mask drops it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import SELECTED_ATTENTION
from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.anchors import is_attention
from kreg.rewriters.arrange import Group, arrange
from kreg.rewriters.graph import aten, dtype_of, is_tensor, shape_of
from kreg.rewriters.lift import Lifter
from kreg.rewriters.lift_ops import CONTRACTIONS
from kreg.rewriters.masking import masking
from kreg.rewriters.notation import Expr
from kreg.rewriters.roles import Roles
from kreg.rewriters.rules.attention import extents, output, sinks, tempered
from kreg.rewriters.rules.padding import padding
from kreg.rewriters.rules.picks import Member, member
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.site import Mask, Operand, Refused, Site
from kreg.rewriters.softmax import Attention, read

OP: Op = SELECTED_ATTENTION

WRITES = frozenset({aten.scatter.value, aten.scatter.src, aten.scatter_add.default})
"""What makes a mask out of indices."""

DEEPEST = 12
"""Steps from a softmax to what its mask is written by, and from there to the indices."""


def find(context: Context, anchor: Node) -> Site:
    """The attention around a softmax, where its mask is a selection."""
    found = _read(context.lifter, anchor)
    roles, result, like = found.roles, dtype_of(found.output), extents(found)
    selection, block, structure = _selected(found.scores.keep, roles, anchor)
    if found.scores.biases:
        raise Refused("beside the selection there is a bias", anchor)
    if found.sinks_by_query:
        raise Refused("beside the selection there is a logit without a value for each query", anchor)
    masked = masking(found, like)
    if "bias" in masked.operands:
        raise Refused("what a query without keys gives is not one thing", anchor)

    def operand(element: n.Load, want: tuple[Group, ...], what: str) -> Operand:
        return arrange(element.node, element.index, want, what, full=True, like=like)

    slot = selection.element.index[-1]
    assert isinstance(slot, n.Var)
    heads = tuple(x for x in roles.heads + roles.repeats if x in selection.element.variables)
    operands = {
        "q": tempered(found, operand(found.q, roles.of_q, "queries").cast(result), like),
        "k": operand(found.k, roles.of_k, "keys").cast(result),
        "v": operand(found.v, roles.of_v, "values").cast(result),
        "indices": operand(selection.element, (roles.batch, heads, roles.query, (slot,)), "selection"),
    }
    if heads != (roles.heads + roles.repeats)[: len(heads)]:
        raise Refused("the selection is by heads that do not lie side by side", selection.element.node)
    if found.sinks is not None:
        operands["sinks"] = sinks(found, like)
    if structure.padding:
        keys = (roles.batch, (roles.key,))
        operands["padding"] = padding(found.lifter, structure.padding, keys, "padding", like)
    attributes = {
        "scale": found.scores.scale,
        "softcap": found.scores.softcap,
        "causal": structure.causal,
        "window": structure.window,
        "offset": structure.offset,
        "block": block,
        "empty": masked.attributes["empty"],
    }
    producer = context.producers.get(selection.element.node)
    by = "input" if selection.element.node.op == "placeholder" else "computed" if producer is None else producer.op.name
    return Site(OP, anchor, operands, attributes, (output(found),), _mask(structure, block, by), masked.claims)


def _read(lifter: Lifter, anchor: Node) -> Attention:
    """The attention; where its indices are computed in many steps, with one of these steps for the indices."""
    found = read(lifter, anchor)
    refusal: Refused | None = None
    for indices in (None, *_written(anchor)):
        try:
            attention = found if indices is None else read(Lifter({*lifter.opaque, indices}), anchor)
            _selected(attention.scores.keep, attention.roles, anchor)
            return attention
        except Refused as refused:
            refusal = refusal or refused
    assert refusal is not None
    raise refusal


def _written(anchor: Node) -> Iterator[Node]:
    """Integers that name where a mask is written, and those they are computed from one by one, nearest first."""
    pending = [(source, DEEPEST) for source in anchor.all_input_nodes]
    seen: set[Node] = set()
    while pending:
        node, depth = pending.pop(0)
        if node in seen or depth == 0 or node.target in CONTRACTIONS or not is_tensor(node):
            continue
        seen.add(node)
        if node.target in WRITES:
            steps = [node.args[2]]
            while len(steps) <= DEEPEST and isinstance(step := steps[-1], Node):
                yield step
                integers = [i for i in step.all_input_nodes if is_tensor(i) and not dtype_of(i).is_floating_point]
                steps.append(integers[0] if integers and shape_of(integers[0]) == shape_of(step) else None)
            return
        pending.extend((source, depth - 1) for source in node.all_input_nodes)


def _selected(keep: Expr, roles: Roles, anchor: Node) -> tuple[Member, int, masks.Structure]:
    """The selection, how many keys an index names, and the rest of the mask."""
    selections: list[tuple[Member, int]] = []
    others: Expr = n.TRUE
    for condition in n.conjuncts(keep):
        found = member(condition)
        block = None if found is None else _block(found.place, roles.key)
        if found is None or block is None:
            others = n.and_(others, condition)
        else:
            selections.append((found, block))
    if len(selections) != 1:
        raise Refused(f"the mask holds {len(selections) or 'no'} selections of keys", anchor)
    structure = masks.read(others, roles.query_index, roles.key, roles.batch)
    if not replace(structure, padding=()).is_band or structure.chunk or structure.prefix:
        raise Refused("beside the selection there is a mask that is neither causal, sliding nor padding", anchor)
    return *selections[0], structure


def _block(place: Expr, key: n.Var) -> int | None:
    """How many keys share an index, where the index is of the key alone."""
    match place:
        case n.Var() if place == key:
            return 1
        case n.Apply("floordiv", (n.Var() as variable, n.Const(int(block)))) if variable == key:
            return block
    return None


def _mask(structure: masks.Structure, block: int, by: str) -> Mask:
    facts: dict[str, Any] = {name: value for name in ("window", "offset") if (value := getattr(structure, name))}
    if block > 1:
        facts["block"] = block
    kinds = [("sliding" if structure.causal else "local")] if structure.window else []
    if structure.causal and not structure.window:
        kinds.append("causal")
    kinds.append("top-k")
    if structure.padding:
        kinds.append("padding")
        facts["padding"] = "input"
    return Mask("+".join(kinds), facts | {"selected": by})


RULE = Rule(op=OP, is_anchor=is_attention, find=find)
