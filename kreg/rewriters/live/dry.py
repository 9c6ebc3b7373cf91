"""What a graph gives on fake tensors, without running it again: they are told by their shapes alone.

A dry run of a deep model calls the graph of a layer once for each layer, and a graph on fake tensors takes longer
than on small real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

Form = tuple[Any, ...]
"""Of a fake tensor: dtype, device, sizes, strides, whether gradients flow."""


def remembered(run: Callable[..., Any]) -> Callable[..., Any]:
    """A graph that is run once for inputs of a form, and then answers with tensors of the form of its outputs.

    Args:
        run: the graph; it writes into no input, and gives a sequence.
    """
    known: dict[Form, list[Any]] = {}

    def call(*inputs: Any) -> Any:
        try:
            key = (torch.is_grad_enabled(), *map(_form, inputs))
        except _Unknown:
            return run(*inputs)
        if key in known:
            return tuple(inputs[o] if isinstance(o, int) else _like(o) for o in known[key])
        outputs = run(*inputs)
        with contextlib.suppress(_Unknown):
            known[key] = [_place(output, inputs) for output in outputs]
        return outputs

    return call


class _Unknown(Exception):
    """A value that is more than its form."""


def _form(value: Any) -> Form:
    if not isinstance(value, FakeTensor) or value.constant is not None:
        raise _Unknown
    sizes = (*value.shape, *value.stride())
    if not all(type(size) is int for size in sizes):
        raise _Unknown
    return value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad


def _place(output: Any, inputs: tuple[Any, ...]) -> Any:
    """The position of the input that an output is, or its form."""
    for position, value in enumerate(inputs):
        if output is value:
            return position
    form = _form(output)
    memory = output.untyped_storage()._cdata
    if any(value.untyped_storage()._cdata == memory for value in inputs):
        raise _Unknown  # a view: how its input was made would be lost
    return form


def _like(form: Form) -> torch.Tensor:
    dtype, device, sizes, strides, trains = form
    made = torch.empty_strided(sizes, strides, dtype=dtype, device=device, requires_grad=trains)
    return made.clone() if trains else made  # what a graph gives is no leaf
