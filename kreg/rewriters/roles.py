"""Which index variable of an attention plays which part.

By what they index, whatever their order: a channel is in the values alone, a query's variables are in neither keys nor
values, what is in keys or values is batch or heads. Heads that share a key head are query variables too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.arrange import Group
from kreg.rewriters.lift import Index
from kreg.rewriters.notation import Expr, Var
from kreg.rewriters.scores import Scores
from kreg.rewriters.site import Refused


@dataclass(frozen=True)
class Roles:
    """Index variables by role.

    Attributes:
        batch, heads: those of keys or values; a head of ``heads`` is shared by the query heads of ``repeats``.
        query: of the queries, one variable or none.
        key: what the softmax runs over.
        inner: what queries and keys are multiplied over.
        channel: of the values.
    """

    batch: Group
    heads: Group
    repeats: Group
    query: Group
    key: Var
    inner: Group
    channel: Group

    @property
    def query_index(self) -> Expr:
        """The query's place; 0 where there is one query."""
        return self.query[0] if self.query else n.ZERO

    @property
    def queries(self) -> n.Sized:
        """How many queries there are."""
        return self.query[0].size if self.query else 1

    @property
    def of_q(self) -> tuple[Group, ...]:
        """The queries' dimensions: batch, heads, queries, head_dim."""
        return self.batch, self.heads + self.repeats, self.query, self.inner

    @property
    def of_k(self) -> tuple[Group, ...]:
        """The keys': batch, kv_heads, keys, head_dim."""
        return self.batch, self.heads, (self.key,), self.inner

    @property
    def of_v(self) -> tuple[Group, ...]:
        """The values': batch, kv_heads, keys, value_dim."""
        return self.batch, self.heads, (self.key,), self.channel

    @property
    def of_scores(self) -> tuple[Group, ...]:
        """Those of a bias or a mask: batch, heads, queries, keys."""
        return self.batch, self.heads + self.repeats, self.query, (self.key,)

    @property
    def of_out(self) -> tuple[Group, ...]:
        """The result's: batch, heads, queries, value_dim."""
        return self.batch, self.heads + self.repeats, self.query, self.channel


def assign(index: Index, weights: Index, key: Var, scores: Scores, v: Expr, sink: Expr | None, output: Node) -> Roles:
    """Gives the variables of a result's index their roles.

    Args:
        index: of the result.
        weights: of the softmax: batch, heads, query, key in the model's own order.

    Raises:
        Refused: a variable that fits none.
    """
    q, k = scores.product.q, scores.product.keys
    outer = [x for x in _ordered(weights) if x != key]
    result = {x for i in index for x in i.variables}
    channel = tuple(x for x in _ordered(index) if x in v.variables and x not in outer)
    strays = [x for x in result if x not in outer and x not in channel]
    if strays:
        raise Refused("the product with the values is broadcast along a dimension of its own", output)
    for operand, own in ((q, scores.product.channels), (k, (*scores.product.channels, key)), (v, (*channel, key))):
        if not operand.variables <= {*outer, *own}:
            raise Refused("an operand has a dimension that the result has not", output)
    alone = [x for x in outer if x in k.variables and x not in q.variables and x not in v.variables]
    if alone:
        raise Refused("the keys have a dimension that neither queries nor values have", output)
    if not channel:
        raise Refused("the values have no channels", output)
    per_query = [x for x in outer if x not in k.variables and x not in v.variables]
    shared = [x for x in outer if x not in per_query]
    query = _query(per_query, key, scores)
    repeats = tuple(x for x in per_query if x not in query)
    by_query = sink is not None and bool(sink.variables & set(query))
    together = any(i.variables & set(shared) and i.variables & set(repeats) for i in weights)
    heads = _heads(shared, per_query, key, scores, None if by_query else sink, together)
    batch = tuple(x for x in shared if x not in heads)
    return Roles(batch, heads, repeats, query, key, scores.product.channels, channel)


def _ordered(index: Index) -> list[Var]:
    """Variables in the order of an index, most significant first."""
    found: list[Var] = []
    for i in index:
        terms, _ = n.parts(i)
        for atom, _ in sorted(terms.items(), key=lambda item: -item[1]):
            found.extend(x for x in sorted(atom.variables, key=lambda x: x.name) if x not in found)
    return found


def _query(per_query: Sequence[Var], key: Var, scores: Scores) -> Group:
    """The variable that masks compare with the key; the last one where they compare none."""
    for mask in scores.masks:
        for condition in n.conjuncts(mask.keep):
            compared = [x for x in per_query if {x, key} <= condition.variables]
            if len(compared) == 1:
                return (compared[0],)
    return tuple(per_query[-1:])


def _heads(
    shared: Sequence[Var], per_query: Sequence[Var], key: Var, scores: Scores, sink: Expr | None, together: bool
) -> Group:
    """The key heads: what the sinks are indexed by, else the last shared variable that no padding mask is over.

    One shared variable beside several of the queries is a batch of one shared head each, unless the model keeps it
    ``together`` with those that repeat it, as the heads of a batch of one.
    """
    if sink is not None and sink.variables & set(shared):
        return tuple(x for x in shared if x in sink.variables)
    conditions = [c for mask in scores.masks for c in n.conjuncts(mask.keep) if key in c.variables]
    padded = {x for c in conditions if not c.variables & set(per_query) for x in c.variables}
    free = [x for x in shared if x not in padded]
    alone = len(shared) == 1 and len(per_query) > 1 and not together
    return () if alone else tuple(free[-1:])
