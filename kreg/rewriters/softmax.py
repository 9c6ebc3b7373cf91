"""Softmax attention in index notation: ``out = sum_t softmax_t(cap(scale * q.k) + masks) * v``.

One reading serves every rule that wants attention of some kind: it starts at a softmax, finds the product with
the values that consumes it, and takes the scores apart into the product with the keys, constants, masks and
biases. Identities used: a softmax does not change when all its logits shift by the same amount; a logit that no
value stands behind is a sink.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten, dtype_of, shape_of, users
from kreg.rewriters.lift import Index, Lifter, variables
from kreg.rewriters.lift_ops import CONTRACTIONS, LAYOUT, POINTWISE, SOFTMAXES
from kreg.rewriters.masks import NEGLIGIBLE, keep_of
from kreg.rewriters.notation import Expr
from kreg.rewriters.site import Refused

DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default, operator.getitem})
LOGITS = frozenset(
    {
        *(
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.mul.Tensor,
            aten.div.Tensor,
            aten.mul.Scalar,
            aten.div.Scalar,
        ),
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.tanh.default, aten.baddbmm.default),
        *(aten.clamp.default, aten._to_copy.default, aten.to.dtype),
    }
)
"""What may stand between the product with the keys and the softmax, for the softmax to be an anchor."""
WEIGHTS = frozenset(
    {
        *(
            aten.mul.Tensor,
            aten.div.Tensor,
            aten.mul.Scalar,
            aten.div.Scalar,
            aten._to_copy.default,
            aten.to.dtype,
        ),
        *(aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
        *(aten.add.Tensor, aten.sub.Tensor),
    }
)
"""What may stand between the softmax and the product with the values, likewise."""


@dataclass(frozen=True)
class MaskTerm:
    """One mask on the scores: kept where ``keep``; ``expression`` is what was added, or the condition itself.

    ``infinite`` tells -inf from a large finite number, which leaves uniform weights where everything is masked.
    """

    keep: Expr
    expression: Expr
    additive: bool
    infinite: bool


@dataclass(frozen=True)
class Scores:
    """The logits of one key, taken apart."""

    product: Expr
    scale: float
    softcap: float
    masks: tuple[MaskTerm, ...]
    biases: tuple[Expr, ...]
    shift: tuple[Expr, ...]

    @property
    def keep(self) -> Expr:
        """The condition that all masks together make."""
        result: Expr = n.TRUE
        for mask in self.masks:
            result = n.and_(result, mask.keep)
        return result


@dataclass(frozen=True, eq=False)
class SoftmaxAttention:
    """An attention as it was found, before any rule asks for more.

    Attributes:
        lifter: what lifted it.
        softmax: the softmax node; ``weights`` is the index of the weight of key ``t`` in it.
        output: the product with the values, indexed by (batch, head, query, value) = ``index``.
        query, key, head, batch, channel: those variables; head and batch are None where the graph has none.
        q, k, v: elements of the operands.
        sinks: the logit without a value, or None.
    """

    lifter: Lifter
    softmax: Node
    weights: n.Softmax
    output: Node
    index: Index
    batch: Expr | None
    head: Expr | None
    query: n.Var
    key: n.Var
    channel: Expr
    q: n.Load
    k: n.Load
    v: n.Load
    inner: n.Var
    scores: Scores
    sinks: Expr | None

    def scores_at(self, key: Expr) -> Scores:
        """The logits of another key."""
        return _scores(self.lifter, self.softmax, _place(self.weights, self.key, key))


def is_attention(softmax: Node) -> bool:
    """Whether a softmax stands between two matrix products: the anchor of every attention rule."""
    if softmax.target not in SOFTMAXES or not isinstance(softmax.args[0], Node):
        return False
    return _from_product(softmax.args[0], 10) and _to_product(softmax, 10)


def _from_product(node: Node, depth: int) -> bool:
    if node.op != "call_function" or depth == 0:
        return False
    if node.target in CONTRACTIONS or node.target is aten.baddbmm.default:
        return True
    if node.target is aten.cat.default:
        return any(_from_product(piece, depth - 1) for piece in node.args[0])  # type: ignore[union-attr, arg-type]
    if node.target not in LAYOUT and node.target not in LOGITS:
        return False
    return any(_from_product(i, depth - 1) for i in node.all_input_nodes)


def _to_product(node: Node, depth: int) -> bool:
    if depth == 0:
        return False
    for user in users(node):
        passes = user.target in LAYOUT or user.target in WEIGHTS or user.target in DROPOUTS
        if user.target in CONTRACTIONS or (passes and _to_product(user, depth - 1)):
            return True
    return False


def read(lifter: Lifter, softmax: Node) -> SoftmaxAttention:
    """Takes an attention apart.

    Raises:
        Refused: an obligation that does not hold, with its node.
    """
    output = _consumer(softmax)
    index = variables(output, "bhsd" if len(shape_of(output)) == 4 else "hsd")
    if len(index) not in (3, 4):
        raise Refused(f"the product with the values has {len(index)} dimensions, not 3 or 4", output)
    weights, v, key = _weighted_values(lifter, output, index)
    batch, head, query, channel = _roles(index, weights, v, output)
    place = weights.index[weights.dim]
    if key.size == 1:
        raise Refused("there is a single key: its weight is no choice among keys", softmax)
    if place not in (key, n.add(key, n.ONE)):
        raise Refused("the softmax does not run over the keys that the values are summed over", softmax)
    scores = _scores(lifter, softmax, weights.index)
    sinks = _sink(lifter, softmax, weights, key, scores)
    q, k, inner = _product(scores.product, query, key, output)
    return SoftmaxAttention(
        lifter,
        softmax,
        weights,
        output,
        index,
        batch,
        head,
        query,
        key,
        channel,
        q,
        k,
        v,
        inner,
        scores,
        sinks,
    )


def _consumer(softmax: Node) -> Node:
    """The one product that the weights go into; they may go nowhere else."""
    node = softmax
    while True:
        following = users(node)
        if len(following) != 1:
            names = ", ".join(user.name for user in following)
            raise Refused(f"the attention weights are used more than once, by {names}", node)
        (user,) = following
        if user.target in CONTRACTIONS:
            return user
        if user.target in DROPOUTS and (user.target is not aten.dropout.default or _active(user)):
            raise Refused(f"dropout is on for the attention weights (p={user.args[1]})", user)
        if user.op != "call_function" or not (user.target in LAYOUT or user.target in POINTWISE):
            raise Refused(f"the attention weights leave the region through {user.name}", user)
        node = user


def _active(dropout: Node) -> bool:
    return bool(dropout.args[1] != 0.0 and dropout.args[2])


def _factors(e: Expr) -> tuple[Expr, ...]:
    return e.arguments if isinstance(e, n.Apply) and e.function == "mul" else (e,)


def _weighted_values(lifter: Lifter, output: Node, index: Index) -> tuple[n.Softmax, n.Load, n.Var]:
    found = lifter.element(output, index)
    if not isinstance(found, n.Reduce) or found.kind != "sum":
        raise Refused("the product with the values has a form that is not read", output)
    factors = _factors(found.body)
    weights = [f for f in factors if isinstance(f, n.Softmax)]
    values = [f for f in factors if isinstance(f, n.Load)]
    if len(weights) != 1 or len(values) != 1 or len(factors) != 2:
        odd = next((f for f in factors if not isinstance(f, (n.Softmax, n.Load))), None)
        name = odd.function if isinstance(odd, n.Apply) else type(odd).__name__.lower()
        raise Refused(f"between the softmax and the values there is more than a product ({name})", output)
    return weights[0], values[0], found.variable


def _roles(
    index: tuple[n.Var, ...], weights: n.Softmax, v: n.Load, output: Node
) -> tuple[n.Var | None, n.Var, n.Var, n.Var]:
    """Which dimension of the result is which; any choice is right that keeps queries from the values.

    As most code lays them out where that holds, else by what they index: weights are batch, head, query, key.
    """
    *outer, head, query, channel = index
    rows = [i for i in weights.index if isinstance(i, n.Var) and i in index]
    in_order = not {head, query} <= set(rows) or rows.index(head) < rows.index(query)
    if in_order and channel not in rows and query not in v.variables:
        return (outer[0] if outer else None), head, query, channel
    channels = [i for i in index if i not in rows and i in v.variables]
    if len(channels) != 1:
        raise Refused("the product with the values does not end in one dimension of the values", output)
    rest = [i for i in index if i not in rows and i not in channels]
    order = [*rest, *rows]
    queries = [i for i in order if i not in v.variables]
    if not queries:
        raise Refused("the values depend on the query", output)
    *outer, head = (i for i in order if i != queries[-1])
    return (outer[0] if outer else None), head, queries[-1], channels[0]


def _place(weights: n.Softmax, key: n.Var, at: Expr) -> Index:
    return tuple(n.substitute(i, {key: at}) for i in weights.index)


def _scores(lifter: Lifter, softmax: Node, index: Index) -> Scores:
    source = softmax.args[0]
    assert isinstance(source, Node)
    logits = lifter.element(source, index)
    key = next(iter(index[_softmax_dim(softmax)].variables), None)
    masks: list[MaskTerm] = []
    biases: list[Expr] = []
    shift: list[Expr] = []
    cores: list[Expr] = []
    pending = [logits]
    while pending:
        e = pending.pop()
        keep = keep_of(e)
        if keep is not None:
            masks.append(MaskTerm(keep, e, additive=True, infinite=_infinite(e)))
            continue
        match e:
            case n.Apply("add", arguments):
                pending.extend(arguments)
                continue
            case n.Apply("where", (c, x, n.Const(value))) if value <= NEGLIGIBLE:
                masks.append(MaskTerm(c, c, additive=False, infinite=value == float("-inf")))
                pending.append(x)
                continue
            case n.Apply("where", (c, n.Const(value), x)) if value <= NEGLIGIBLE:
                masks.append(MaskTerm(n.not_(c), n.not_(c), additive=False, infinite=value == float("-inf")))
                pending.append(x)
                continue
            case n.Apply("rounded:bfloat16" | "rounded:float16", (inner,)) if not _narrower(e, softmax):
                pending.append(inner)
                continue
        if _has_product(e):
            cores.append(e)
        elif key is not None and key not in e.variables:
            shift.append(e)
        else:
            biases.append(e)
    if len(cores) != 1:
        if any(isinstance(b, n.Softmax) for b in biases):
            raise Refused("the logits hold another softmax", softmax)
        raise Refused("the logits are not one product of queries and keys", softmax)
    product, scale, softcap = _core(cores[0], softmax)
    return Scores(product, scale, softcap, tuple(masks), tuple(biases), tuple(shift))


def _narrower(e: n.Apply, softmax: Node) -> bool:
    """Whether a rounding in the scores loses more than the result's own dtype does."""
    result = dtype_of(_consumer(softmax))
    return str(result).removeprefix("torch.") not in e.function


