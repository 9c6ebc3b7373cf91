"""A padding mask as an operand: one boolean for each key of each batch element."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kreg.rewriters import notation as n
from kreg.rewriters.arrange import Group, arrange, bind
from kreg.rewriters.graph import aten, dtype_of
from kreg.rewriters.lift import Lifter
from kreg.rewriters.notation import Expr
from kreg.rewriters.site import Extent, Operand, Refused


def padding(
    lifter: Lifter, conditions: Sequence[Expr], want: Sequence[Group], what: str, like: Sequence[Extent]
) -> Operand:
    """The conjunction of conditions on (batch, key) as one tensor, True where a key is kept.

    Raises:
        Refused: a condition has no tensor of its own.
    """
    first, *others = [_tensor(lifter, condition, want, what, like) for condition in conditions]
    for other in others:
        first = first.then(aten.logical_and.default, other)
    return first


def _tensor(lifter: Lifter, condition: Expr, want: Sequence[Group], what: str, like: Sequence[Extent]) -> Operand:
    match condition:
        case n.Apply("not", (n.Apply("eq0", (n.Load(node, index),)),)):
            return arrange(node, index, want, what, full=True, like=like).then(aten.ne.Scalar, 0)
    try:
        held = bind(lifter, condition, want, what, like, full=True)
    except Refused:
        held = bind(lifter, n.not_(condition), want, what, like, full=True).then(aten.logical_not.default)
    return held if dtype_of(held.node) is torch.bool else held.then(aten.ne.Scalar, 0)
