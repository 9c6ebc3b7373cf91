"""Strides: a value that an op computes may be laid out otherwise than the one that code behind it was captured with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from kreg.rewriters.graph import aten, is_tensor, sized
from kreg.rewriters.lift_ops import CONTRACTIONS
from kreg.rewriters.site import Calls

STRICT_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
BY_STRIDES = frozenset(
    {aten.as_strided.default, aten.dropout.default, aten.native_dropout.default, aten.bernoulli.default}
)
"""Operators whose result depends on how their input is laid out; random numbers are drawn in the order of memory."""

PRODUCTS = frozenset(
    {*CONTRACTIONS, aten.baddbmm.default, aten.linear.default, aten.addmm.default, aten._grouped_mm.default}
)
"""Operators whose result is laid out in one way, however their inputs are; of any other it may depend on them."""


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


def behind(nodes: Iterable[Node]) -> Iterator[Node]:
    """Consumers that a value's strides reach."""
    pending, seen = list(nodes), set()
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            yield user
            if user.target not in PRODUCTS:
                pending.append(user)


def loosen(ops: Iterable[Node]) -> None:
    """Views behind an op may have to copy, and copies that were made for their layout alone may not."""
    for user in list(behind(ops)):
        if user.target in STRICT_VIEWS:
            user.target = aten.reshape.default
        elif _is_for_layout(user):
            user.target, user.kwargs = aten.contiguous.default, {}


def _is_for_layout(node: Node) -> bool:
    """Whether a copy is made for its layout alone; one that leaves the graph has to be a tensor of its own."""
    contiguous = node.kwargs == {"memory_format": torch.contiguous_format}
    own = all(user.op != "output" for user in node.users)
    return node.target is aten.clone.default and contiguous and own and is_tensor(node)
