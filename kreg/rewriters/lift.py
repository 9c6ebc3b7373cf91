"""From graph nodes to index notation: `Lifter.element` says what one element of a node's tensor is."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import FIXED, STORED, WRITTEN, dtype_of, is_tensor, shape_of, sized
from kreg.rewriters.notation import Expr
from kreg.rewriters.stored import stored

Index = tuple[Expr, ...]
LIMIT = 400
"""Expressions larger than this stay a load of their node: no rule reads anything so large."""


class Lifter:
    """Lifts nodes of one graph.

    Attributes:
        opaque: nodes that are not looked into, whatever computes them (outputs of sites already found).
        cuts: index variables that operands were met to take apart, and where (`notation.cuts`).
        origins: for each expression met, the nodes and indices that it is an element of, innermost first.
        layers: whether it looks into linear layers, whose results are tensors of their own to all but few questions.
    """

    def __init__(self, opaque: Collection[Node] = (), layers: bool = False) -> None:
        self.opaque = frozenset(opaque)
        self.layers = layers
        self.origins: dict[Expr, list[tuple[Node, Index]]] = {}
        self.cuts: set[tuple[n.Var, int]] = set()
        self._memo: dict[tuple[Node, Index], Expr] = {}

    @cached_property
    def into_layers(self) -> Lifter:
        """One of the same graph that looks into linear layers, too."""
        return Lifter(self.opaque, layers=True)

    def element(self, node: Node, index: Index) -> Expr:
        """The element of ``node`` at ``index``, looked into as far as index notation goes."""
        index = _normal(node, index)
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._lift(node, index)
            self.origins.setdefault(self._memo[key], []).append(key)
        return self._memo[key]

    def operand(self, node: Node, index: Index) -> Expr:
        """The element of a contraction's operand: through views, casts and constant factors, no further.

        The load is of the innermost node on the way whose dimensions are index variables, each by itself or
        several flattened, so that it can be bound as it stands: repeated heads are seen before their repetition.
        """
        from kreg.rewriters.lift_ops import LAYOUT, SCALING, leads_to_structure

        factor = 1.0
        index = _normal(node, index)
        self.cuts.update(cut for i in index for cut in n.cuts(i))
        best = (node, index, factor)
        while node not in self.opaque and node.op == "call_function" and not stops_gradient(node):
            if any(source.meta.get(WRITTEN) for source in node.all_input_nodes):
                break
            if leads_to_structure(node):
                return n.mul(n.Const(factor), self.element(node, index))
            if node.target in LAYOUT and (step := LAYOUT[node.target](node, index)) is not None:
                node, index = step
            elif node.target in SCALING and (scaled := SCALING[node.target](node)) is not None:
                node, factor = scaled[0], factor * scaled[1]
            else:
                break
            index = _normal(node, index)
            self.cuts.update(cut for i in index for cut in n.cuts(i))
            if is_regular(node, index):
                best = (node, index, factor)
        found = load(best[0], best[1])
        self.origins.setdefault(found, []).append((best[0], best[1]))
        return n.mul(n.Const(best[2]), found) if best[2] != 1.0 else found

    def value(self, arg: Any, index: Index) -> Expr:
        """An argument of a pointwise call at an element of its result: tensors broadcast."""
        if is_tensor(arg):
            return self.element(arg, broadcast(index, arg))
        if isinstance(arg, Node):
            return n.size(sized(arg.meta["val"]))
        return n.Const(arg)

    def _lift(self, node: Node, index: Index) -> Expr:
        from kreg.rewriters.lift_ops import LAYERS, LAYOUT, POINTWISE

        if node.meta.get(FIXED) and (found := stored(node.meta[STORED], index)) is not None:
            return found
        if any(source.meta.get(WRITTEN) for source in node.all_input_nodes):
            return load(node, index)  # the input itself will hold another value by the time gradients read it
        if node in self.opaque or node.op != "call_function" or stops_gradient(node):
            return load(node, index)
        if node.target in LAYOUT:
            step = LAYOUT[node.target](node, index)
            return load(node, index) if step is None else self.element(*step)
        rule = POINTWISE.get(node.target) or (LAYERS.get(node.target) if self.layers else None)
        found = rule(self, node, index) if rule is not None else None
        if found is None or _too_large(found):
            return load(node, index)
        return found


def stops_gradient(node: Node) -> bool:
    """Whether gradients could flow to what a value is computed from, but not through it: a detach, or no_grad."""
    return bool(node.meta.get("cut", False))


def load(node: Node, index: Index) -> Expr:
    """An element that is not looked into; booleans read as "is not 0"."""
    dtype = dtype_of(node)
    found = n.Load(node, index, not (dtype.is_floating_point or dtype.is_complex))
    return n.truth(found) if dtype is torch.bool else found


def broadcast(index: Index, source: Node) -> Index:
    """The index into a tensor that is broadcast to where ``index`` points."""
    shape = shape_of(source)
    return tuple(n.ZERO if s == 1 else i for s, i in zip(shape, index[len(index) - len(shape) :], strict=True))


def variables(node: Node, names: str) -> tuple[n.Var, ...]:
    """One index variable for each dimension of a node: ``variables(node, "bhst")``."""
    return tuple(n.Var(name, s) for name, s in zip(names, shape_of(node), strict=True))


def _normal(node: Node, index: Index) -> Index:
    return tuple(n.ZERO if s == 1 else i for s, i in zip(shape_of(node), index, strict=True))


def is_regular(node: Node, index: Index) -> bool:
    """Whether every dimension is indexed by variables of its own, through its whole extent."""
    found = [n.digits(i, extent) for i, extent in zip(index, shape_of(node), strict=True)]
    every = [v for group in found for v in group or ()]
    return None not in found and len(set(every)) == len(every)


def _too_large(e: Expr) -> bool:
    return any(count > LIMIT for count, _ in enumerate(e.walk()))
