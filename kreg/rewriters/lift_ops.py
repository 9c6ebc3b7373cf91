"""What each ATen operator means in index notation: tables, one row an operator.

`LAYOUT` operators only say where an element comes from. `POINTWISE` ones say what it is. `SCALING` ones multiply
by a constant. An operator in no table, or a form that a row does not cover (it answers None), is a load.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import argument, dtype_of, is_tensor, shape_of, sized
from kreg.rewriters.lift import Index, Lifter, broadcast
from kreg.rewriters.notation import Expr

aten = torch.ops.aten
Step = tuple[Node, Index]
Layout = Callable[[Node, Index], Step | None]
Pointwise = Callable[[Lifter, Node, Index], Expr | None]


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _scalar(value: Any) -> Expr:
    return n.size(sized(value.meta["val"] if isinstance(value, Node) else value))


def _source(node: Node) -> Node:
    source = _args(node)[0]
    assert isinstance(source, Node)
    return source


# ── layout ────────────────────────────────────────────────────────────────────────────────────────────────────


def _same(node: Node, index: Index) -> Step:
    return _source(node), index


def _widening(node: Node, index: Index) -> Step | None:
    """A cast that keeps every value: to the same dtype, or to a wider float."""
    source = _source(node)
    if not is_tensor(source):
        return None
    old, new = dtype_of(source), dtype_of(node)
    if old == new or (old.is_floating_point and new.is_floating_point and torch.promote_types(old, new) == new):
        return source, index
    return None


def _dropout(node: Node, index: Index) -> Step | None:
    """Dropout that is off."""
    return (_source(node), index) if _args(node)[1] == 0.0 or not _args(node)[2] else None


def _expand(node: Node, index: Index) -> Step:
    return _source(node), broadcast(index, _source(node))


def _permute(node: Node, index: Index) -> Step:
    rank = len(index)
    order = [_dim(d, rank) for d in _args(node)[1]]
    return _source(node), tuple(index[order.index(d)] for d in range(rank))


def _transpose(node: Node, index: Index) -> Step:
    rank = len(index)
    a, b = (_dim(d, rank) for d in _args(node)[1:3])
    moved = list(index)
    moved[a], moved[b] = moved[b], moved[a]
    return _source(node), tuple(moved)


def _t(node: Node, index: Index) -> Step:
    return _source(node), tuple(reversed(index))


def _unsqueeze(node: Node, index: Index) -> Step:
    dim = _dim(_args(node)[1], len(index))
    return _source(node), index[:dim] + index[dim + 1 :]


def _squeeze(node: Node, index: Index) -> Step:
    source = _source(node)
    shape = shape_of(source)
    dims = _args(node)[1] if len(_args(node)) > 1 else range(len(shape))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d for d in (_dim(d, len(shape)) for d in dims) if shape[d] == 1}
    rest = iter(index)
    return source, tuple(n.ZERO if d in gone else next(rest) for d in range(len(shape)))


def _place(at: Any, extent: int | sympy.Expr) -> Expr | None:
    """A place along a dimension, negative ones counted from its end and clamped to its start; None if unproven."""
    place = _scalar(0 if at is None else at)
    if n.never_negative(place):
        return place
    if not n.never_negative(n.sub(n.neg(place), n.ONE)):
        return None
    place = n.add(place, n.size(extent))
    if n.never_negative(place):
        return place
    return n.ZERO if n.never_negative(n.neg(place)) else None


def _slice(node: Node, index: Index) -> Step | None:
    source = _source(node)
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    first = _place(argument(node, 2, "start"), shape_of(source)[dim])
    if first is None:
        return None
    moved = n.add(first, n.mul(n.Const(argument(node, 4, "step", 1)), index[dim]))
    return source, (*index[:dim], moved, *index[dim + 1 :])


def _select(node: Node, index: Index) -> Step | None:
    source = _source(node)
    shape = shape_of(source)
    dim = _dim(_args(node)[1], len(shape))
    at = _place(_args(node)[2], shape[dim])
    return None if at is None else (source, (*index[:dim], at, *index[dim:]))


def _flip(node: Node, index: Index) -> Step:
    source = _source(node)
    dims = {_dim(d, len(index)) for d in _args(node)[1]}
    last = [n.sub(n.size(s), n.ONE) for s in shape_of(source)]
    return source, tuple(n.sub(last[d], i) if d in dims else i for d, i in enumerate(index))


def _repeat_interleave(node: Node, index: Index) -> Step | None:
    dim, times = argument(node, 2, "dim"), _args(node)[1]
    if not isinstance(dim, int) or not isinstance(times, int):
        return None
    dim = _dim(dim, len(index))
    return _source(node), (*index[:dim], n.floordiv(index[dim], n.Const(times)), *index[dim + 1 :])


def _repeat(node: Node, index: Index) -> Step:
    source = _source(node)
    shape = shape_of(source)
    tail = index[len(index) - len(shape) :]
    times = _args(node)[1][len(index) - len(shape) :]
    steps = zip(tail, shape, times, strict=True)
    return source, tuple(i if t == 1 else n.mod(i, n.size(s)) for i, s, t in steps)


def _getitem(node: Node, index: Index) -> Step | None:
    """One piece of a split, a chunk or an unbind."""
    source, piece = _args(node)
    if not isinstance(source, Node) or not isinstance(piece, int):
        return None
    if source.target is aten.unbind.int:
        dim = _dim(argument(source, 1, "dim", 0), len(index) + 1)
        return _source(source), (*index[:dim], n.Const(piece), *index[dim:])
    if source.target not in (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        return None
    dim = _dim(argument(source, 2, "dim", 0), len(index))
    start = n.ZERO
    for earlier in source.meta["val"][:piece]:
        start = n.add(start, n.size(sized(earlier.shape[dim])))
    return _source(source), (*index[:dim], n.add(start, index[dim]), *index[dim + 1 :])


def _reshape(node: Node, index: Index) -> Step | None:
    source = _source(node)
    old, new = shape_of(source), shape_of(node)
    groups = _groups(old, new)
    if groups is None:
        return None
    result: list[Expr] = []
    for old_dims, new_dims in groups:
        flat: Expr = n.ZERO
        if len(old_dims) == len(new_dims) == 1:
            result.append(index[new_dims[0]])
            continue
        for d in new_dims:
            flat = n.add(n.times(flat, n.size(new[d])), index[d])
        digits: list[Expr] = []
        for d in reversed(old_dims):
            extent = n.size(old[d])
            digits.append(flat if d == old_dims[0] else n.mod(flat, extent))
            flat = n.floordiv(flat, extent)
        result.extend(reversed(digits))
    return source, tuple(result)


Sizes = tuple[int | sympy.Expr, ...]


def _groups(old: Sizes, new: Sizes) -> list[tuple[list[int], list[int]]] | None:
    """Runs of dimensions of equal product, as short as possible; None where sizes cannot be told apart."""
    if any(s == 0 for s in (*old, *new)):
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a: Any = 1
        b: Any = 1
        while not left or not right or sympy.expand(a - b) != 0:
            grow_left = i < len(old) and (not left or j >= len(new) or (right and _smaller(a, b)))
            if grow_left:
                left.append(i)
                a, i = a * old[i], i + 1
            elif j < len(new):
                right.append(j)
                b, j = b * new[j], j + 1
            elif i < len(old):
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                break
        if sympy.expand(a - b) != 0:
            return None
        groups.append((left, right))
    return groups


def _smaller(a: Any, b: Any) -> bool:
    """Whether product a should grow next: it divides b, or is the smaller number."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    quotient = sympy.cancel(sympy.sympify(b) / a)
    return bool(sympy.denom(quotient) == 1)


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten._reshape_copy.default,
)
_SAME = (
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.view_as.default,
    aten.positive.default,
)
_CASTS = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
)

