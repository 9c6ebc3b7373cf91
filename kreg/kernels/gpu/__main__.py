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
from kreg.kernels.gpu import collect, records
from kreg.kernels.gpu.build import Binary
from kreg.kernels.gpu.collect import (
    Outcome,
    Task,
    distinct,
    modules_with_builds,
    not_built,
    one_of_each,
    run_all,
    targets_of,
    tasks,
    unlike_records,
)
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
    check: Annotated[bool, typer.Option("--check", help="Hold launches against records. Compiles nothing.")] = False,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Record the builds beside the tuning tables.")] = False,
    write: Annotated[Path | None, typer.Option(help="Record, and put the table into this page.")] = None,
) -> None:
    """Compile every Triton kernel, with every configuration of its tuning table, and hold it against its target.

    The exit code is 1 if one does not compile, does not fit its target, spills without a reason in its row, takes
    something else than its record says, or if a row is built by nothing. Then nothing is recorded or written.
    """
    modules = tuple(module or modules_with_builds())
    targets = target or targets_of(modules)
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        raise typer.BadParameter(f"target {unknown[0]!r} is not known; known: {listing(TARGETS)}")
    recording = record or write is not None
    if (recording or check) and (target or kernel):
        raise typer.BadParameter("--check, --record and --write are of all builds: without --target and --kernel")
    if recording and (sample or check):
        raise typer.BadParameter("--record and --write compile all builds: without --sample and --check")
    if write is not None and module:
        raise typer.BadParameter("--write is of all modules: without --module")
    count, problems = collect.check(modules) if check else (0, [])
    if check and not sample:
        _told(problems, {"checked": count, "problems": problems}, json, f"{count} builds are recorded and fit")
        return
    outcomes = _compiled(list(tasks(modules, targets, kernel)), sample, targets, processes)
    problems += [problem for outcome in outcomes for problem in outcome.problems]
    problems += [] if kernel or sample else not_built(modules, targets)
    made = [(outcome.task.module, outcome.binary) for outcome in outcomes if outcome.binary is not None]
    if recording:
        if not problems:
            for name in modules:
                records.write(name, (binary for owner, binary in made if owner == name))
        if not problems and write is not None:
            write.write_text(written(write.read_text(encoding="utf-8"), modules, targets), encoding="utf-8")
    else:
        problems += unlike_records(outcomes)
    facts = {"checked": count, "binaries": [binary.as_dict() for _, binary in made], "problems": problems}
    _told(problems, facts, json, _grid(made, targets))


def _compiled(todo: list[Task], sample: bool, targets: Sequence[str], processes: int) -> list[Outcome]:
    errors = Console(stderr=True)
    if not todo:
        errors.print(f"nothing to compile for {listing(targets)}: no kernel of the catalogue offers builds")
        raise typer.Exit(1)
    todo = one_of_each(todo) if sample else distinct(todo)
    outcomes = []
    for outcome in run_all(todo, processes):
        outcomes.append(outcome)
        if errors.is_terminal or len(outcomes) % 25 == 0:
            errors.print(f"[dim]{len(outcomes)} of {len(todo)}: {outcome.task.kernel} {outcome.task.target}[/]")
    return outcomes


def _told(problems: Sequence[str], facts: dict[str, object], json: bool, shown: Grid | str) -> None:
    """Print, and end with the exit code."""
    if json:
        sys.stdout.write(json_.dumps(facts, indent=1) + "\n")
    elif not (problems and isinstance(shown, str)):
        Console().print(shown)
    for problem in problems:
        Console(stderr=True).print(problem, style="red", markup=False, highlight=False)
    raise typer.Exit(1 if problems else 0)


def _grid(made: Sequence[tuple[str, Binary]], targets: Sequence[str]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    for name in header(targets):
        grid.add_column(name, overflow="fold")
    grid.add_row(*limits(targets), style="dim")
    for row in rows(made, targets):
        grid.add_row(*row)
    return grid


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default, which it warns about
    try:
        typer.run(compile_all)
    except KregError as error:
        sys.exit(f"{type(error).__name__}: {error}")
