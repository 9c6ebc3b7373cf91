"""``kreg rewrite``: a model in; a report, and if asked a rewritten program, out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kreg.cli import options
from kreg.cli.models import Shape, Subject, resolve
from kreg.cli.output import BadInput, Output, code_of, running
from kreg.registry.catalogue import catalogue
from kreg.registry.environment import Environment
from kreg.registry.selection import selected, selection_from_environment
from kreg.registry.wording import listing
from kreg.rewriters.report import Report

REPORTS = (".json", ".html")


def rewrite(
    model: options.Model,
    device: options.Device = None,
    seq_len: options.SeqLen = None,
    batch: options.Batch = None,
    dtype: options.Dtype = None,
    dynamic: options.Dynamic = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="PATH", help="Save the rewritten program as a .pt2 file."),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option("--report", metavar="PATH", help="Save the report, as .json or .html. Repeatable."),
    ] = None,
    dry_run: options.DryRun = False,
    enable: options.Enable = None,
    disable: options.Disable = None,
    no_verify: options.NoVerify = False,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="With --export: leave the kernels open, for kreg rewrite elsewhere."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Find what can be replaced in a model, give each site the best kernel, verify, and report.

    Without --export nothing is kept but the report.

    Exits with 3 if nothing was replaced, with 1 if a site failed verification.
    """
    with running(json) as output:
        _check(export, report or [], dry_run, portable)
        wish = Wish.of(device, dynamic, enable, disable, not no_verify, dry_run)
        output.progress(f"loading {model}")
        subject = resolve(model, Shape.of(seq_len, batch, dtype, dynamic), device, weightless=dry_run)
        if portable and subject.program is not None:
            raise BadInput("--portable is for models: a .pt2 file is lowered, to the kernels of --device")
        found = (
            analysed(subject, wish, output) if export is None else _exported(subject, wish, output, export, portable)
        )
        _save(found, report or [])
        output.report(found)
        for path in (*([export] if export else []), *(report or [])):
            output.note(f"saved {path}")
        output.end(code_of(found))


@dataclass(frozen=True)
class Wish:
    """What was asked of a rewrite, for whichever model."""

    device: str | None
    dynamic: bool = False
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    verify: bool = True
    dry_run: bool = False

    @staticmethod
    def of(
        device: str | None,
        dynamic: bool,
        enable: list[str] | None,
        disable: list[str] | None,
        verify: bool = True,
        dry_run: bool = False,
    ) -> Wish:
        """From the command line, checked before any work is done.

        Raises:
            SelectionError: an unknown device or kernel, or kernels that exclude each other.
        """
        wish = Wish(device, dynamic, _names(enable), _names(disable), verify, dry_run)
        if device is not None:
            Environment.supposed(device) if dry_run else Environment.detect(device)
        selected(catalogue(), *selection_from_environment(wish.enable, wish.disable))
        return wish

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that all of kreg's functions take."""
        return {"device": self.device, "enable": self.enable, "disable": self.disable, "verify": self.verify}

    @property
    def shapes(self) -> dict[str, Any]:
        """The argument that the functions which capture take."""
        return {"dynamic_shapes": "auto" if self.dynamic else None}


def _names(names: list[str] | None) -> tuple[str, ...]:
    """A repeatable option; each may hold several names, separated by commas."""
    return tuple(part.strip() for name in names or [] for part in name.split(",") if part.strip())


def analysed(subject: Subject, wish: Wish, output: Output) -> Report:
    """The report that a rewrite of a subject would give."""
    import kreg

    with output.capturing():
        found = kreg.analyse(
            subject.model,
            subject.inputs,
            dry_run=wish.dry_run,
            progress=output.progress,
            **wish.common,
            **wish.shapes,
        )
    return found.model_copy(update={"model": subject.name})


def _exported(subject: Subject, wish: Wish, output: Output, path: Path, portable: bool) -> Report:
    """Saves the rewritten program; its report."""
    import kreg

    progress = output.progress
    with output.capturing():
        if isinstance(subject.model, torch.export.ExportedProgram):
            program = kreg.lower(subject.model, progress=progress, **wish.common)
        else:
            program = kreg.export(
                subject.model,
                subject.inputs,
                portable=portable,
                progress=progress,
                **wish.common,
                **wish.shapes,
            )
    progress(f"saving {path}")
    torch.export.save(program, path)
    found = kreg.program_report(program)
    if found is None:  # a program without ops carries no report
        return analysed(subject, wish, output)
    return found.model_copy(update={"model": subject.name})


def _check(export: Path | None, reports: list[Path], dry_run: bool, portable: bool) -> None:
    """Raises BadInput for what would fail only after the work is done."""
    if export is not None and dry_run:
        raise BadInput("--export and --dry-run exclude each other: a dry run replaces nothing that could be saved")
    if portable and export is None:
        raise BadInput("--portable says how to export: give --export PATH too")
    if export is not None and export.suffix != ".pt2":
        raise BadInput(f"--export {str(export)!r} should end in .pt2")
    for path in reports:
        if path.suffix not in REPORTS:
            raise BadInput(f"--report {str(path)!r} should end in {listing(REPORTS).replace(', ', ' or ')}")
    for path in (*reports, *([export] if export else [])):
        if not path.parent.is_dir():
            raise BadInput(f"there is no folder {str(path.parent)!r} for {path.name!r}")


def _save(report: Report, paths: list[Path]) -> None:
    for path in paths:
        text = report.to_html() if path.suffix == ".html" else report.to_json()
        path.write_text(f"{text}\n", encoding="utf-8")
