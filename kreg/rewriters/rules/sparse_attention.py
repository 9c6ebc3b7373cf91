"""How `sparse_attention` is recognised: attention whose keys are its values, under a window and over entries.

It is softmax attention of one shared head in which keys and values are the same tensor, alone or followed by
compressed entries, with a causal window proven on the first part, and on the second that every ready entry is
seen or exactly those that an indexer selected.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from kreg.registry.op import Op
from kreg.registry.ops import LIGHTNING_INDEXER, SPARSE_ATTENTION
from kreg.rewriters import masks
from kreg.rewriters import notation as n
from kreg.rewriters.anchors import is_attention
from kreg.rewriters.arrange import arrange, bind
from kreg.rewriters.graph import aten, dtype_of, shape_of
from kreg.rewriters.lift import Index
from kreg.rewriters.masking import claims
from kreg.rewriters.notation import Expr
from kreg.rewriters.rules.attention import extents, output, sinks
from kreg.rewriters.rules.rule import Context, Rule
from kreg.rewriters.scores import INFINITE, Scores
from kreg.rewriters.site import Mask, Operand, Refused, Site
from kreg.rewriters.softmax import Attention, read

OP: Op = SPARSE_ATTENTION


def find(context: Context, anchor: Node) -> Site:
    """The sparse attention around a softmax."""
    found = read(context.lifter, anchor)
    roles, result = found.roles, dtype_of(found.output)
    _shares_keys_and_values(found)
    if found.scores.softcap or found.scores.biases or found.scores.product.tempers or found.factor != 1.0:
        raise Refused("the scores have a soft cap, a temperature or a bias", anchor)
    parts = _parts(found)

    def keys(position: int, what: str) -> Operand:
        node, index, variable = parts[position]
        element = context.lifter.operand(node, index)
        if not isinstance(element, n.Load):
            element = n.Load(node, index, False)
        want = (roles.batch, (variable,), roles.inner)
        return arrange(element.node, element.index, want, what, full=True, like=extents(found)).cast(result)

    query = roles.query_index
    local_scores = found.scores_at(parts[0][2])
    local = masks.read(local_scores.keep, query, parts[0][2], roles.batch)
    unpadded = replace(local, padding=())
    if not unpadded.is_band or not local.causal or local.chunk or local.prefix:
        raise Refused("no causal window is proven over the keys", anchor)
    if found.sinks is None and not masks.leaves_keys(unpadded, roles.queries, parts[0][2].size):
        raise Refused("the mask may leave a query without keys", anchor)
    window = local.window or _all_of(roles.queries, local.offset, anchor)
    queries = arrange(found.q.node, found.q.index, roles.of_q, "queries", full=True, like=extents(found))
    operands = {"q": queries.cast(result), "kv": keys(0, "keys")}
    attributes = {"scale": found.scores.scale, "window": window, "ratio": 0, "offset": local.offset}
    facts: dict[str, object] = {"window": window}
    kind = "sliding"
    if len(parts) == 2:
        operands["compressed"] = keys(1, "compressed entries")
        scores = found.scores_at(n.add(n.size(parts[0][2].size), parts[1][2]))
        seen = masks.read(scores.keep, query, parts[1][2], roles.batch)
        if seen.rest or seen.padding or seen.causal or seen.window or seen.chunk or seen.prefix or seen.documents:
            raise Refused("the mask over the compressed entries is neither causal by block nor a selection", anchor)
        if seen.selected is not None:
            operands["indices"], attributes["ratio"] = _selection(context, found, seen, local.offset)
            kind, facts["selected"] = "sliding+top-k", "lightning_indexer"
        elif seen.ratio:
            if seen.offset != local.offset:
                raise Refused("window and compressed entries disagree about where the queries stand", anchor)
            attributes["ratio"] = seen.ratio
            kind = "sliding+block-causal"
        else:
            raise Refused("every query sees every compressed entry, ready or not", anchor)
        facts["ratio"] = attributes["ratio"]
    if local.padding:
        operands["padding"] = _padding(found, local.padding, parts[0][2], local_scores)
        kind, facts["padding"] = f"{kind}+padding", "input"
    if found.sinks is not None:
        operands["sinks"] = sinks(found, extents(found))
    held = claims(found, found.scores.masks, extents(found))
    return Site(OP, anchor, operands, attributes, (output(found),), Mask(kind, facts), held)


def _all_of(queries: n.Sized, offset: int, anchor: Node) -> int:
    """A window that no query of this many reaches the end of."""
    if not isinstance(queries, int):
        raise Refused("no causal window is proven over the keys", anchor)
    return queries + offset


Part = tuple[Node, Index, n.Var]


def _shares_keys_and_values(found: Attention) -> None:
    roles = found.roles
    if roles.heads or not roles.repeats or len(roles.inner) != 1 or len(roles.channel) != 1:
        raise Refused("the heads do not share one head of keys", found.output)
    renamed = tuple(n.substitute(i, {roles.inner[0]: roles.channel[0]}) for i in found.k.index)
    if found.k.node is not found.v.node or renamed != found.v.index:
        raise Refused("keys and values are different tensors", found.output)


def _parts(found: Attention) -> list[Part]:
    """The keys as pieces of a concatenation: (node, index, its own key variable)."""
    node, index = found.k.node, found.k.index
    place = index.index(found.roles.key)

    def own(piece: Node, name: str) -> Part:
        variable = n.Var(name, shape_of(piece)[place])
        return piece, (*index[:place], variable, *index[place + 1 :]), variable

    pieces = [node]
    if node.target is aten.cat.default:
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim % len(index) == place:
            pieces = [p for p in node.args[0] if _is_piece(p, len(index), place)]
    if len(pieces) > 2:
        raise Refused(f"the keys are {len(pieces)} pieces, not one or two", node)
    return [own(piece, name) for piece, name in zip(pieces, ("t", "j"), strict=False)]


def _is_piece(node: Node, rank: int, place: int) -> bool:
    """Concatenation skips tensors without elements, of whatever rank: a cache before its first key is one."""
    shape = shape_of(node)
    return len(shape) == rank and shape[place] != 0


def _selection(context: Context, found: Attention, seen: masks.Structure, offset: n.Sized) -> tuple[Operand, int]:
    """The selected entries, proven distinct and ready by the op that made them."""
    selected = seen.selected
    assert selected is not None
    producer = context.producers.get(selected.node)
    if producer is None or producer.op is not LIGHTNING_INDEXER:
        raise Refused("the selected entries are not proven to be distinct: no indexer was raised", selected.node)
    by = producer.attributes
    if not by.get("sentinel", True):
        raise Refused("picks that are not ready are not marked by -1", selected.node)
    if seen.ratio and (seen.ratio, seen.offset) != (by["ratio"], by["offset"]):
        raise Refused("entries are selected by another block ratio than they are masked by", selected.node)
    if by["offset"] != offset:
        raise Refused("window and selected entries disagree about where the queries stand", selected.node)
    place = selected.index[-1]
    assert isinstance(place, n.Var)
    want = (found.roles.batch, found.roles.query, (place,))
    return arrange(selected.node, selected.index, want, "selection", full=True, like=extents(found)), by["ratio"]


def _padding(found: Attention, conditions: tuple[Expr, ...], key: n.Var, scores: Scores) -> Operand:
    """The one input that pads keys, as a boolean tensor; a query may be left with the sink alone, or nothing."""
    if found.sinks is None and not all(term.value == INFINITE for term in scores.masks):
        raise Refused("a padded query without a sink has uniform weights in the model", found.anchor)
    if len(conditions) != 1:
        raise Refused("two padding masks apply to the keys", found.anchor)
    want, like = (found.roles.batch, (key,)), extents(found)
    match conditions[0]:
        case n.Apply("not", (n.Apply("eq0", (n.Load() as element,)),)):
            return arrange(element.node, element.index, want, "padding", full=True, like=like).then(aten.ne.Scalar, 0)
    return bind(found.lifter, conditions[0], want, "padding", like, full=True)


RULE = Rule(op=OP, is_anchor=is_attention, find=find)