def _softmax_dim(softmax: Node) -> int:
    rank = len(shape_of(softmax))
    dim = softmax.args[1]
    assert isinstance(dim, int)
    return dim % rank


def _infinite(e: Expr) -> bool:
    return all(part.value == float("-inf") for part in e.walk() if isinstance(part, n.Const) and part.value < -1)


def _has_product(e: Expr) -> bool:
    return any(isinstance(part, n.Reduce) and part.kind == "sum" and not n.is_integral(part) for part in e.walk())


def _core(e: Expr, softmax: Node) -> tuple[Expr, float, float]:
    """``c * cap * tanh(scale / cap * product)`` or ``scale * product``: (product, scale, softcap)."""
    scale, inner = n.scaled(e)
    match inner:
        case n.Apply("tanh", (argument,)):
            inner_scale, product = n.scaled(argument)
            _expect_product(product, softmax)
            return product, inner_scale * scale, scale
        case n.Apply("rounded:bfloat16" | "rounded:float16", (argument,)) if not _narrower(inner, softmax):
            more, product = n.scaled(argument)
            _expect_product(product, softmax)
            return product, scale * more, 0.0
    _expect_product(inner, softmax)
    return inner, scale, 0.0


def _expect_product(e: Expr, softmax: Node) -> None:
    if not isinstance(e, n.Reduce):
        name = e.function if isinstance(e, n.Apply) else type(e).__name__.lower()
        raise Refused(f"the scores pass through {name!r} before the softmax", softmax)


