"""Programs as data: frozen descriptions that print as the shortest call that makes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class Description:
    """Prints only what differs from the defaults, so that a failing example is short and can be pasted."""

    def __repr__(self) -> str:
        shown = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing example."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Mask(Description):
    """A condition on (batch, query, key), and how the scores learn of it.

    Attributes:
        kind: a name in `masks.CONDITIONS`: what is kept.
        made: a name in `masks.CAUSAL`: how the causal part of a condition is written.
        fill: a name in `masks.FILLS`.
        value: what a masked score becomes or is added: "-inf", "min" (of the dtype) or a number.
        width: of a window, chunk or prefix.
        offset: position of the first query.
    """

    kind: str = "causal"
    made: str = "tril"
    fill: str = "masked_fill"
    value: str | float = "-inf"
    width: int = 3
    offset: int = 0


@dataclass(frozen=True, repr=False)
class Attention(Description):
    """Softmax attention, however it is written.

    Attributes:
        layout: a name in `layouts.LAYOUTS`: how the operands lie when they are multiplied.
        projection: operands are "given", or "separate" or "fused" linear maps of one sequence (or two).
        batch, groups, ratio, queries, keys, dim, value_dim: sizes; there are groups * ratio query heads. ``keys`` 0
            means as many as queries, from the same sequence.
        spread: a name in `layouts.SPREADS`: how key heads meet their query heads.
        shared: the values are the keys.
        product: how products are written; "sdpa" leaves all to PyTorch.
        scale, scaled: the factor on the scores, and where it is applied.
        softcap: 0 for none.
        masks, joined: masks one after the other, or and-ed and filled as the first is.
        bias: a name in `masks.BIASES`, or "".
        sink: "", "behind" or "in front"; ``steadied`` subtracts the row's largest logit before the softmax.
        softmax: a name in `attention.SOFTMAXES`.
        dropout: a dropout module that is off.
        merged: heads are merged in the result.
        dtype: of inputs and parameters.
        dynamic: captured with symbolic batch and lengths, and run at others.
        trained: captured with inputs that require gradients.
        twists: names in `twists.TWISTS`.
    """

    layout: str = "bhsd"
    projection: str = "given"
    batch: int = 2
    groups: int = 2
    ratio: int = 1
    queries: int = 5
    keys: int = 0
    dim: int = 4
    value_dim: int = 4
    spread: str = "expand"
    shared: bool = False
    product: str = "matmul"
    scale: float = 0.5
    scaled: str = "after"
    softcap: float = 0.0
    masks: tuple[Mask, ...] = ()
    joined: bool = False
    bias: str = ""
    sink: str = ""
    steadied: bool = False
    softmax: str = "method"
    dropout: bool = False
    merged: bool = True
    dtype: str = "float32"
    dynamic: bool = False
    trained: bool = False
    twists: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.ratio

    @property
    def length(self) -> int:
        """Keys, also where they are the queries' own sequence."""
        return self.keys or self.queries

    @property
    def form(self) -> str:
        """The label under which verdicts are counted."""
        return f"sdpa {self.layout}" if self.product == "sdpa" else f"attention {self.layout}"


@dataclass(frozen=True, repr=False)
class Indexed(Description):
    """An indexer that selects compressed entries, and attention over a window and the selection.

    Attributes:
        batch, queries, heads, dim: of the attention; keys are values, one head for all.
        index_heads, index_dim: of the indexer.
        ratio: positions in one entry: there are queries // ratio of them.
        topk: entries selected, at most.
        window: width of the sliding window; 0 for attention over the entries alone.
        weighted: scores are summed by "mul" and sum, by "matmul" with the weights, or by "einsum".
        future: entries that are not ready are masked by "masked_fill", "where", "add", or not at all ("").
        sentinel: picks that are not ready become -1 by "where" or "masked_fill", or stay ("").
        scatter: the selection becomes a mask of zeros in a "bias", of "bool", of "bool sliced" from one entry more.
        fill: what is not selected is masked by "masked_fill", "where" or "add".
        sink: the softmax has one more logit.
        dtype, dynamic, trained, twists: as for `Attention`.
    """

    batch: int = 2
    queries: int = 12
    heads: int = 2
    dim: int = 4
    index_heads: int = 3
    index_dim: int = 4
    ratio: int = 2
    topk: int = 3
    window: int = 4
    weighted: str = "mul"
    future: str = "masked_fill"
    sentinel: str = "where"
    scatter: str = "bias"
    fill: str = "add"
    sink: bool = True
    dtype: str = "float32"
    dynamic: bool = False
    trained: bool = False
    twists: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """Compressed entries."""
        return self.queries // self.ratio

    @property
    def form(self) -> str:
        """The label under which verdicts are counted."""
        return f"indexer {self.scatter}"


Program = Attention | Indexed
