"""Capture by ``torch.export``: a model, or a program that was saved, as a functional graph of ATen operators."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from kreg.errors import CaptureError

Inputs = Sequence[Any] | Mapping[str, Any] | torch.Tensor
"""Example inputs: positional ones, keyword ones, or a single tensor."""


def split_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    Raises:
        CaptureError: the inputs are of another kind.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        if len(example_inputs) == 2:
            args, kwargs = example_inputs
            if isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping):
                return tuple(args), dict(kwargs)
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example inputs should be a tensor, a tuple of positional ones, a dict of keyword ones, or "
        f"(tuple, dict); found {type(example_inputs).__name__}"
    )


def export_model(model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any = None) -> ExportedProgram:
    """``torch.export.export`` with the model left as it was, whatever happens.

    Args:
        model: any module.
        example_inputs: see `split_inputs`.
        dynamic_shapes: as ``torch.export.export`` takes them, for keyword and positional inputs alike; "auto"
            makes batch and sequence (the first two dimensions of every tensor) dynamic where the model allows.

    Raises:
        CaptureError: the exporter's own reason, and the module in which it happened.
    """
    args, kwargs = split_inputs(example_inputs)
    _refuse_sharded(model)
    shapes = _automatic(args, kwargs) if dynamic_shapes == "auto" else dynamic_shapes
    training = {module: module.training for module in model.modules()}
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise failure(model, error, "exported") from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _refuse_sharded(model: nn.Module) -> None:
    """An exported program is one process's: it has no place for weights or collectives of several."""
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise CaptureError(
            "DistributedDataParallel holds a model for training in several processes: export the model inside, "
            "kreg.export(ddp.module, ...)"
        )
    gathered = fsdp is not None and isinstance(model, fsdp.FSDPModule)
    sharded = [] if tensor is None else [n for n, p in model.named_parameters() if isinstance(p, tensor.DTensor)]
    if gathered or sharded:
        raise CaptureError(
            f"{type(model).__name__} is sharded over processes ({sharded[0] if sharded else 'by fully_shard'}): export "
            f"it before it is sharded, and load its weights there. kreg.rewrite(model) takes it as it is"
        )


def _automatic(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    def shape(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        return {d: Dim.AUTO for d in range(min(value.dim(), 2)) if value.shape[d] > 1}

    if not kwargs:
        return tuple(torch.utils._pytree.tree_map(shape, args))
    if args:
        raise CaptureError(
            'dynamic_shapes="auto" takes positional or keyword example inputs, not both; pass them all by keyword'
        )
    return {name: torch.utils._pytree.tree_map(shape, value) for name, value in kwargs.items()}


def failure(model: nn.Module, error: BaseException, what: str) -> CaptureError:
    """What went wrong, in which module, and what to do: ``what`` is "exported" or "captured"."""
    where = failing_module(model, error.__traceback__)
    inside = f" in module {where!r}" if where else ""
    advice = "Try other example inputs"
    if what == "exported":
        advice += ", or kreg.rewrite(model), which does not need the whole model in one graph"
    return CaptureError(
        f"{type(model).__name__} could not be {what}{inside}: {type(error).__name__}: {first_sentences(error)}. "
        f"The model is unchanged. {advice}"
    )


def first_sentences(error: BaseException, limit: int = 400) -> str:
    """What an exception says, on one line, without the debugging advice that torch puts after the first paragraph."""
    paragraph = str(error).strip().split("\n\n")[0]
    text = " ".join(paragraph.split()).rstrip(".")
    return (text if len(text) <= limit else f"{text[:limit]} ...") or "no reason given"


def failing_module(model: nn.Module, traceback: TracebackType | None) -> str:
    """Path of the innermost module whose forward was running when an exception was raised."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame in _frames(traceback):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            found = paths[id(owner)]
    return found


def _frames(traceback: TracebackType | None) -> Iterable[Any]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next
