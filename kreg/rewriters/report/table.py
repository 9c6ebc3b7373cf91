"""The report in the terminal: a headline, a row for each kind of site, and what was not taken, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kreg.rewriters.report import wording
from kreg.rewriters.report.fold import Fold, fold_near_misses, fold_sites
from kreg.rewriters.report.model import Report, SiteReport

WIDE = 150
"""From this width on, op and mask have columns of their own; below, they stand under module and kernel."""

ERROR = 9
"""Width of an error with its mark: ``✗ 3.1e-02``."""

MASK = 24
"""Width of a mask; longer ones wrap."""

GAP = 2
"""Spaces between columns."""

SPARE = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
"""A rule under the titles, and nothing else."""

PARTS = re.compile(r"\.?(?:\{[^}]*\}|[^.])+")
"""The parts of a module path, each with the dot before it; ``{2,4,..,38}`` is one."""


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report for people.

    Args:
        report: what to print.
        console: where to; standard output if not given.
    """
    console = console or Console()
    console.print(Group(*_parts(report, console.width)))


def _parts(report: Report, width: int) -> Iterator[RenderableType]:
    yield _headline(report)
    folds = fold_sites(report.sites)
    if folds:
        yield _table(folds, width)
    yield from _choices(report)
    yield from _unused(report)
    yield from _near_misses(report)
    yield from _calls(report)


def _headline(report: Report) -> RenderableType:
    done = sum(site.status == "replaced" for site in report.sites)
    style = "green" if done and done == len(report.sites) else "yellow" if done or report.near_misses else "dim"
    text = Text.assemble(
        (report.model, "bold"),
        " on ",
        (report.device, "bold"),
        ": ",
        (wording.headline(report), f"bold {style}"),
    )
    times = [(name, t) for name, t in wording.stage_times(report.seconds) if t >= 0.0005]
    folded = sum(site.nodes_replaced for site in report.sites if site.status == "replaced")
    facts = f"{wording.plural(report.nodes, 'node')} captured by {report.frontend}"
    if folded:
        facts += f", {folded:,} of them folded into {wording.plural(done, 'op')}"
    lines = [text, Text(facts, style="dim")]
    if times:
        total = wording.seconds(sum(t for _, t in times))
        parts = ", ".join(f"{name} {wording.seconds(t)}" for name, t in times)
        lines.append(Text(f"{total}: {parts}", style="dim"))
    if report.dry_run:
        lines.append(Text("dry run: planned from the specs alone, nothing was replaced", style="cyan"))
    return Group(*lines)


def _table(folds: list[Fold[SiteReport]], width: int) -> Table:
    wide = width >= WIDE
    columns = _columns(folds, width)
    table = Table(box=SPARE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, leading=0 if wide else 1)
    for title, size in columns.items():
        table.add_column(title, width=size, overflow="fold", header_style="dim")
    for fold in folds:
        module, op, kernel, mask, errors, why = _cells(fold, next(iter(columns.values())))
        if wide:
            table.add_row(module, op, kernel, mask, errors, why)
        else:
            table.add_row(Group(module, op), Group(kernel, mask), errors, why)
    return table


def _columns(folds: list[Fold[SiteReport]], width: int) -> dict[str, int]:
    """Titles and widths: kernels whole, errors as they are, and what is left to the module and the reason."""
    kernels = max(cell_len(_kernel(fold.first).plain) for fold in folds)
    kernel = min(2 * width // 5, max(kernels, MASK if width < WIDE else 0))
    if width >= WIDE:
        op = max(len(fold.first.op) for fold in folds)
        left = width - op - kernel - MASK - ERROR - 5 * GAP
        return {
            "module": left // 2,
            "op": op,
            "kernel": kernel,
            "mask": MASK,
            "error": ERROR,
            "why": left - left // 2,
        }
    left = width - kernel - ERROR - 3 * GAP
    module = max(left // 2, 18)
    return {"module\nop": module, "kernel\nmask": kernel, "error\ngrad": ERROR, "why": left - module}


def _cells(fold: Fold[SiteReport], width: int) -> tuple[Text, Text, Text, Text, Text, Text]:
    site = fold.first
    module = Text(_at_dots(wording.module(fold.module), width))
    if fold.count > 1:
        module.append(f" ×{fold.count}", style="bold")
    mask = Text(wording.mask(site.mask), style="dim" if site.mask is None else "")
    return module, Text(site.op, style="cyan"), _kernel(site), mask, _errors(fold.members), Text(site.reason)


def _kernel(site: SiteReport) -> Text:
    if site.status == "replaced":
        return Text(site.kernel or "open", style="green")
    return Text(f"{site.kernel} (kept)" if site.kernel else "original code", style="yellow")


def _at_dots(path: str, width: int) -> str:
    """A module path broken before a dot wherever it would not fit."""
    lines = [""]
    for part in PARTS.findall(path):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _errors(sites: tuple[SiteReport, ...]) -> Text:
    forward, backward = wording.worst(sites)
    if forward is None:
        return Text("not run", style="dim")
    failed = any(site.verify and not site.verify.passed for site in sites)
    style = "bold red" if failed else ""
    text = Text(f"{'✗ ' if failed else ''}{wording.error(forward)}", style=style)
    return text if backward is None else text.append(f"\n{'✗ ' if failed else ''}{wording.error(backward)}")


def _choices(report: Report) -> Iterator[RenderableType]:
    """Kernels made for this device that some site did not get."""
    rejected: dict[tuple[str, str], int] = {}
    for site in report.sites:
        for other in wording.worth_knowing(site, report.device):
            rejected[other.kernel, other.rejected] = rejected.get((other.kernel, other.rejected), 0) + 1
    if not rejected:
        return
    yield Text("\nNot taken", style="bold")
    for (kernel, reason), count in rejected.items():
        yield _item(Text.assemble((kernel, "green"), f" ×{count}" if count > 1 else "", f": {reason}"))


def _near_misses(report: Report) -> Iterator[RenderableType]:
    folds = fold_near_misses(report.near_misses)
    if not folds:
        return
    yield Text("\nNear misses", style="bold")
    for fold in folds:
        count = f" ×{fold.count}" if fold.count > 1 else ""
        where = wording.module(fold.module) + count
        yield _item(
            Text.assemble(
                where,
                (f" {fold.first.op}", "cyan"),
                (f" at {fold.first.node}", "dim"),
                f": {fold.first.reason}",
            )
        )


def _unused(report: Report) -> Iterator[RenderableType]:
    if report.unused:
        yield Text("\nEnabled, and used at no site", style="bold")
        for kernel, why in report.unused.items():
            yield _item(Text.assemble((kernel, "cyan"), f": {why}"))


def _calls(report: Report) -> Iterator[RenderableType]:
    calls = report.calls
    if not (calls.rewritten or calls.original or calls.fallbacks):
        return
    yield Text.assemble(
        ("\nCalls", "bold"), f"  {calls.rewritten:,} rewritten, {calls.original:,} by the original code"
    )
    for reason, count in calls.fallbacks.items():
        yield _item(Text(f"{reason}: {count:,} by the reference"))


def _item(text: Text) -> RenderableType:
    return Padding(text, (0, 0, 0, 2))
