"""Repeated layers: which sites are the same code, so that what is shown of one is shown of all of them.

Two sites are the same where their regions (everything between operands and outputs) are equal but for the names of
nodes and modules. Verification draws its random inputs from the same seed at every site, so at two such sites it is
one computation done twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Mapping
from itertools import chain, islice

import torch
from torch.fx import Node

from kreg.rewriters.graph import STORED, sized, upstream
from kreg.rewriters.site import Calls, Extent, Operand, Site

log = logging.getLogger("kreg")

LARGEST = 4096
"""Nodes of the largest region that is described. A site whose region never ends at operands stands for itself."""

CONSTANTS = (
    type(None), bool, int, float, complex, str,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Arguments whose type and text say all there is to say: a float's text is exact, and keeps the sign of zero."""


Numbers = Mapping[Node, int]


class _Unknown(Exception):
    """Something that is not described: its site stands for itself."""


class Repeats:
    """The sites seen so far, by their code."""

    def __init__(self) -> None:
        self._first: dict[Hashable, Site] = {}
        self._digests: dict[int, bytes] = {}

    def first(self, site: Site, *context: Hashable) -> Site:
        """The first site seen that is the same code, in an equal ``context``; the site itself where none is."""
        try:
            return self._first.setdefault((self._code(site), context), site)
        except _Unknown:
            return site
        except Exception:  # a tensor of a kind that has no strides or no bytes: verified by itself, as if unknown
            log.debug("%s cannot be described", site.id, exc_info=True)
            return site

    def _code(self, site: Site) -> Hashable:
        """All that a site consists of.

        Numbers stand for nodes: operands first, then in the order of `upstream`. Nodes that hold the tensor of an
        operand, as where every layer computes the same mask again, have the operand's number.
        """
        parts = [part for operand in site.operands.values() for part in operand.parts]
        operands = dict.fromkeys(part.node for part in parts)
        free = [part for part in parts if not part.follows]
        twins = {node: part.node for part in free for node in part.same}
        follow = [part.node for part in parts if part.follows]
        wanted = [*(output.node for output in site.outputs), *follow]
        region = list(islice(upstream(wanted, {*(part.node for part in free), *twins}), LARGEST + 1))
        if len(region) > LARGEST:
            raise _Unknown
        number = {node: place for place, node in enumerate(chain(operands, region))}
        for source in {source for node in region for source in node.all_input_nodes if source in twins}:
            place = number[twins[source]]
            if number.setdefault(source, place) != place or self._input(source) != self._input(twins[source]):
                raise _Unknown
        return (
            site.op.name,
            tuple((name, _operand(operand, number)) for name, operand in site.operands.items()),
            tuple((name, _argument(value, number)) for name, value in site.attributes.items()),
            tuple((number[o.node], o.position, _calls(o.calls, number)) for o in site.outputs),
            tuple(map(self._input, operands)),
            tuple(self._node(node, number) for node in region),
        )

    def _node(self, node: Node, number: Numbers) -> Hashable:
        if node.op == "call_function":
            return node.target, _argument(node.args, number), _argument(node.kwargs, number), _value(node)
        if node.op == "placeholder" or (node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)):
            return self._input(node)
        raise _Unknown

    def _input(self, node: Node) -> Hashable:
        """What comes from outside: its form, and its values where verification takes them as they are stored."""
        stored = node.meta.get(STORED)
        if stored is None:
            return _value(node), None
        if id(stored) not in self._digests:
            self._digests[id(stored)] = _digest(stored)
        return _value(node), self._digests[id(stored)]


def _value(node: Node) -> Hashable:
    return _form(node.meta.get("val")), bool(node.meta.get("trains", False))


def _form(value: object) -> Hashable:
    """Shape, strides, dtype and device of a tensor; a symbolic number as its expression."""
    if isinstance(value, torch.Tensor):
        strides = tuple(map(sized, value.stride())) if value.layout is torch.strided else value.layout
        return tuple(map(sized, value.shape)), strides, value.dtype, str(value.device)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return _constant(value)


def _argument(value: object, number: Numbers) -> Hashable:
    if isinstance(value, Node):
        return "%", number[value] if value in number else _form(value.meta.get("val"))
    if isinstance(value, Operand):
        return _operand(value, number)
    if isinstance(value, Extent):
        return "extent", number[value.node], value.dim
    if isinstance(value, (list, tuple)):
        return "list", tuple(_argument(part, number) for part in value)
    if isinstance(value, slice):
        return "slice", tuple(_argument(part, number) for part in (value.start, value.stop, value.step))
    if isinstance(value, Mapping):
        return "dict", tuple((name, _argument(part, number)) for name, part in value.items())
    return _form(value)


def _operand(operand: Operand, number: Numbers) -> Hashable:
    return number[operand.node], _calls(operand.calls, number), operand.levels


def _calls(calls: Calls, number: Numbers) -> Hashable:
    return tuple((target, _argument(args, number)) for target, args in calls)


def _constant(value: object) -> Hashable:
    if not isinstance(value, CONSTANTS):
        raise _Unknown
    return type(value), repr(value)


def _digest(stored: torch.Tensor) -> bytes:
    plain = stored.detach().cpu().contiguous().flatten()
    return hashlib.blake2b(plain.view(torch.uint8).numpy().tobytes()).digest()
