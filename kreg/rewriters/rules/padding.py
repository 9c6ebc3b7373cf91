"""A padding mask as an operand: one boolean for each key of each batch element."""

from __future__ import annotations

from collections.abc import Sequence

from kreg.rewriters.arrange import Group, condition
from kreg.rewriters.graph import aten
from kreg.rewriters.lift import Lifter
from kreg.rewriters.notation import Expr
from kreg.rewriters.site import Extent, Operand


def padding(
    lifter: Lifter, conditions: Sequence[Expr], want: Sequence[Group], what: str, like: Sequence[Extent]
) -> Operand:
    """The conjunction of conditions on (batch, key) as one tensor, True where a key is kept.

    Raises:
        Refused: a condition has no tensor of its own.
    """
    first, *others = [condition(lifter, part, want, what, like, full=True) for part in conditions]
    for other in others:
        first = first.then(aten.logical_and.default, other)
    return first
