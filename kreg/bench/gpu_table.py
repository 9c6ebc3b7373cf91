"""The rows of ``kreg bench --device cuda`` as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kreg.bench.gpu import Row, Run
from kreg.rewriters.report.table import SPARE

COLUMNS = ("S", "ms", "of roofline", "bound", "TFLOP/s", "GB/s", "peak MB")


def facts(run: Run, rows: Sequence[Row], device: str) -> dict[str, Any]:
    """Everything, for programs; seconds, bytes and operations as they are."""
    return {
        "device": device,
        "dtype": str(run.dtype).removeprefix("torch."),
        "ceilings": None if run.ceilings is None else asdict(run.ceilings),
        "checks": [asdict(check) for check in run.checks],
        "rows": [row.as_dict() for row in rows],
    }


def shown(run: Run, rows: Sequence[Row], device: str) -> Iterator[RenderableType]:
    """For people: what was checked, the ceilings, a table for each kind of call, and what was skipped."""
    yield Text(f"{device}, {str(run.dtype).removeprefix('torch.')}, medians by device events")
    for check in run.checks:
        if check.failed:
            yield Text(f"{check.kernel} is WRONG and not measured: {check.failed}", "red")
        else:
            yield Text(
                f"{check.kernel}: {check.calls} calls against float64, {check.error:.2f} of the accepted error, "
                f"{check.gradient_error:.2f} in gradients"
            )
    if run.ceilings is not None:
        yield Text(
            f"ceilings measured here: matrix product {run.ceilings.flops / 1e12:,.0f} TFLOP/s, "
            f"copy {run.ceilings.bandwidth / 1e9:,.0f} GB/s"
        )
    kinds = dict.fromkeys((row.case.op, row.case.layer, row.case.step, row.case.batch) for row in rows)
    for kind in kinds:
        some = [r for r in rows if (r.case.op, r.case.layer, r.case.step, r.case.batch) == kind]
        yield _table(" ".join(str(part) for part in kind[:3]) + f", batch {kind[3]}", some)
    for row in rows:
        if row.skipped:
            yield Text(f"{row.case.label}: {row.variant}: {row.skipped}", "yellow")


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(box=SPARE, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title=title)
    table.title_justify = "left"
    table.add_column("variant")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "bound" else "right")
    for row in sorted(rows, key=lambda r: r.case.context):
        if row.seconds is None or row.reached is None:
            continue
        table.add_row(
            row.variant,
            f"{row.case.context:,}",
            f"{row.seconds * 1e3:,.3f}",
            f"{row.reached:.0%}",
            row.bound,
            f"{row.operations / row.seconds / 1e12:,.1f}",
            f"{row.moved / row.seconds / 1e9:,.0f}",
            "-" if row.peak is None else f"{row.peak / 1e6:,.0f}",
        )
    return table
