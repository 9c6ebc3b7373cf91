"""``kreg list`` and ``kreg show``: what there is to choose from, and why a kernel cannot be used here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kreg.cli.options import Json
from kreg.cli.output import BadInput, running
from kreg.errors import SelectionError
from kreg.registry.catalogue import Catalogue, catalogue
from kreg.registry.environment import Environment, availability
from kreg.registry.ops.to_come import OPS_TO_COME
from kreg.registry.spec import KernelSpec
from kreg.registry.wording import listing
from kreg.rewriters.report.table import GAP, SPARE

SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Dtypes in a narrow column."""

COMMAND = ": pip install "
"""Between a reason and the command that does away with it."""

WIDE = 100
"""From this width on, the provider (the kernel's name up to the dot) and the exclusions have columns."""

DTYPES = 8
"""Least width of the dtypes: two of them."""


def reasons_of(spec: KernelSpec, device: str | None = None) -> list[str]:
    """Why a kernel cannot be used here, on ``device`` or on any of its own; none where it can."""
    reasons: list[str] = []
    for kind in (device,) if device else spec.devices:
        found = availability(spec, Environment.detect(kind))
        if not found:
            return []
        reasons.extend(reason for reason in found if reason not in reasons)
    return reasons


def list_kernels(
    op: Annotated[str | None, typer.Option("--op", help="Kernels of one op only.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Kernels for one device only, and what they ask for.")
    ] = None,
    available: Annotated[
        bool | None,
        typer.Option(
            "--available/--unavailable",
            help="Only those that can, or cannot, be used here.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List ops and their kernels: devices, dtypes, training, exclusions, and what can be used here."""
    with running(json) as output:
        known = catalogue()
        if op is not None:
            known.summary(op)
        kind = None if device is None else Environment.detect(device).device
        rows = [
            (spec, reasons)
            for name in (*known.ops, *OPS_TO_COME)
            if op in (None, name)
            for spec in known.kernels_for(name)
            if kind is None or kind in spec.devices
            for reasons in (reasons_of(spec, device),)
            if available is None or available is not bool(reasons)
        ]
        facts = {
            "kernels": [facts_of(known, spec, reasons) for spec, reasons in rows],
            "problems": [*known.problems],
        }
        output.result(facts, *_listed(known, rows, output.width, asked=kind is not None))


def show(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="As kreg list writes it.")],
    json: Json = False,
) -> None:
    """Show everything that is declared about a kernel, and whether it can be used here."""
    with running(json) as output:
        known = catalogue()
        try:
            spec = known.kernel(kernel)
        except SelectionError as error:
            if kernel in known.ops or kernel in OPS_TO_COME:
                raise BadInput(
                    f"{kernel!r} is an op, not a kernel: kreg list --op {kernel} lists its kernels"
                ) from None
            raise error
        reasons = reasons_of(spec)
        output.result(facts_of(known, spec, reasons), *_shown(known, spec, reasons))


def facts_of(known: Catalogue, spec: KernelSpec, reasons: list[str]) -> dict[str, Any]:
    """A kernel as JSON: its spec, all that it excludes, where it is declared, if it can be used here."""
    facts = spec.model_dump(mode="json")
    excludes = sorted(known.excluded_by(spec.name))
    return facts | {
        "excluded_kernels": excludes,
        "declared_in": known.where(spec.name),
        "available": not reasons,
        "reasons": reasons,
    }


def _listed(
    known: Catalogue, rows: list[tuple[KernelSpec, list[str]]], width: int, asked: bool
) -> Iterator[RenderableType]:
    if not rows:
        yield Text("No kernel matches.", style="yellow")
    wide = width >= WIDE
    numbers = {reason: i for i, reason in enumerate(dict.fromkeys(r for _, why in rows for r in why), start=1)}
    for op in dict.fromkeys(spec.op for spec, _ in rows):
        to_come = "  op to come" if op in OPS_TO_COME else ""
        yield Text.assemble((op, "bold cyan"), (to_come, "dim"), "  ", (known.summary(op), "dim"))
        chosen = [(spec, [numbers[reason] for reason in why]) for spec, why in rows if spec.op == op]
        yield Padding(_table(known, chosen, wide), (0, 0, 0, 2))
        for spec, _ in chosen:
            excluded = sorted(known.excluded_by(spec.name))
            if excluded and not wide:
                yield Padding(Text(f"{spec.name} excludes {listing(excluded)}"), (0, 0, 0, 2))
        if asked:
            yield Padding(_asks([spec for spec, _ in chosen]), (1, 0, 0, 2))
        yield Text("")
    if numbers:
        yield Text.assemble(("Why not", "bold"), ("  kreg show KERNEL has all that it asks for", "dim"))
        yield Padding(_legend(numbers, rows), (0, 0, 0, 2))
    for problem in known.problems:
        yield Text.assemble(("Left out: ", "yellow"), problem)


def _table(known: Catalogue, rows: list[tuple[KernelSpec, list[int]]], wide: bool) -> Table:
    table = Table(box=SPARE, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="dim")
    for title in (
        "kernel",
        *(["provider"] if wide else []),
        "device",
        "dtypes",
        "trains",
        *(["excludes"] if wide else []),
        "available",
    ):
        table.add_column(title, no_wrap=title != "dtypes", min_width=DTYPES if title == "dtypes" else None)
    for spec, why in rows:
        table.add_row(
            Text(spec.name, style="dim" if why else "green"),
            *([spec.provider] if wide else []),
            " ".join(spec.devices),
            " ".join(SHORT.get(name, name) for name in spec.dtypes),
            "yes" if spec.trains else "no",
            *([" ".join(sorted(known.excluded_by(spec.name))) or "-"] if wide else []),
            Text(f"no {' '.join(map(str, why))}", style="yellow") if why else Text("yes", style="green"),
        )
    return table


def _asks(specs: list[KernelSpec]) -> Table:
    """The architectures and constraints of each kernel."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for spec in specs:
        conditions = Text("; ".join(spec.constraints) or _without_constraints(spec, "any sizes"), style="dim")
        table.add_row(spec.name, Text.assemble(listing(spec.architectures, "any architecture"), ": ", conditions))
    return table


def _without_constraints(spec: KernelSpec, otherwise: str) -> str:
    return "not declared: no contract names its sizes yet" if spec.op in OPS_TO_COME else otherwise


def _legend(numbers: dict[str, int], rows: list[tuple[KernelSpec, list[str]]]) -> Table:
    """Each reason once, as the tables number it, with its command in a line of its own and those it holds for."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="yellow", justify="right")
    table.add_column(overflow="fold")
    for reason, number in numbers.items():
        count = sum(reason in why for _, why in rows)
        table.add_row(str(number), Group(*_told(reason, f"  ({count} of {len(rows)})")))
    return table


def _told(reason: str, after: str = "", indent: str = "") -> Iterator[Text]:
    """A reason, and under it the command that does away with it, to be copied."""
    sentence, _, package = reason.partition(COMMAND)
    yield Text.assemble(sentence, (after, "dim"))
    if package:
        yield Text(f"{indent}pip install {package}", style="cyan", overflow="fold")


def _shown(known: Catalogue, spec: KernelSpec, reasons: list[str]) -> Iterator[RenderableType]:
    yield Text.assemble((spec.name, "bold green"), "  ", spec.summary)
    cost = f"{spec.cost.efficiency:.0%} of the device's peak, {spec.cost.overhead_us:g} us a call"
    facts: list[tuple[str, RenderableType]] = [
        ("op", Group(Text(spec.op, style="cyan"), Text(known.summary(spec.op), style="dim"))),
        ("provider", spec.provider),
        ("devices", listing(spec.devices)),
        ("architectures", listing(spec.architectures, "any")),
        ("dtypes", listing(spec.dtypes)),
        ("constraints", Text("\n".join(spec.constraints) or _without_constraints(spec, "none"))),
        ("trains", "yes" if spec.trains else "no"),
        ("deterministic", "yes" if spec.deterministic else "no"),
        ("requires", Text("\n".join(spec.requires) or "nothing")),
        *([("modules", Text("\n".join(spec.modules)))] if spec.modules else []),
        ("excludes", listing(sorted(known.excluded_by(spec.name)), "nothing")),
        ("tags", listing(spec.tags)),
        ("declared cost", cost),
        ("entry", Text("\n".join(e for e in (spec.entry, spec.backward) if e))),
        ("source", Text(spec.source or "not given")),
        ("declared in", Text(known.where(spec.name))),
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    table.add_row("available", Text("no, because", style="yellow") if reasons else Text("yes", style="green"))
    yield Padding(table, (0, 0, 0, 2))
    for reason in reasons:  # below the table, so that a command fits a line
        yield Padding(Group(*_told(f"- {reason}", indent="  ")), (0, 0, 0, 4))
