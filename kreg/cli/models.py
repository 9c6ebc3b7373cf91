"""MODEL on the command line: a folder with a config.json, a .pt2 file, or a function."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from kreg.cli.output import BadInput
from kreg.registry.environment import Environment
from kreg.registry.wording import did_you_mean, listing
from kreg.rewriters.program import load, report_of

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WAYS = "a MODEL is a folder with a Hugging Face config.json, a .pt2 file, or package.module:function"


@dataclass(frozen=True)
class Shape:
    """What was asked of the example input; None where nothing was."""

    seq_len: int | None = None
    batch: int | None = None
    dtype: torch.dtype | None = None
    dynamic: bool = False

    @staticmethod
    def of(seq_len: int | None, batch: int | None, dtype: str | None, dynamic: bool = False) -> Shape:
        """From the command line; raises BadInput for an unknown dtype."""
        if dtype is not None and dtype not in DTYPES:
            raise BadInput(f"--dtype {dtype!r} is not known{did_you_mean(dtype, DTYPES)}. Known: {listing(DTYPES)}")
        return Shape(seq_len, batch, getattr(torch, dtype) if dtype else None, dynamic)

    def refuse(self, what: str, *names: str) -> None:
        """Raises BadInput if an option was given that ``what`` decides already."""
        given = {
            "--seq-len": self.seq_len,
            "--batch": self.batch,
            "--dtype": self.dtype,
            "--dynamic": self.dynamic,
        }
        refused = [name for name in names if given[name]]
        if refused:
            raise BadInput(f"{listing(refused)} cannot be given with {what}: leave it out")


@dataclass(frozen=True)
class Subject:
    """A model to work on, with example inputs; a program brings its own."""

    name: str
    model: nn.Module | ExportedProgram
    inputs: Any = None

    @property
    def program(self) -> ExportedProgram | None:
        """The program, where it is one."""
        return self.model if isinstance(self.model, ExportedProgram) else None


def resolve(text: str, shape: Shape, device: str | None = None, *, weightless: bool = False) -> Subject:
    """The model that a MODEL argument means, on ``device`` if that is here.

    Args:
        text: what was written.
        shape: of the example input.
        device: where to put it.
        weightless: shapes are enough: build it without memory for its weights, where it is built here.

    Raises:
        BadInput: there is no such model, or it cannot be had.
        ArtifactError: a .pt2 file that cannot be read.
    """
    path = Path(text)
    if path.suffix == ".pt2":
        shape.refuse("a .pt2 file, which has its inputs already", "--seq-len", "--batch", "--dtype", "--dynamic")
        program = load(path)
        made = report_of(program)
        return Subject(made.model if made else path.stem, program)
    folder = path.parent if path.name == "config.json" else path
    if (folder / "config.json").is_file():
        from kreg.cli.transformers_models import build

        return build(folder, shape, device, weightless=weightless)
    if path.is_dir():
        raise BadInput(f"the folder {text!r} has no config.json; {WAYS}")
    if path.is_file():
        raise BadInput(f"the file {text!r} is neither a config.json nor a .pt2 file; {WAYS}")
    if FUNCTION.fullmatch(text):
        shape.refuse("a function, which makes its own inputs", "--seq-len", "--batch")
        return placed(_called(text, shape), device)
    hub = " Nothing is downloaded: give a folder." if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
    raise BadInput(f"there is no model {text!r}: no such file or folder.{hub} {WAYS[0].upper()}{WAYS[1:]}")


def _called(text: str, shape: Shape) -> Subject:
    """The model and inputs that ``package.module:function`` returns."""
    module, _, path = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # importing runs foreign code, which may raise anything
        raise BadInput(f"{text!r}: module {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, [name for name in vars(found) if callable(getattr(found, name))])
            raise BadInput(f"{text!r}: {module!r} has no {path!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise BadInput(f"{text!r} is a {type(found).__name__}, not a function")
    try:
        made = found()
    except Exception as error:  # foreign code
        raise BadInput(f"{text!r} failed: {type(error).__name__}: {error}") from error
    wanted = f"{text!r} should return (model, example_inputs): an nn.Module, and a tuple or a dict of its inputs"
    if not isinstance(made, tuple) or len(made) != 2:
        raise BadInput(f"{wanted}; it returned {_described(made)}")
    model, inputs = made
    if not isinstance(model, nn.Module):
        raise BadInput(f"{wanted}; the model is {_described(model)}")
    if not isinstance(inputs, Mapping | Sequence | torch.Tensor) or isinstance(inputs, str):
        raise BadInput(f"{wanted}; the inputs are {_described(inputs)}")
    if shape.dtype is not None:
        dtype = shape.dtype
        model = model.to(dtype)
        inputs = _mapped(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    return Subject(type(model).__name__, model, inputs)


def placed(subject: Subject, device: str | None) -> Subject:
    """The model and its inputs on a device, if that is here; where they were, if not."""
    if device is None or not isinstance(subject.model, nn.Module) or not Environment.detect(device).present:
        return subject
    if device == "meta":
        return subject
    inputs = _mapped(subject.inputs, lambda t: t.to(device))
    return replace(subject, model=subject.model.to(device), inputs=inputs)


def _mapped(inputs: Any, change: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: change(v) if isinstance(v, torch.Tensor) else v, inputs)


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
