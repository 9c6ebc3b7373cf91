"""Where a tensor came from: the operators that made masks and positions, noted while a model's own code runs.

A layer that is captured alone gets its mask as an input, and an input proves nothing. But the code that made the mask
ran a moment ago, in this very call. `Recorder` notes its operators as they run; `continued.py` puts them into the
layer's graph, and rules read the mask there as they would in a graph of the whole model. Nothing is noted but what
comes from constructors, integers and booleans, so weights and activations never get in.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that an operator made from others.

    Attributes:
        target: the operator, or ``operator.getitem``.
        args, kwargs: its arguments, with `Made` and `Given` in place of tensors.
        depth: the most operators on a way from here to where nothing is known.
        verdicts: for each continuation of a graph, whether this tensor is made as the graph has it (a memo).
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    depth: int
    verdicts: dict[int, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor of integers or booleans that nobody saw being made, such as token ids or a padding mask."""

    tensor: torch.Tensor
    depth: int = 0
    verdicts: dict[int, Any] = field(default_factory=dict, repr=False)


Origin = Made | Given

DEEPEST = 200
"""Longer chains of operators than this are not noted: no mask is that long, a loop over steps may be."""


class _Table:
    """Origins by tensor. A tensor is known by its storage and its place in it: views are made anew by autograd.

    The reference to a storage is weak, but keeps its address from being given to another.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, tuple[Origin, StorageWeakRef, int | None]] = {}
        self._swept = 256

    def note(self, tensor: torch.Tensor, origin: Origin) -> None:
        if len(self._entries) >= self._swept:
            self._entries = {k: e for k, e in list(self._entries.items()) if not e[1].expired()}
            self._swept = max(256, 2 * len(self._entries))
        self._entries[place(tensor)] = (origin, StorageWeakRef(tensor.untyped_storage()), _version(tensor))

    def find(self, tensor: torch.Tensor) -> Origin | None:
        entry = self._entries.get(place(tensor))
        return entry[0] if entry is not None and entry[2] == _version(tensor) else None

    def forget(self, tensor: torch.Tensor) -> None:
        """A write: whatever shares the tensor's memory is not what was noted any more."""
        storage = tensor.untyped_storage()._cdata
        for key in [key for key in list(self._entries) if key[0] == storage]:
            self._entries.pop(key, None)


_table = _Table()


def origin_of(value: object) -> Origin | None:
    """How a tensor was made, if that was seen and nothing was written into it since."""
    return _table.find(value) if isinstance(value, torch.Tensor) and _plain(value) else None


def written(value: object) -> None:
    """Something may have been written into a tensor where no recorder saw it; most tensors tell by their version."""
    if isinstance(value, torch.Tensor) and value.is_inference() and _plain(value):
        _table.forget(value)


def place(tensor: torch.Tensor) -> Key:
    """What tells a tensor from every other that is alive: its memory, and how it lies there."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, FakeTensor) and tensor.layout is torch.strided


def _number(tensor: torch.Tensor) -> Any:
    """The number that a tensor without dimensions holds on the host; None for any other tensor."""
    if tensor.dim() or tensor.device.type != "cpu" or tensor.requires_grad:
        return None
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    return None if known is None else known.item()


class Recorder(TorchDispatchMode):
    """Notes how tensors are made while it is active. Nothing that runs is changed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        writes, repeatable = _kind(func)
        if writes:
            for tensor in _tensors((args, kwargs)):
                if _plain(tensor):
                    _table.forget(tensor)
        elif repeatable and not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            _note(func, args, kwargs or {}, result)
        return result


@cache
def _kind(func: Any) -> tuple[bool, bool]:
    """Whether an operator writes into its arguments, and whether it gives the same result for the same ones."""
    undefined = "empty" in func._schema.name or torch.Tag.nondeterministic_seeded in func.tags
    return func._schema.is_mutable, not undefined


def _note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    if isinstance(result, torch.Tensor):
        if not _plain(result):
            return
    elif not isinstance(result, (tuple, list)) or not all(isinstance(r, torch.Tensor) and _plain(r) for r in result):
        return
    try:
        made_args, made_kwargs = _described(args), {name: _described(value) for name, value in kwargs.items()}
    except _Unknown:
        return
    depth = 1 + max((origin.depth for origin in origins((made_args, made_kwargs))), default=0)
    if depth > DEEPEST:
        return
    made = Made(func, made_args, made_kwargs, depth)
    if isinstance(result, torch.Tensor):
        _table.note(result, made)
        return
    for i, output in enumerate(result):
        _table.note(output, Made(operator.getitem, (made, i), {}, depth))


class _Unknown(Exception):
    """An argument that nothing is known about."""


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _origin_or_number(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_described(v) for v in value) if type(value) in (tuple, list) else _raise()
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Generator)):
        return _raise()
    return value


def _origin_or_number(tensor: torch.Tensor) -> Any:
    if not _plain(tensor):
        return _raise()
    known = _table.find(tensor)
    if known is not None:
        return known
    number = _number(tensor)
    if number is not None:
        return Made(torch.ops.aten.full.default, ([], number), {"dtype": tensor.dtype, "device": "cpu"}, 1)
    if tensor.is_floating_point() or tensor.is_complex():
        return _raise()
    given = Given(tensor)
    _table.note(tensor, given)
    return given


def _raise() -> Any:
    raise _Unknown


def origins(value: Any) -> Iterator[Origin]:
    """The origins in an operator's arguments, in order."""
    if isinstance(value, (Made, Given)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from origins(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from origins(item)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