LAYOUT: dict[Any, Layout] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_SAME, _same),
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.swapaxes.default: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
}


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────


def _constant(value: int | float) -> Pointwise:
    def rule(lifter: Lifter, node: Node, index: Index) -> Expr:
        return _typed(value, dtype_of(node))

    return rule


def _full(position: int) -> Pointwise:
    def rule(lifter: Lifter, node: Node, index: Index) -> Expr | None:
        value = _args(node)[position]
        if isinstance(value, Node):
            return n.size(sized(value.meta["val"])) if not is_tensor(value) else None
        return _typed(value, dtype_of(node))

    return rule


def _typed(value: int | float, dtype: torch.dtype) -> Expr:
    if dtype is torch.bool:
        return n.Const(bool(value))
    return n.Const(float(value) if dtype.is_floating_point else int(value))


def _eye(lifter: Lifter, node: Node, index: Index) -> Expr:
    own = n.eq0(n.sub(*index))
    return own if dtype_of(node) is torch.bool else n.where(own, _typed(1, dtype_of(node)), _typed(0, dtype_of(node)))


def _arange(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    args = _args(node)
    start = args[0] if len(args) > 1 else 0
    step = args[2] if len(args) > 2 else 1
    if isinstance(start, float) or not isinstance(step, int):
        return None
    return n.add(_scalar(start), n.mul(n.Const(step), index[0]))


def _binary(function: Callable[[Expr, Expr], Expr]) -> Pointwise:
    def rule(lifter: Lifter, node: Node, index: Index) -> Expr:
        a, b = (lifter.value(arg, index) for arg in _args(node)[:2])
        alpha: Any = node.kwargs.get("alpha", 1)
        return function(a, b if alpha == 1 else n.mul(n.Const(alpha), b))

    return rule


def _divide(a: Expr, b: Expr) -> Expr:
    if isinstance(b, n.Const) and b.value:
        return n.mul(n.Const(1.0 / b.value), a)
    return n.apply("div", a, b)


def _floor(a: Expr, b: Expr) -> Expr:
    """The larger of two; a constant comes first."""
    if n.is_integral(a) and n.is_integral(b):
        return n.larger(a, b)
    if isinstance(a, n.Const) and isinstance(b, n.Const):
        return n.Const(max(a.value, b.value))
    return n.apply("max", b, a) if isinstance(b, n.Const) else n.apply("max", a, b)


def _ceiling(a: Expr, b: Expr) -> Expr:
    """The smaller of two; a constant comes first."""
    if n.is_integral(a) and n.is_integral(b):
        return n.neg(n.larger(n.neg(a), n.neg(b)))
    if isinstance(a, n.Const) and isinstance(b, n.Const):
        return n.Const(min(a.value, b.value))
    return n.apply("min", b, a) if isinstance(b, n.Const) else n.apply("min", a, b)


COPIED = 30
"""An integer of more parts than this is not copied into the branches of a clamp."""


def _clamp(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    found = lifter.value(_args(node)[0], index)
    if n.is_integral(found):
        bounds = [None if bound is None else _scalar(bound) for bound in (low, high) if not isinstance(bound, float)]
        return _clamped(found, *bounds) if len(bounds) == 2 else None
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        return None
    found = found if low is None else _floor(found, n.Const(low))
    return found if high is None else _ceiling(found, n.Const(high))


def _clamped(e: Expr, low: Expr | None, high: Expr | None) -> Expr | None:
    """An integer within bounds; a choice stays one, of integers within bounds."""
    if isinstance(e, n.Apply) and e.function == "where":
        yes, no = (_clamped(branch, low, high) for branch in e.arguments[1:])
        return None if yes is None or no is None else n.where(e.arguments[0], yes, no)
    if sum(1 for _ in e.walk()) > COPIED:
        return None
    if low is not None:
        e = n.larger(e, low)
    return e if high is None else n.neg(n.larger(n.neg(e), n.neg(high)))


def _numeric(e: Expr) -> Expr:
    return n.indicator(e) if n.is_boolean(e) else e


_EXACT: dict[str, Callable[[Any, Any], bool]] = {
    "less": operator.lt,
    "at_most": operator.le,
    "greater": operator.gt,
    "at_least": operator.ge,
    "equal": operator.eq,
    "unequal": operator.ne,
}


def _compare(name: str, integers: Callable[[Expr, Expr], Expr]) -> Pointwise:
    """Integers compare exactly; anything else stays the named comparison."""

    exact = _EXACT[name]

    def function(a: Expr, b: Expr) -> Expr:
        a, b = _numeric(a), _numeric(b)
        if n.is_integral(a) and n.is_integral(b):
            return integers(a, b)
        if isinstance(a, n.Const) and isinstance(b, n.Const):
            return n.Const(exact(a.value, b.value))
        if n.is_integral(a) and isinstance(b, n.Const) and math.isinf(b.value):
            return n.Const(exact(0, b.value))
        if n.is_integral(b) and isinstance(a, n.Const) and math.isinf(a.value):
            return n.Const(exact(a.value, 0))
        if n.is_choice(a) and isinstance(b, n.Const):
            return n.choose(a, lambda x: function(x, b))
        if n.is_choice(b) and isinstance(a, n.Const):
            return n.choose(b, lambda x: function(a, x))
        if name in ("equal", "unequal"):
            found = n.apply("equal", a, b)
        else:
            found = n.apply("less", a, b) if name in ("less", "at_least") else n.apply("less", b, a)
        return n.not_(found) if name in ("unequal", "at_least", "at_most") else found

    return _binary(function)


_lt = _compare("less", lambda a, b: n.le0(n.add(n.sub(a, b), n.ONE)))
_le = _compare("at_most", lambda a, b: n.le0(n.sub(a, b)))
_gt = _compare("greater", lambda a, b: n.le0(n.add(n.sub(b, a), n.ONE)))
_ge = _compare("at_least", lambda a, b: n.le0(n.sub(b, a)))
_eq = _compare("equal", lambda a, b: n.eq0(n.sub(a, b)))
_ne = _compare("unequal", lambda a, b: n.not_(n.eq0(n.sub(a, b))))


def _logical(function: Callable[[Expr, Expr], Expr]) -> Pointwise:
    def rule(lifter: Lifter, node: Node, index: Index) -> Expr | None:
        if dtype_of(node) is not torch.bool:
            return None
        a, b = (lifter.value(arg, index) for arg in _args(node)[:2])
        return function(a, b)

    return rule


def _logical_not(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    return n.not_(n.truth(lifter.value(_args(node)[0], index))) if dtype_of(node) is torch.bool else None


def _unary(name: str) -> Pointwise:
    def rule(lifter: Lifter, node: Node, index: Index) -> Expr:
        return n.apply(name, lifter.value(_args(node)[0], index))

    return rule


def _rsub(lifter: Lifter, node: Node, index: Index) -> Expr:
    return n.sub(lifter.value(_args(node)[1], index), lifter.value(_args(node)[0], index))


def _neg(lifter: Lifter, node: Node, index: Index) -> Expr:
    return n.neg(lifter.value(_args(node)[0], index))


def _cast(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    if not is_tensor(source):
        return None
    if _widening(node, index) is not None:
        return lifter.element(source, index)
    value = lifter.element(source, index)
    old, new = dtype_of(source), dtype_of(node)
    if new is torch.bool:
        return n.truth(value)
    if old.is_floating_point:
        return _narrowed(value, new)
    value = _numeric(value)
    return value if new not in _WHOLE or _lies_within(value, *_WHOLE[new]) else _narrowed(value, new)


def _narrowed(e: Expr, dtype: torch.dtype) -> Expr:
    name = "rounded" if dtype.is_floating_point else "truncated"
    return n.apply(f"{name}:{str(dtype).removeprefix('torch.')}", e)


_WHOLE: dict[torch.dtype, tuple[int, int]] = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.float16: (-(2**11), 2**11),
    torch.bfloat16: (-(2**8), 2**8),
}
"""Between which integers a dtype holds every one; of wider ones it is taken that they hold what a model has."""


def _lies_within(e: Expr, least: int, most: int) -> bool:
    low, high = n.lower(e), n.upper(e)
    if low is None or high is None:
        return False
    return n.never_negative(n.sub(low, n.Const(least))) and n.never_negative(n.sub(n.Const(most), high))


def _where(lifter: Lifter, node: Node, index: Index) -> Expr:
    c, yes, no = (lifter.value(arg, index) for arg in _args(node)[:3])
    return n.where(c, yes, no)


def _masked_fill(lifter: Lifter, node: Node, index: Index) -> Expr:
    x, mask, value = (lifter.value(arg, index) for arg in _args(node)[:3])
    return n.where(mask, value, x)


def _triangle(keep: Callable[[Expr, Expr, int], Expr]) -> Pointwise:
    def rule(lifter: Lifter, node: Node, index: Index) -> Expr:
        diagonal = argument(node, 1, "diagonal", 0)
        inside = keep(index[-2], index[-1], diagonal)
        return n.where(inside, lifter.element(_source(node), index), _typed(0, dtype_of(node)))

    return rule


_tril = _triangle(lambda i, j, k: n.le0(n.sub(n.sub(j, i), n.Const(k))))
_triu = _triangle(lambda i, j, k: n.le0(n.add(n.sub(i, j), n.Const(k))))


def _cat(lifter: Lifter, node: Node, index: Index) -> Expr:
    tensors: list[Node] = list(_args(node)[0])
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    tensors = [t for t in tensors if len(shape_of(t)) == len(index) and shape_of(t)[dim] != 0]
    ends: list[Expr] = []
    start = n.ZERO
    for t in tensors:
        ends.append(start := n.add(start, n.size(shape_of(t)[dim])))
    starts = [n.ZERO, *ends[:-1]]

    def piece(i: int) -> Expr:
        own = (*index[:dim], n.sub(index[dim], starts[i]), *index[dim + 1 :])
        if i == len(tensors) - 1:
            return lifter.element(tensors[i], own)
        inside = n.le0(n.add(n.sub(index[dim], ends[i]), n.ONE))
        if inside == n.TRUE:
            return lifter.element(tensors[i], own)
        return piece(i + 1) if inside == n.FALSE else n.where(inside, lifter.element(tensors[i], own), piece(i + 1))

    return piece(0)


def _stack(lifter: Lifter, node: Node, index: Index) -> Expr:
    tensors: list[Node] = list(_args(node)[0])
    dim = _dim(argument(node, 1, "dim", 0), len(index))
    rest = index[:dim] + index[dim + 1 :]
    found = lifter.element(tensors[-1], rest)
    for i in reversed(range(len(tensors) - 1)):
        found = n.where(n.eq0(n.sub(index[dim], n.Const(i))), lifter.element(tensors[i], rest), found)
    return found


def _pad(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source, pads = _source(node), _args(node)[1]
    named = node.target is aten.pad.default  # has a mode before the value
    if named and argument(node, 2, "mode", "constant") != "constant":
        return None
    value = argument(node, 3 if named else 2, "value", 0) or 0
    shape = shape_of(source)
    moved, inside = list(index), n.TRUE
    for k in range(len(pads) // 2):
        d = len(shape) - 1 - k
        moved[d] = n.sub(index[d], _scalar(pads[2 * k]))
        inside = n.and_(inside, n.le0(n.neg(moved[d])))
        inside = n.and_(inside, n.le0(n.add(n.sub(moved[d], n.size(shape[d])), n.ONE)))
    return n.where(inside, lifter.element(source, tuple(moved)), _typed(value, dtype_of(node)))


def _slice_scatter(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source, new = _args(node)[:2]
    if argument(node, 5, "step", 1) != 1:
        return None
    dim = _dim(argument(node, 2, "dim", 0), len(index))
    first = _place(argument(node, 3, "start"), shape_of(source)[dim])
    if first is None:
        return None
    own = n.sub(index[dim], first)
    inside = n.and_(n.le0(n.neg(own)), n.le0(n.add(n.sub(own, n.size(shape_of(new)[dim])), n.ONE)))
    inner = lifter.element(new, (*index[:dim], own, *index[dim + 1 :]))
    return n.where(inside, inner, lifter.element(source, index))


def _scatter(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    """Elements whose place along ``dim`` is named by the indices become the value, in whichever order."""
    base, dim, indices, value = _args(node)[:4]
    assert isinstance(base, Node) and isinstance(indices, Node)
    dim = _dim(dim, len(index))
    shapes = zip(shape_of(base), shape_of(indices), strict=True)
    if any(a != b for d, (a, b) in enumerate(shapes) if d != dim):
        return None
    source = lifter.element(base, index)
    if shape_of(indices)[dim] == 0:
        return source
    m = n.fresh("m", shape_of(indices)[dim])
    named = lifter.element(indices, (*index[:dim], m, *index[dim + 1 :]))
    if is_tensor(value):
        new = lifter.element(value, (*index[:dim], m, *index[dim + 1 :]))
        if m in new.variables:
            return None
    else:
        new = _typed(value, dtype_of(node))
    return n.where(n.exists(m, n.eq0(n.sub(named, index[dim]))), new, source)


def _scatter_add(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    """Counts: what the indices name at a place, added up."""
    base, dim, indices, values = _args(node)[:4]
    shapes = zip(shape_of(base), shape_of(indices), strict=True)
    dim = _dim(dim, len(index))
    fits = shape_of(values) == shape_of(indices) and all(a == b for d, (a, b) in enumerate(shapes) if d != dim)
    if not fits or dtype_of(node).is_floating_point:
        return None
    m = n.fresh("m", shape_of(indices)[dim])
    at = (*index[:dim], m, *index[dim + 1 :])
    named = n.eq0(n.sub(lifter.element(indices, at), index[dim]))
    added = n.where(named, _numeric(lifter.element(values, at)), n.ZERO)
    return n.add(lifter.element(base, index), n.total(m, added))


def _gather(lifter: Lifter, node: Node, index: Index) -> Expr:
    source, dim, indices = _args(node)[:3]
    dim = _dim(dim, len(index))
    at = lifter.element(indices, index)
    return lifter.element(source, (*index[:dim], at, *index[dim + 1 :]))


def _index(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    """Advanced indexing by adjacent integer tensors that are never negative."""
    source, indices = _source(node), _args(node)[1]
    used = [d for d, t in enumerate(indices) if t is not None]
    tensors: list[Node] = [indices[d] for d in used]
    if used != list(range(used[0], used[-1] + 1)) or any(dtype_of(t) is torch.bool for t in tensors):
        return None
    width = max(len(shape_of(t)) for t in tensors)
    middle = index[used[0] : used[0] + width]
    at = [lifter.element(t, broadcast(middle, t)) for t in tensors]
    for place in at:
        low = n.lower(place)
        if not _is_place(place) and (low is None or not n.never_negative(low)):
            return None
    return lifter.element(source, (*index[: used[0]], *at, *index[used[0] + width :]))


def _is_place(e: Expr) -> bool:
    """Whether an element is one that a top-k picked: never negative."""
    return (
        isinstance(e, n.Load)
        and e.node.target is operator.getitem
        and e.node.args[1] == 1
        and e.node.args[0].target is aten.topk.default
    )


def _index_put(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    """One number written where a boolean mask over the first dimensions says."""
    source, indices, value = _args(node)[:3]
    used = [(d, t) for d, t in enumerate(indices) if t is not None]
    if len(used) != 1 or argument(node, 3, "accumulate", False) or shape_of(value) not in ((), (1,)):
        return None
    ((first, mask),) = used
    if dtype_of(mask) is not torch.bool:
        return None
    at = index[first : first + len(shape_of(mask))]
    new = lifter.element(value, tuple(n.ZERO for _ in shape_of(value)))
    return n.where(lifter.element(mask, at), new, lifter.element(source, index))


def _log(lifter: Lifter, node: Node, index: Index) -> Expr:
    """Also of a condition as a number: 0 where it holds, else -inf."""
    value = lifter.value(_args(node)[0], index)
    if isinstance(value, n.Apply) and value.function == "indicator":
        return n.where(value.arguments[0], n.Const(0.0), n.Const(float("-inf")))
    return n.apply("log", value)


def _cumsum(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    """Sums of places and constants; those of data stay a tensor, so that equal elements of it are seen to be equal."""
    source, dim = _source(node), _dim(_args(node)[1], len(index))
    u = n.fresh("u", shape_of(source)[dim])
    body = _numeric(lifter.element(source, (*index[:dim], u, *index[dim + 1 :])))
    if any(isinstance(part, n.Load) for part in body.walk()):
        return None
    return n.total(u, n.where(n.le0(n.sub(u, index[dim])), body, n.ZERO))


def _diff(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        return None
    dim = _dim(argument(node, 2, "dim", -1), len(index))
    prepend = argument(node, 3, "prepend")

    def joined(at: Expr) -> Expr:
        def place(e: Expr) -> Index:
            return (*index[:dim], e, *index[dim + 1 :])

        if prepend is None:
            return _numeric(lifter.element(source, place(at)))
        first = n.size(shape_of(prepend)[dim])
        inside = n.le0(n.add(n.sub(at, first), n.ONE))
        rest = _numeric(lifter.element(source, place(n.sub(at, first))))
        if inside == n.FALSE:
            return rest
        return n.where(inside, _numeric(lifter.element(prepend, place(at))), rest)

    return n.sub(joined(n.add(index[dim], n.ONE)), joined(index[dim]))


def _matmul(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    a, b = _args(node)[:2]
    assert isinstance(a, Node) and isinstance(b, Node)
    ranks = len(shape_of(a)), len(shape_of(b))
    if min(ranks) < 2:
        return None
    k = n.fresh("k", shape_of(a)[-1])
    lead = index[:-2]
    left = lifter.operand(a, (*broadcast_lead(lead, a), index[-2], k))
    right = lifter.operand(b, (*broadcast_lead(lead, b), k, index[-1]))
    return n.total(k, n.mul(left, right))


def broadcast_lead(lead: Index, source: Node) -> Index:
    """The batch part of an index into an operand of a matrix product."""
    shape = shape_of(source)[:-2]
    return tuple(n.ZERO if s == 1 else i for s, i in zip(shape, lead[len(lead) - len(shape) :], strict=True))


def _baddbmm(lifter: Lifter, node: Node, index: Index) -> Expr:
    bias, a, b = _args(node)[:3]
    k = n.fresh("k", shape_of(a)[-1])
    left = lifter.operand(a, (index[0], index[1], k))
    right = lifter.operand(b, (index[0], k, index[2]))
    alpha: Any = node.kwargs.get("alpha", 1)
    product = n.mul(n.Const(alpha), n.total(k, n.mul(left, right)))
    beta: Any = node.kwargs.get("beta", 1)
    if beta == 0:
        return product
    return n.add(product, n.mul(n.Const(beta), lifter.value(bias, index)))


def _linear(lifter: Lifter, node: Node, index: Index) -> Expr:
    x, weight = _args(node)[:2]
    k = n.fresh("k", shape_of(weight)[-1])
    product = n.mul(lifter.operand(x, (*index[:-1], k)), lifter.operand(weight, (index[-1], k)))
    return _shifted(lifter, n.total(k, product), argument(node, 2, "bias"), index[-1:])


def _addmm(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    bias, a, b = _args(node)[:3]
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return None
    k = n.fresh("k", shape_of(a)[-1])
    product = n.mul(lifter.operand(a, (index[0], k)), lifter.operand(b, (k, index[1])))
    return n.add(n.total(k, product), lifter.value(bias, index))


def _pointwise_convolution(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    """A convolution of single places is a product with its weight at each of them."""
    x, weight = _args(node)[:2]
    stride, padding = argument(node, 3, "stride", [1]), argument(node, 4, "padding", [0])
    alone = all(extent == 1 for extent in shape_of(weight)[2:]) and len(index) == len(shape_of(weight))
    if not alone or {*stride} != {1} or {*padding} != {0} or argument(node, 6, "groups", 1) != 1:
        return None
    c = n.fresh("c", shape_of(weight)[1])
    left = lifter.operand(x, (index[0], c, *index[2:]))
    right = lifter.operand(weight, (index[1], c, *(n.ZERO for _ in index[2:])))
    return _shifted(lifter, n.total(c, n.mul(left, right)), argument(node, 2, "bias"), index[1:2])


def _shifted(lifter: Lifter, product: Expr, bias: Node | None, index: Index) -> Expr:
    return product if bias is None else n.add(product, lifter.element(bias, index))


def _einsum(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    equation, tensors = _args(node)[:2]
    assert isinstance(equation, str)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(tensors):
        return None
    if "..." in equation:
        spared = [c for c in string.ascii_letters if c not in equation]
        most = max(len(shape_of(t)) - len(term) + 3 for term, t in zip(terms, tensors, strict=True) if "..." in term)

        def spelled(term: str, rank: int) -> str:
            """The dots as letters, of the last of those that the widest operand needs."""
            return term.replace("...", "".join(spared[most - (rank - len(term) + 3) : most]))

        terms = [spelled(term, len(shape_of(t))) for term, t in zip(terms, tensors, strict=True)]
        output = spelled(output, len(index))
    if any(len(term) != len(shape_of(t)) for term, t in zip(terms, tensors, strict=True)):
        return None
    places: dict[str, Expr] = dict(zip(output, index, strict=True))
    summed: list[n.Var] = []
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, extent in zip(term, shape_of(tensor), strict=True):
            if letter not in places:
                summed.append(n.fresh(letter, extent))
                places[letter] = summed[-1]
    body: Expr = n.Const(1.0)
    for term, tensor in zip(terms, tensors, strict=True):
        body = n.mul(body, lifter.operand(tensor, broadcast(tuple(places[letter] for letter in term), tensor)))
    for variable in summed:
        body = n.total(variable, body)
    return body


def _sum(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    dims = argument(node, 1, "dim")
    rank = len(shape_of(source))
    if not dims or len(dims) != 1:
        return None
    dim = _dim(dims[0], rank)
    v = n.fresh("r", shape_of(source)[dim])
    rest = index[:dim] + index[dim + 1 :] if argument(node, 2, "keepdim", False) else index
    return n.total(v, lifter.element(source, (*rest[:dim], v, *rest[dim:])))


def softmax_of(node: Node) -> tuple[Node, int] | None:
    """What a node is the softmax of, and along which dimension; also where it is written out, or by its logarithm."""
    found = _softmax_call(node)
    return None if found is None else (found[0], _dim(found[1], len(shape_of(node))))


def _softmax_call(node: Node) -> tuple[Node, int] | None:
    args = _args(node)
    if node.target in (aten.softmax.int, aten._softmax.default):
        return args[0], args[1]
    if node.target is aten.exp.default and args[0].target in (aten.log_softmax.int, aten._log_softmax.default):
        return _args(args[0])[0], _args(args[0])[1]
    if node.target is aten.exp.default and args[0].target is aten.sub.Tensor:  # x - log(sum(exp(x)))
        x, total = _args(args[0])[:2]
        if isinstance(total, Node) and total.target is aten.logsumexp.default and _args(total)[0] is x:
            dims = argument(total, 1, "dim")
            return (x, dims[0]) if len(dims) == 1 and argument(total, 2, "keepdim", False) else None
    if node.target is aten.div.Tensor and isinstance(args[0], Node) and args[0].target is aten.exp.default:
        total = args[1]
        if isinstance(total, Node) and total.target is aten.sum.dim_IntList and _args(total)[0] is args[0]:
            dims = argument(total, 1, "dim")
            if dims and len(dims) == 1 and argument(total, 2, "keepdim", False):
                return _args(args[0])[0], dims[0]
    return None


def _amax(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source, dims = _source(node), argument(node, 1, "dim", ())
    if len(dims) != 1:
        return None
    dim = _dim(dims[0], len(shape_of(source)))
    v = n.fresh("r", shape_of(source)[dim])
    rest = index[:dim] + index[dim + 1 :] if argument(node, 2, "keepdim", False) else index
    return n.largest(v, lifter.element(source, (*rest[:dim], v, *rest[dim:])))


def _softmax(lifter: Lifter, node: Node, index: Index) -> Expr:
    return n.Softmax(node, _dim(_args(node)[1], len(index)), index)


def _or_softmax(otherwise: Pointwise) -> Pointwise:
    """A softmax where an operator ends one that is written out, else what the operator means by itself."""

    def rule(lifter: Lifter, node: Node, index: Index) -> Expr | None:
        found = softmax_of(node)
        return otherwise(lifter, node, index) if found is None else n.Softmax(node, found[1], index)

    return rule


def _pow(lifter: Lifter, node: Node, index: Index) -> Expr:
    return n.apply("pow", lifter.value(_args(node)[0], index), lifter.value(_args(node)[1], index))


def _piece(lifter: Lifter, node: Node, index: Index) -> Expr | None:
    source, piece = _args(node)
    if isinstance(source, Node) and source.target is aten.topk.default and piece == 1:
        values = _source(source)
        dim = _dim(argument(source, 2, "dim", -1), len(index))
        return n.ZERO if shape_of(values)[dim] == 1 else None  # the best of one
    if isinstance(source, Node) and source.target in (aten.meshgrid.default, aten.meshgrid.indexing):
        axes, crossed = _args(source)[0], argument(source, 1, "indexing", "ij") == "xy"
        dim = 1 - piece if crossed and len(axes) > 1 and piece < 2 else piece
        return lifter.element(axes[piece], (index[dim],) if shape_of(axes[piece]) else ())
    step = _getitem(node, index)
    return None if step is None else lifter.element(*step)


def _off_dropout(lifter: Lifter, node: Node, index: Index) -> Expr:
    step = _dropout(node, index)
    if step is None:
        return n.apply("dropout", lifter.value(_args(node)[0], index))
    return lifter.element(*step)


_TABLES: tuple[tuple[Pointwise, tuple[Any, ...]], ...] = (
    (_arange, (aten.arange.default, aten.arange.start, aten.arange.start_step)),
    (_constant(0), (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)),
    (_constant(1), (aten.ones.default, aten.ones_like.default, aten.new_ones.default)),
    (_full(1), (aten.full.default, aten.full_like.default)),
    (_full(1), (aten.fill.Scalar,)),
    (_full(2), (aten.new_full.default,)),
    (_eye, (aten.eye.default, aten.eye.m)),
    (_full(0), (aten.scalar_tensor.default,)),
    (_binary(n.add), (aten.add.Tensor, aten.add.Scalar)),
    (_binary(n.sub), (aten.sub.Tensor, aten.sub.Scalar)),
    (_rsub, (aten.rsub.Scalar, aten.rsub.Tensor)),
    (_neg, (aten.neg.default,)),
    (_binary(n.mul), (aten.mul.Tensor, aten.mul.Scalar)),
    (_or_softmax(_binary(_divide)), (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)),
    (_binary(n.floordiv), (aten.floor_divide.default, aten.floor_divide.Scalar)),
    (_binary(n.mod), (aten.remainder.Scalar, aten.remainder.Tensor)),
    (_lt, (aten.lt.Tensor, aten.lt.Scalar)),
    (_le, (aten.le.Tensor, aten.le.Scalar)),
    (_gt, (aten.gt.Tensor, aten.gt.Scalar)),
    (_ge, (aten.ge.Tensor, aten.ge.Scalar)),
    (_eq, (aten.eq.Tensor, aten.eq.Scalar)),
    (_ne, (aten.ne.Tensor, aten.ne.Scalar)),
    (_logical(n.and_), (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)),
    (_logical(n.or_), (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)),
    (_logical_not, (aten.logical_not.default, aten.bitwise_not.default)),
    (_where, (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)),
    (_masked_fill, (aten.masked_fill.Scalar, aten.masked_fill.Tensor)),
    (_cast, _CASTS),
    (_tril, (aten.tril.default,)),
    (_triu, (aten.triu.default,)),
    (_cat, (aten.cat.default, aten.concat.default)),
    (_stack, (aten.stack.default,)),
    (_pad, (aten.constant_pad_nd.default, aten.pad.default)),
    (_slice_scatter, (aten.slice_scatter.default,)),
    (_scatter, (aten.scatter.value, aten.scatter.src)),
    (_scatter_add, (aten.scatter_add.default,)),
    (_gather, (aten.gather.default,)),
    (_index, (aten.index.Tensor,)),
    (_cumsum, (aten.cumsum.default,)),
    (_diff, (aten.diff.default,)),
    (_matmul, (aten.matmul.default, aten.bmm.default, aten.mm.default)),
    (_baddbmm, (aten.baddbmm.default,)),
    (_einsum, (aten.einsum.default,)),
    (_sum, (aten.sum.dim_IntList,)),
    (_amax, (aten.amax.default,)),
    (_softmax, (aten.softmax.int, aten._softmax.default)),
    (_pow, (aten.pow.Tensor_Scalar,)),
    (_unary("square"), (aten.square.default,)),
    (_piece, (operator.getitem,)),
    (_off_dropout, (aten.dropout.default, aten.feature_dropout.default)),
    (_binary(_floor), (aten.maximum.default, aten.max.other, aten.clamp_min.default)),
    (_binary(_ceiling), (aten.minimum.default, aten.min.other, aten.clamp_max.default)),
    (_clamp, (aten.clamp.default,)),
    (_unary("relu"), (aten.relu.default,)),
    (_unary("tanh"), (aten.tanh.default,)),
    (_or_softmax(_unary("exp")), (aten.exp.default,)),
    (_log, (aten.log.default,)),
    (_index_put, (aten.index_put.default,)),
    (_unary("abs"), (aten.abs.default,)),
    (_unary("sigmoid"), (aten.sigmoid.default,)),
)

POINTWISE: dict[Any, Pointwise] = {target: rule for rule, targets in _TABLES for target in targets}

LAYERS: dict[Any, Pointwise] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default), _pointwise_convolution),
}
"""Products with a weight. They are looked into where nothing else can be the product that is asked for."""

CONTRACTIONS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default})


def _by_constant(node: Node, invert: bool = False) -> tuple[Node, float] | None:
    source, factor = _args(node)[:2]
    if is_tensor(source) and isinstance(factor, (int, float)):
        return source, 1.0 / factor if invert else float(factor)
    return None


def _cast_operand(node: Node) -> tuple[Node, float] | None:
    """Rounding to a narrower float before a product: the op computes with more precision, never less."""
    source = _source(node)
    floats = is_tensor(source) and dtype_of(source).is_floating_point and dtype_of(node).is_floating_point
    return (source, 1.0) if floats and _widening(node, ()) is not None else None


def _invert(node: Node) -> tuple[Node, float] | None:
    return _by_constant(node, invert=True)


SCALING: dict[Any, Callable[[Node], tuple[Node, float] | None]] = {
    aten.mul.Tensor: _by_constant,
    aten.mul.Scalar: _by_constant,
    aten.div.Tensor: _invert,
    aten.div.Scalar: _invert,
    **dict.fromkeys(_CASTS, _cast_operand),
}


def leads_to_structure(node: Node, depth: int = 8) -> bool:
    """Whether a softmax or a rectified product is a few pointwise steps away: operands worth looking into."""
    if node.op != "call_function" or depth == 0:
        return False
    if node.target is aten.relu.default or softmax_of(node) is not None:
        return True
    if node.target in CONTRACTIONS or (node.target not in POINTWISE and node.target not in LAYOUT):
        return False
    first = _args(node)[0] if _args(node) else None
    if node.target is operator.getitem and isinstance(first, Node):  # a piece of a split
        first = _args(first)[0]
    return isinstance(first, Node) and is_tensor(first) and leads_to_structure(first, depth - 1)