def _sink(lifter: Lifter, softmax: Node, weights: n.Softmax, key: n.Var, scores: Scores) -> Expr | None:
    extent = n.size(shape_of(softmax)[weights.dim])
    keys = n.size(key.size)
    if extent == keys:
        return None
    if extent != n.add(keys, n.ONE):
        raise Refused("the softmax runs over logits that have no value, and they are not one sink", softmax)
    at = n.ZERO if weights.index[weights.dim] != key else keys
    source = softmax.args[0]
    assert isinstance(source, Node)
    index = (*weights.index[: weights.dim], at, *weights.index[weights.dim + 1 :])
    logit = lifter.element(source, index)
    rest = list(logit.arguments) if isinstance(logit, n.Apply) and logit.function == "add" else [logit]
    for e in scores.shift:
        if e not in rest:
            raise Refused("the keys' logits are shifted by an amount that the sink's is not", softmax)
        rest.remove(e)
    if len(rest) != 1:
        raise Refused("the sink is a sum that is not read", softmax)
    return rest[0]


def _product(e: Expr, query: Expr, key: n.Var, node: Node) -> tuple[n.Load, n.Load, n.Var]:
    """q, k and the channel they are summed over, from ``sum_d q[.., s, d] * k[.., t, d]``."""
    assert isinstance(e, n.Reduce)
    factors = _factors(e.body)
    operands = [f for f in factors if isinstance(f, n.Load)]
    if len(operands) != 2 or len(factors) != 2:
        raise Refused("the scores are not a product of two tensors", node)
    with_key = [f for f in operands if key in f.variables]
    with_query = [f for f in operands if query in f.variables]
    if len(with_key) != 1 or len(with_query) != 1 or with_key == with_query:
        raise Refused("the scores' operands are not one of queries and one of keys", node)
    return with_query[0], with_key[0], e.variable
