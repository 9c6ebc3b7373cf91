"""Chains of views as the fewest calls that give the same: at most a reshape, a permute and another reshape.

What a model does to its tensors around an attention and what lines them up for the op are different views of the
same numbers; each costs a call, and a node of autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kreg.rewriters.graph import aten

RESHAPED = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int),
        *(aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    }
)
"""Views that keep the order of the elements."""

PERMUTED = frozenset({aten.permute.default, aten.transpose.int})

Call = tuple[Any, tuple[Any, ...]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Atom:
    """A factor of a dimension, of a size over 1; the same one wherever it goes."""

    number: int
    size: int


Axes = list[list[_Atom]]
"""Of each dimension its factors, most significant first; none where its size is 1."""


def compose(module: GraphModule) -> None:
    """Rewrites the chains of views of a graph whose sizes are known."""
    for node in reversed(module.graph.nodes):
        chain = _chain(node)
        if len(chain) < 2:
            continue
        source = _viewed(chain[0])
        calls = _fewest(_shape(source), chain)
        if calls is None or len(calls) >= len(chain):
            continue
        with module.graph.inserting_before(node):
            value = source
            for target, arguments in calls:
                value = module.graph.call_function(target, (value, *arguments))
        if value is not source:
            value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        for view in reversed(chain):
            module.graph.erase_node(view)
    module.recompile()


def _chain(last: Node) -> list[Node]:
    """The views that end with a node, each the only use of the one before; a node that such a view reads ends none."""
    if not _is_view(last) or any(user.op == "output" for user in last.users):
        return []
    if len(last.users) == 1 and _is_view(next(iter(last.users))):
        return []
    chain = [last]
    while _is_view(before := _viewed(chain[0])) and len(before.users) == 1:
        chain.insert(0, before)
    return chain


def _is_view(node: Node) -> bool:
    if node.target not in RESHAPED | PERMUTED or node.kwargs:
        return False
    return _shape(node) != () and _shape(_viewed(node)) != ()


def _viewed(view: Node) -> Node:
    (source, *_) = view.args
    assert isinstance(source, Node)
    return source


def _shape(node: Node) -> Shape:
    """() where a size is not known, and of what has no element or no dimension."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(type(size) is int and size > 0 for size in value.shape):
        return ()
    return tuple(value.shape)


def _fewest(shape: Shape, chain: Sequence[Node]) -> list[Call] | None:
    """The calls that bring a tensor of a shape to where a chain brings it; None if its sizes have no common factors."""
    numbers = count()
    atoms = [[_Atom(next(numbers), size)] if size > 1 else [] for size in shape]
    axes: Axes = [list(group) for group in atoms]
    for node in chain:
        arguments: tuple[Any, ...] = node.args[1:]
        if node.target is aten.permute.default:
            axes = [axes[d] for d in arguments[0]]
        elif node.target is aten.transpose.int:
            a, b = arguments
            axes[a], axes[b] = axes[b], axes[a]
        else:
            split = _regrouped(axes, _shape(node), numbers)
            if split is None:
                return None
            axes, pieces = split
            atoms = [[piece for atom in group for piece in pieces.get(atom, (atom,))] for group in atoms]
    return min(_ways(shape, atoms, axes), key=len)


def _regrouped(axes: Axes, shape: Shape, numbers: Iterator[int]) -> tuple[Axes, dict[_Atom, tuple[_Atom, ...]]] | None:
    """The axes of a tensor seen in another shape, and what its atoms were split into."""
    rest = [atom for axis in axes for atom in axis]
    pieces: dict[_Atom, tuple[_Atom, ...]] = {}
    made: Axes = []
    for size in shape:
        axis: list[_Atom] = []
        while prod(atom.size for atom in axis) < size:
            atom, wanted = rest.pop(0), size // prod(atom.size for atom in axis)
            if wanted % atom.size:
                if atom.size % wanted:
                    return None
                parts = _Atom(next(numbers), wanted), _Atom(next(numbers), atom.size // wanted)
                whole = next((old for old, new in pieces.items() if atom in new), atom)
                before = pieces.get(whole, (atom,))
                pieces[whole] = tuple(p for old in before for p in (parts if old is atom else (old,)))
                atom = parts[0]
                rest.insert(0, parts[1])
            axis.append(atom)
        if prod(atom.size for atom in axis) != size:
            return None
        made.append(axis)
    return made, pieces


def _ways(shape: Shape, atoms: Axes, axes: Axes) -> Iterator[list[Call]]:
    """Calls from a tensor of some atoms to one whose axes they are, in each way there is."""
    have, want = [a for group in atoms for a in group], [a for axis in axes for a in axis]
    sizes = tuple(prod(atom.size for atom in axis) for axis in axes)
    if have == want:
        yield _reshaped(shape, sizes)
        return
    moved = _runs(atoms, want)
    if moved is not None:  # permuted as it is
        ones = [d for d, group in enumerate(atoms) if not group]
        order = [*ones, *moved]
        yield [(aten.permute.default, (order,)), *_reshaped(tuple(shape[d] for d in order), sizes)]
    runs = _pieces(have, axes)
    spread = [run for axis in axes for run in runs if run[0] in axis]
    spread.sort(key=lambda run: want.index(run[0]))
    empty = [d for d, axis in enumerate(axes) if not axis]
    split = tuple(prod(atom.size for atom in run) for run in runs) + (1,) * len(empty)
    first, places = _with_ones(shape, split, len(empty))
    order = [places[runs.index(run)] for run in spread]
    if len(runs) == len(axes) - len(empty):
        for d, place in zip(empty, places[len(runs) :], strict=True):
            order.insert(d, place)
        yield [*first, (aten.permute.default, (order,))]
    else:
        order += places[len(runs) :]
        now = tuple(prod(atom.size for atom in run) for run in spread) + (1,) * len(empty)
        yield [*first, (aten.permute.default, (order,)), *_reshaped(now, sizes)]


def _with_ones(shape: Shape, split: Shape, ones: int) -> tuple[list[Call], list[int]]:
    """How a tensor gets some dimensions and then as many of size 1, and where each is; none where it has them."""
    places = [d for d, size in enumerate(shape) if size > 1], [d for d, size in enumerate(shape) if size == 1]
    if tuple(shape[d] for d in places[0]) == split[: len(split) - ones] and len(places[1]) == ones:
        return [], [*places[0], *places[1]]
    return _reshaped(shape, split), list(range(len(split)))


def _runs(atoms: Axes, want: Sequence[_Atom]) -> list[int] | None:
    """The order in which whole dimensions stand where their atoms are wanted; None if one is torn."""
    order, place = [], 0
    first = {group[0]: d for d, group in enumerate(atoms) if group}
    while place < len(want):
        d = first.get(want[place])
        if d is None or list(want[place : place + len(atoms[d])]) != atoms[d]:
            return None
        order.append(d)
        place += len(atoms[d])
    return order


def _pieces(have: Sequence[_Atom], axes: Axes) -> list[list[_Atom]]:
    """Atoms that follow one another in a tensor and in one of the axes wanted."""
    follows = {a: b for axis in axes for a, b in pairwise(axis)}
    runs: list[list[_Atom]] = []
    for atom in have:
        if runs and follows.get(runs[-1][-1]) == atom:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return runs


def _reshaped(shape: Shape, wanted: Shape) -> list[Call]:
    return [] if shape == wanted else [(aten.reshape.default, (list(wanted),))]
