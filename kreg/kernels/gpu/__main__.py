"""``python -m kreg.kernels.gpu``: compile every Triton kernel for every target, without a GPU."""

from __future__ import annotations

import json as json_
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as Grid

from kreg.errors import KregError
from kreg.kernels.gpu.collect import Outcome, modules_with_builds, not_built, one_of_each, run_all, targets_of, tasks
from kreg.kernels.gpu.page import header, limits, rows, written
from kreg.kernels.gpu.targets import COMPILED, TARGETS
from kreg.registry.wording import listing


def compile_all(
    target: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable. Default: {listing(COMPILED)}, and all that have rows.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="Only those with this in their function's or module's name.")] = "",
    module: Annotated[list[str] | None, typer.Option(help="Modules with builds. Default: the catalogue's.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="One build for each kernel function.")] = False,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    write: Annotated[Path | None, typer.Option(help="Put the table between its markers in this page.")] = None,
) -> None:
    """Compile every Triton kernel, with every configuration of its tuning table, and hold it against its target.

    The exit code is 1 if one does not compile, does not fit its target, spills without a reason in its row, or if a
    row is built by nothing.
    """
    modules = tuple(module or modules_with_builds())
    targets = target or targets_of(modules)
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        raise typer.BadParameter(f"target {unknown[0]!r} is not known; known: {listing(TARGETS)}")
    errors = Console(stderr=True)
    todo = list(tasks(modules, targets, kernel))
    if sample:
        todo = one_of_each(todo)
    if not todo:
        errors.print(f"nothing to compile for {listing(targets)}: no kernel of the catalogue offers builds")
        raise typer.Exit(1)
    outcomes = []
    for outcome in run_all(todo, processes):
        outcomes.append(outcome)
        if errors.is_terminal or len(outcomes) % 25 == 0:
            errors.print(f"[dim]{len(outcomes)} of {len(todo)}: {outcome.task.kernel} {outcome.task.target}[/]")
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    problems += [] if kernel else not_built(modules, targets)
    if json:
        sys.stdout.write(json_.dumps({"binaries": _binaries(outcomes), "problems": problems}, indent=1) + "\n")
    else:
        Console().print(_grid(outcomes, targets))
    for problem in problems:
        errors.print(problem, style="red", markup=False, highlight=False)
    if write is not None:
        write.write_text(written(write.read_text(encoding="utf-8"), outcomes, targets), encoding="utf-8")
    raise typer.Exit(1 if problems else 0)


def _binaries(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    return [outcome.binary.as_dict() for outcome in outcomes if outcome.binary is not None]


def _grid(outcomes: Sequence[Outcome], targets: Sequence[str]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    for name in header(targets):
        grid.add_column(name, overflow="fold")
    grid.add_row(*limits(targets), style="dim")
    for row in rows(outcomes, targets):
        grid.add_row(*row)
    return grid


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default, which it warns about
    try:
        typer.run(compile_all)
    except KregError as error:
        sys.exit(f"{type(error).__name__}: {error}")
