"""A site: one place in one graph where a rule holds, with everything needed to replace it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from kreg.registry.op import Op
from kreg.rewriters import notation as n
from kreg.rewriters.graph import aten, dtype_of, module_path, shape_of, source_line
from kreg.rewriters.lift import Index

Calls = tuple[tuple[Any, tuple[Any, ...]], ...]
"""Operators to apply one after the other, each with its further positional arguments."""


class Refused(Exception):
    """A proof obligation that does not hold, in words, and the node it fails at."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Operand:
    """A tensor argument: a node of the captured graph, and how to bring it into the op's layout."""

    node: Node
    calls: Calls = ()

    def cast(self, dtype: torch.dtype) -> Operand:
        """The same operand in another dtype."""
        if dtype_of(self.node) == dtype:
            return self
        return Operand(self.node, (*self.calls, (aten.to.dtype, (dtype,))))


@dataclass(frozen=True)
class Output:
    """A node of the captured graph that the op's result number ``position`` replaces, after ``calls``."""

    node: Node
    position: int
    calls: Calls = ()


@dataclass(frozen=True)
class Mask:
    """What was proven about a site's mask, for the report: its kind, and the values that make it up."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report's form."""
        return {"kind": self.kind, **self.facts}


@dataclass(frozen=True, eq=False)
class Site:
    """Where an op was recognised.

    Attributes:
        op: the op's contract.
        anchor: the node that the rule started from.
        operands: tensor arguments by name; absent optional ones are left out.
        attributes: the other arguments by name; a Node where the value is a symbolic size.
        outputs: what the op's results replace.
        mask: what was proven about the mask, where the op has one.
    """

    op: Op
    anchor: Node
    operands: Mapping[str, Operand]
    attributes: Mapping[str, Any]
    outputs: tuple[Output, ...]
    mask: Mask | None = None

    @property
    def id(self) -> str:
        """Unique in its graph and stable from run to run."""
        return f"{self.op.name}@{self.anchor.name}"

    @property
    def module(self) -> str:
        """Path of the module that computed the site's result."""
        return module_path(self.anchor)

    @property
    def trains(self) -> bool:
        """Whether gradients flow through the site's results."""
        return any(output.node.meta.get("trains", False) for output in self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first operand: the one that kernels are chosen by."""
        first = next(iter(self.operands.values()))
        for target, args in reversed(first.calls):
            if target is aten.to.dtype:
                return args[0]  # type: ignore[no-any-return]
        return dtype_of(first.node)


@dataclass(frozen=True)
class NearMiss:
    """An anchor without a site: which op it looked like, where it is, and the obligation that failed."""

    op: str
    anchor: Node
    reason: str
    node: Node | None = None

    def to_json(self) -> dict[str, Any]:
        """The report's form."""
        at = self.node or self.anchor
        line = source_line(at)
        return {
            "op": self.op,
            "module": module_path(self.anchor),
            "node": at.name,
            "reason": f"{self.reason} ({line})" if line else self.reason,
        }


def arrange(node: Node, index: Index, want: tuple[n.Expr | None, ...], what: str) -> Operand:
    """Views that bring ``node``, indexed by ``index``, into the order of ``want``.

    Each expression of ``want`` must be the index of one dimension, or be missing from ``index``, which gives a
    dimension of size 1; None asks for a dimension of size 1. Dimensions of the node that are not wanted must be
    of size 1.

    Raises:
        Refused: a dimension of the node that has no place.
    """
    left = dict(enumerate(index))
    order: list[int | None] = []
    for expression in want:
        found = next((d for d, i in left.items() if expression is not None and i == expression), None)
        if found is not None:
            del left[found]
        order.append(found)
    strays = [d for d in left if shape_of(node)[d] != 1]
    if strays:
        raise Refused(f"dimension {strays[0]} of the {what} does not line up with the other operands", node)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.slice.Tensor, (d, 0, extent)) for d, extent in _fewer(node, index)
    ]
    calls.extend((aten.squeeze.dim, (d,)) for d in sorted(left, reverse=True))
    permutation = [d - sum(gone < d for gone in left) for d in order if d is not None]
    if permutation != sorted(permutation):
        calls.append((aten.permute.default, (permutation,)))
    calls.extend((aten.unsqueeze.default, (d,)) for d, place in enumerate(order) if place is None)
    return Operand(node, tuple(calls))


def _fewer(node: Node, index: Index) -> Iterator[tuple[int, int]]:
    """Dimensions of which an index reads a first part only, and its length."""
    for d, (extent, i) in enumerate(zip(shape_of(node), index, strict=True)):
        if isinstance(i, n.Var) and isinstance(i.size, int) and i.size != extent:
            yield d, i.size


def arranged_back(node: Node, index: Index, have: tuple[n.Expr | None, ...]) -> Calls:
    """Views that bring a result indexed by ``have`` into the layout of ``node``, indexed by ``index``."""
    missing = [d for d, expression in enumerate(have) if expression is None or expression not in index]
    kept = [expression for d, expression in enumerate(have) if d not in missing]
    calls: list[tuple[Any, tuple[Any, ...]]] = [(aten.squeeze.dim, (d,)) for d in reversed(missing)]
    order = [kept.index(i) for i in index if i in kept]
    if order != sorted(order):
        calls.append((aten.permute.default, (order,)))
    calls.extend((aten.unsqueeze.default, (d,)) for d, i in enumerate(index) if i not in kept)
    return tuple(calls)
