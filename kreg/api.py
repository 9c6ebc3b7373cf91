"""The public functions: rewrite, restore, report, export, lower, and analyse behind the command line."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from kreg.errors import CaptureError
from kreg.registry import catalogue as registry
from kreg.registry.environment import Environment
from kreg.registry.selection import selected, selection_from_environment
from kreg.registry.sources import Source
from kreg.rewriters import live, program
from kreg.rewriters.capture import Inputs, export_model
from kreg.rewriters.pipeline import Clock, Progress, Settings, quiet, rewrite_graph
from kreg.rewriters.report import Report
from kreg.rewriters.rules import RULES, Rule

Device = str | torch.device | None
Names = Iterable[str]


def register(thing: Rule | Source) -> None:
    """Adds to what kreg knows in this process: a kernel's spec, a YAML file of specs, an op, or a rule.

    A rule is tried before those that came earlier, so that the special can precede the general.

    Raises:
        SpecError: what is given is malformed, or clashes with what is registered. Nothing is added.
    """
    if isinstance(thing, Rule):
        if thing.op.name not in registry.catalogue().ops:
            registry.register(thing.op)
        RULES.insert(0, thing)
    else:
        registry.register(thing)


def rewrite(
    model: nn.Module,
    device: Device = None,
    example_inputs: Inputs | None = None,
    *,
    enable: Names = (),
    disable: Names = (),
    verify: bool = True,
    tune: bool = False,
) -> nn.Module:
    """Makes the model's own call run the best kernels for a device, and prints what was replaced.

    The model is the same object afterwards: same class, parameters, names and hooks. Its call runs the rewritten
    graph for the inputs that the graph covers, and its original code for all others.

    Args:
        model: any module.
        device: "cpu", "cuda", "npu" or what torch names; where the parameters are, by default.
        example_inputs: what to capture the model with: a tuple of positional inputs, a dict of keyword ones, or
            (tuple, dict). By default they are derived from the model's ``config``; a model without one is captured
            by its first call.
        enable, disable: kernels to prefer or to leave out, by name or pattern ("mindspeed.*").
        verify: run every site old against new, forward and backward, and keep the original where they differ.
        tune: measure kernels instead of estimating them. Not available yet: raises NotImplementedError.

    Returns:
        The model.

    Raises:
        SelectionError: an unknown device or kernel, or kernels that exclude each other.
        CaptureError: the model does not run on the example inputs.
    """
    if tune:
        raise NotImplementedError("tune=True is not available yet; kernels are chosen by their declared cost")
    settings = settings_for(device, model, enable=enable, disable=disable, verify=verify)
    live.attach(model, settings, example_inputs)
    if live.attached(model).account.variants:
        report(model).print()
    return model


def report(model: nn.Module) -> Report:
    """The account of a rewritten model: sites, near misses, and how its calls were answered so far.

    Raises:
        ValueError: the model was not rewritten.
    """
    return live.attached(model).account.report()


def restore(model: nn.Module) -> nn.Module:
    """Undoes `rewrite` wholly; a model that was not rewritten is left as it is."""
    live.detach(model)
    return model


def export(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    dynamic_shapes: Any = None,
    device: Device = None,
    portable: bool = False,
    enable: Names = (),
    disable: Names = (),
    verify: bool = True,
    progress: Progress = quiet,
) -> ExportedProgram:
    """An ordinary ExportedProgram of the rewritten model, which loads with ``import kreg`` alone.

    Args:
        model: any module; left as it is.
        example_inputs: a tuple of positional inputs, a dict of keyword ones, or (tuple, dict).
        dynamic_shapes: as for ``torch.export.export``; "auto" makes batch and sequence dynamic where the model
            allows.
        device: as for `rewrite`.
        portable: keep op nodes without kernels; `lower` chooses them where the program will run.
        enable, disable, verify: as for `rewrite`.
        progress: called with a short sentence as each step starts.

    Raises:
        CaptureError: the model could not be exported: the exporter's reason, and the module.
        SelectionError: as for `rewrite`.
    """
    settings = settings_for(
        device, model, enable=enable, disable=disable, verify=verify, portable=portable, progress=progress
    )
    captured, clock = _captured(model, example_inputs, dynamic_shapes, progress)
    return _rewritten(captured, settings, type(model).__name__, clock)


def lower(
    exported: ExportedProgram,
    device: Device,
    *,
    enable: Names = (),
    disable: Names = (),
    verify: bool = True,
    progress: Progress = quiet,
) -> ExportedProgram:
    """A portable program with the kernels for a device, and on that device if it is here.

    The given program is left as it is.

    A program that holds no ops yet, exported without kreg, is raised first.

    Raises:
        ArtifactError: a newer kreg made the program.
        SelectionError: as for `rewrite`.
    """
    settings = settings_for(device, None, enable=enable, disable=disable, verify=verify, progress=progress)
    before = program.report_of(exported)
    name = before.model if before is not None else "ExportedProgram"
    clock = Clock()
    with clock.stage("capture"):
        if settings.environment.present:
            exported = program.placed(exported, torch.device(device or settings.environment.device))
        functional = program.functional(exported)
    return _rewritten(functional, settings, name, clock)


def analyse(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None,
    *,
    device: Device = None,
    dynamic_shapes: Any = None,
    enable: Names = (),
    disable: Names = (),
    verify: bool = True,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> Report:
    """The report that a rewrite would give; nothing is replaced.

    A model of fake tensors (``torch._subclasses.FakeTensorMode``) is analysed layer by layer in a dry run, as a live
    model is captured, so that depth costs nothing; every other one as a whole, as `export` captures it.

    Args:
        dry_run: plan as if the device and all packages were there, from the specs alone; run nothing.

    Raises:
        CaptureError, SelectionError, ArtifactError: as for `export` and `lower`.
    """
    owner = model if isinstance(model, nn.Module) else None
    settings = settings_for(
        device, owner, enable=enable, disable=disable, verify=verify, dry_run=dry_run, progress=progress
    )
    if isinstance(model, ExportedProgram):
        clock = Clock()
        with clock.stage("capture"):
            captured = program.functional(model)
        name = "ExportedProgram"
    else:
        inputs = _derived(model) if example_inputs is None else example_inputs
        mode = next((p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor)), None)
        if dry_run and mode is not None and dynamic_shapes in (None, "auto"):
            return live.analysed(model, settings, inputs, mode, dynamic=dynamic_shapes == "auto")
        captured, clock = _captured(model, inputs, dynamic_shapes, progress)
        name = type(model).__name__
    done = rewrite_graph(captured.module, settings, model=name, frontend="export", clock=clock)
    return done.report


def _derived(model: nn.Module) -> dict[str, Any]:
    """Derived inputs for an export: a program has no place for a cache object."""
    derived = live.example_inputs_for(model)
    if derived is None:
        raise CaptureError(
            f"no example inputs can be derived for {type(model).__name__}: it has no config with a vocab_size. "
            f"Pass them: example_inputs=(tensor, ...) or a dict of keyword inputs"
        )
    without_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return derived[1] | without_cache


def program_report(exported: ExportedProgram) -> Report | None:
    """The report of the rewrite that made a program; None if kreg did not make it."""
    return program.report_of(exported)


def settings_for(
    device: Device,
    model: nn.Module | None,
    *,
    enable: Names = (),
    disable: Names = (),
    verify: bool = True,
    portable: bool = False,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> Settings:
    """What was asked, with the device found and the environment's KREG_ENABLE and KREG_DISABLE taken in."""
    if device is None and model is not None:
        tensors = (*model.parameters(), *model.buffers())
        device = next((t.device for t in tensors), torch.device("cpu"))
        device = None if device.type == "meta" else device
    environment = Environment.supposed(device or "cpu") if dry_run else Environment.detect(device)
    enabled, disabled = selection_from_environment(enable, disable)
    selected(registry.catalogue(), enabled, disabled)  # what cannot hold is told now, not where a layer is captured
    return Settings(environment, enabled, disabled, verify, portable, dry_run, progress)


def _captured(
    model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any, progress: Progress
) -> tuple[program.Functional, Clock]:
    clock = Clock()
    with clock.stage("capture"):
        progress(f"exporting {type(model).__name__}")
        exported = export_model(model, example_inputs, dynamic_shapes)
        progress("making the graph functional")
        return program.functional(exported), clock


def _rewritten(captured: program.Functional, settings: Settings, name: str, clock: Clock) -> ExportedProgram:
    done = rewrite_graph(captured.module, settings, model=name, frontend="export", clock=clock)
    return program.finished(captured, done.module, done.report)
