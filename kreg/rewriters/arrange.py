"""Views that line a tensor up with an op's dimensions.

A dimension of a node is indexed by a mixed-radix number of index variables (`notation.digits`): one variable, several
that were flattened together, or none where its size is 1. A dimension of an op is a group of variables, flattened in
their order. So one routine serves heads that were merged into the batch, groups of heads in a dimension of their own,
and every order that a model may keep them in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise, product

import sympy
import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten, dtype_of, shape_of
from kreg.rewriters.lift import Index, Lifter
from kreg.rewriters.notation import Expr, Sized, Var
from kreg.rewriters.site import Call, Calls, Extent, Operand, Refused
from kreg.rewriters.stretches import Stretch, on, split

Group = tuple[Var, ...]
"""Index variables that make one dimension of an op, most significant first; none for a dimension of size 1."""


def arrange(
    node: Node,
    index: Index,
    want: Sequence[Group],
    what: str,
    *,
    full: bool = False,
    like: Sequence[Extent] = (),
    digits: bool = True,
) -> Operand:
    """Views that bring ``node``, indexed by ``index``, into one dimension for each group of ``want``.

    A group none of whose variables the node has becomes a dimension of size 1; one of which it has some is expanded
    to the others.

    Args:
        full: expand to every variable that the node has not.
        like: where a symbolic size can be read, should it have to be expanded to.
        digits: whether a variable may be taken for its digits where the node's dimensions have these, as rows and
            columns of an image.

    Raises:
        Refused: a dimension of the node that has no place, with ``what`` it is.
    """
    calls: list[Call] = []
    have: list[Group] = []
    if digits:
        index, want = _by_digits(index, want)
    for d, (extent, i) in enumerate(zip(shape_of(node), index, strict=True)):
        group = n.digits(i, extent)
        if group is None and (part := _part(i, extent, like)) is not None:
            first, last, variable = part
            calls.append((aten.slice.Tensor, (d, first, last)))
            group = (variable,)
        if group is None or any(v in g for v in group for g in have):
            raise Refused(f"dimension {d} of the {what} does not line up with the other operands", node)
        have.append(group)
    wanted = [v for group in want for v in group]
    for d, group in enumerate(have):
        if any(v not in wanted for v in group):
            raise Refused(f"dimension {d} of the {what} does not line up with the other operands", node)
    return Operand(node, (*calls, *_moves(have, want, full, like)))


def _by_digits(index: Index, want: Sequence[Group]) -> tuple[Index, Sequence[Group]]:
    """An index and the dimensions wanted, with each variable that the index cuts as the digits that it is cut into."""
    radices: dict[Var, set[int]] = {}
    for variable, radix in (cut for i in index for cut in n.cuts(i)):
        radices.setdefault(variable, {1}).add(radix)
    digits = {v: found for v, cuts in radices.items() if (found := _digits(v, sorted(cuts)))}
    if not digits:
        return index, want
    numbers: dict[Var, Expr] = {v: n.number(group) for v, group in digits.items()}
    groups = [tuple(digit for v in group for digit in digits.get(v, (v,))) for group in want]
    return tuple(n.substitute(i, numbers) for i in index), groups


def _digits(variable: Var, radices: Sequence[int]) -> Group:
    """The digits of a variable between places of some values, the highest first; none where it has no such digits."""
    bounds: list[Sized] = [*radices, variable.size]
    sizes = [sympy.sympify(high) / low for low, high in pairwise(bounds)]
    if not all(size.is_integer for size in sizes):
        return ()
    known = [int(size) if size.is_Integer else size for size in sizes]
    return tuple(Var(f"{variable.name}/{low}", size) for low, size in reversed([*zip(radices, known, strict=True)]))


def laid_out(
    e: Expr, key: Var, want: Sequence[Group], what: str, dtype: torch.dtype, like: Sequence[Extent] = ()
) -> Operand:
    """An operand that is an element of one tensor, or of several that follow one another along the key.

    Raises:
        Refused: as `arrange`; or it is no such element.
    """
    if stretches := split(e, key):
        each = [(s, laid_out(on(e, key, s), s.variable, renamed(want, key, s), what, dtype, like)) for s in stretches]
        return in_a_row(each, list(want).index((key,)), len(want), like)
    if not isinstance(e, n.Load):
        raise Refused(f"the {what} are not elements of tensors")
    return arrange(e.node, e.index, want, what, full=True, like=like).cast(dtype)


def renamed(want: Sequence[Group], key: Var, stretch: Stretch) -> list[Group]:
    """The dimensions wanted of a stretch of the key."""
    return [(stretch.variable,) if group == (key,) else group for group in want]


def in_a_row(
    parts: Sequence[tuple[Stretch, Operand | None]], dim: int, rank: int, like: Sequence[Extent], value: float = 0.0
) -> Operand:
    """Tensors that follow one another along a dimension as one; ``value`` where there is none."""
    known = next(part for _, part in parts if part is not None)

    def filled(stretch: Stretch) -> Operand:
        sizes: list[int | Extent] = [-1] * rank
        sizes[dim] = extent_of(stretch.variable, like)
        one = known.then(aten.slice.Tensor, dim, 0, 1).then(aten.full_like.default, value)
        return one.then(aten.expand.default, sizes)

    first, *others = [filled(stretch) if part is None else part for stretch, part in parts]
    return first.then(aten.cat.default, others, dim)


def bind(
    lifter: Lifter,
    expression: Expr,
    want: Sequence[Group],
    what: str,
    like: Sequence[Extent] = (),
    full: bool = False,
    region: Collection[Node] = (),
) -> Operand:
    """The tensor that holds an expression: of the nodes whose element it is, the innermost that lines up.

    Args:
        region: nodes that are asked first; other code may compute the same again.

    Raises:
        Refused: none does.
    """
    refusal = Refused(f"the {what} has no tensor of its own")
    found = sorted(lifter.origins.get(expression, ()), key=lambda origin: origin[0] not in region)
    for digits, (node, index) in product((False, True), found):
        try:
            held = arrange(node, index, want, what, full=full, like=like, digits=digits)
            same = tuple(o for o, at in found if at == index and o is not node and shape_of(o) == shape_of(node))
            return replace(held, same=same)
        except Refused as refused:
            refusal = refused
    raise refusal


def condition(
    lifter: Lifter,
    e: Expr,
    want: Sequence[Group],
    what: str,
    like: Sequence[Extent] = (),
    full: bool = False,
    region: Collection[Node] = (),
) -> Operand:
    """The boolean tensor that holds a condition: made of the numbers it asks about, or bound, or that of its opposite.

    Raises:
        Refused: there is none that lines up.
    """
    refusal = Refused(f"the {what} has no tensor of its own")
    for expression, negate in ((e, False), (n.not_(e), True)):
        try:
            match expression:
                case n.Apply("not", (n.Apply("eq0", (n.Load(node, index),)),)):
                    held = arrange(node, index, want, what, full=full, like=like)
                case _:
                    held = bind(lifter, expression, want, what, like, full, region)
        except Refused as refused:
            refusal = refused
            continue
        held = held if dtype_of(held.node) is torch.bool else held.then(aten.ne.Scalar, 0)
        return held.then(aten.logical_not.default) if negate else held
    raise refusal


def arranged_back(node: Node, index: Index, have: Sequence[Group]) -> Calls:
    """Views that bring a result with one dimension for each group of ``have`` into the layout of ``node``."""
    want = [n.digits(i, extent) for i, extent in zip(index, shape_of(node), strict=True)]
    if any(group is None for group in want):
        raise Refused("the result is laid out in a way that is not read", node)
    return tuple(_moves(have, [group or () for group in want], False, ()))


def _part(i: Expr, extent: Sized, like: Sequence[Extent]) -> tuple[int, int | Extent, Var] | None:
    """An index that reads a stretch of a dimension: its first place, the one behind its last, and the variable."""
    match i:
        case Var() as variable:
            first = 0
        case n.Linear(((Var() as variable, 1),), first):
            pass
        case _:
            return None
    if isinstance(extent, int) and isinstance(variable.size, int):
        inside = 0 <= first <= extent - variable.size
        return (first, first + variable.size, variable) if inside else None
    return (0, extent_of(variable, like), variable) if first == 0 else None


def _moves(have: Sequence[Group], want: Sequence[Group], full: bool, like: Sequence[Extent]) -> list[Call]:
    """Views from one grouping of variables to another."""
    calls: list[Call] = []
    if not full and tuple(have) == tuple(want):
        return calls
    current = list(have)
    for d in reversed(range(len(current))):
        if not current[d]:
            calls.append((aten.squeeze.dim, (d,)))
            del current[d]
        elif current[d] not in want:  # another grouping: each variable gets a dimension of its own
            if len(current[d]) > 1:
                calls.append((aten.unflatten.int, (d, _sizes(current[d]))))
            current[d : d + 1] = [(v,) for v in current[d]]
    pieces = [_pieces(group, current, full) for group in want]
    order = [current.index(piece) for piece in (p for group in pieces for p in group) if piece in current]
    if order != sorted(order):
        calls.append((aten.permute.default, (order,)))
    sizes: list[int | Extent] = []
    for piece in (p for group in pieces for p in group):
        if piece not in current:
            calls.append((aten.unsqueeze.default, (len(sizes),)))
        sizes.append(-1 if piece in current or not piece else extent_of(piece[0], like))
    if any(size != -1 for size in sizes):
        calls.append((aten.expand.default, (sizes,)))
    for d, group in enumerate(pieces):
        if len(group) > 1:
            calls.append((aten.flatten.using_ints, (d, d + len(group) - 1)))
    return calls


def _pieces(group: Group, current: Sequence[Group], full: bool) -> list[Group]:
    """The dimensions that a wanted one is made of: itself, or its variables, or a new one of size 1."""
    if not group or group in current:
        return [group]
    if not full and not any((v,) in current for v in group):
        return [()]
    return [(v,) for v in group]


def extent_of(variable: Var, like: Sequence[Extent]) -> int | Extent:
    """The size of a variable: a number, or where it can be read.

    Raises:
        Refused: it is symbolic and nothing tells it.
    """
    if isinstance(variable.size, int):
        return variable.size
    for extent in like:
        if shape_of(extent.node)[extent.dim] == variable.size:
            return extent
    raise Refused(f"nothing tells the size of {variable.name}")


def _sizes(group: Group) -> list[int]:
    """Sizes to unflatten to; one of them may be symbolic."""
    if sum(not isinstance(v.size, int) for v in group) > 1:
        raise Refused("two symbolic sizes are flattened into one dimension")
    return [v.size if isinstance(v.size, int) else -1 for v in group]
