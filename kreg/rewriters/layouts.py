"""Strides: a value that an op computes may be laid out otherwise than the one that code behind it was captured with."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from kreg.rewriters.graph import aten, is_tensor, sized
from kreg.rewriters.lift_ops import LAYOUT, POINTWISE
from kreg.rewriters.site import Calls

STRICT_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
BY_STRIDES = frozenset(
    {aten.as_strided.default, aten.dropout.default, aten.native_dropout.default, aten.bernoulli.default}
)
"""Operators whose result depends on how their input is laid out; random numbers are drawn in the order of memory."""

WRITTEN_INTO = frozenset(
    {
        *(aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default),
        *(aten.index_put.default, aten.index_add.default, aten.index_copy.default, aten.masked_scatter.default),
        *(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.scatter.src, aten.scatter.value),
        *(aten.scatter_add.default, aten.copy.default),
    }
)
"""Copies with other numbers in some places: laid out as what they are copies of."""

OF_IMAGES = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.pad.default),
        *(aten.batch_norm.default, aten.group_norm.default, aten.max_pool2d.default, aten.avg_pool2d.default),
        *(aten.adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec),
    }
)
"""Operators that give channels last where they get them."""

KEEPING = frozenset({*LAYOUT, *POINTWISE, *WRITTEN_INTO, *OF_IMAGES, operator.getitem})
"""Operators whose result is laid out by how their input is."""


def restored(old: Node, new: Any) -> Calls:
    """The copy that gives a new value the strides of the old one; none where nobody can tell the difference."""
    if _strides(old.meta["val"]) == _strides(new) or not any(_tells(user) for user in behind([old])):
        return ()
    strides = old.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda d: -_hint(strides[d]))
    if order == list(range(len(order))):
        return ((aten.contiguous.default, ()),)
    back = [order.index(d) for d in range(len(order))]
    return (aten.permute.default, (order,)), (aten.contiguous.default, ()), (aten.permute.default, (back,))


def _strides(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(sized(s) for s, extent in zip(value.stride(), value.shape, strict=True) if sized(extent) != 1)


def _hint(stride: int | torch.SymInt) -> int:
    """A stride to sort by: the example's; sizes that depend on data count as 2."""
    if isinstance(stride, int):
        return stride
    known = stride.node.shape_env.backed_var_to_val
    return int(stride.node.expr.xreplace({s: known.get(s, 2) for s in stride.node.expr.free_symbols}))


def _tells(user: Node) -> bool:
    return user.op == "output" or user.target in BY_STRIDES


def behind(nodes: Iterable[Node], through: Container[Any] | None = KEEPING) -> Iterator[Node]:
    """Consumers that a value's strides reach: through views, and through what keeps them; all, where that is None."""
    pending, seen = list(nodes), set()
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            yield user
            if through is None or user.target in through:
                pending.append(user)


def loosen(ops: Iterable[Node]) -> None:
    """Views behind an op may have to copy, and copies that were made for their layout alone may not.

    Which operators pass a layout on nobody has listed: a view that need not copy loses nothing.
    """
    for user in list(behind(ops, through=None)):
        if user.target in STRICT_VIEWS:
            user.target = aten.reshape.default
        elif _is_for_layout(user):
            user.target, user.kwargs = aten.contiguous.default, {}


def _is_for_layout(node: Node) -> bool:
    """Whether a copy is made for its layout alone; one that leaves the graph has to be a tensor of its own."""
    contiguous = node.kwargs == {"memory_format": torch.contiguous_format}
    own = all(user.op != "output" for user in node.users)
    return node.target is aten.clone.default and contiguous and own and is_tensor(node)
