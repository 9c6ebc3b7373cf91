"""The model as a strip: a column for each layer, a lane for each op, a mark for each site and near miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kreg.rewriters.report import drawing, wording
from kreg.rewriters.report.fold import split_layer
from kreg.rewriters.report.model import Report, SiteReport

LABELS = 32
"""So many columns are numbered one by one; of more, only some."""


@dataclass(frozen=True)
class Mark:
    """A site, or a near miss, in the strip."""

    status: str
    href: str
    title: str
    icon: str


@dataclass(frozen=True)
class Cell:
    """The marks of one op in one layer; ``column`` counts from 1."""

    column: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Lane:
    """One op through the model."""

    op: str
    hue: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Span:
    """A run of columns with one name: a stack of layers."""

    name: str
    column: int
    width: int


@dataclass(frozen=True)
class Strip:
    """The whole model from its first site to its last.

    Attributes:
        columns: how many there are.
        spans: the stacks of layers, by name.
        labels: (column, layer's number) of the columns that get one.
        lanes: the ops.
        icons: the pictures of masks that marks refer to, by id.
    """

    columns: int
    spans: tuple[Span, ...]
    labels: tuple[tuple[int, str], ...]
    lanes: tuple[Lane, ...]
    icons: tuple[tuple[str, Markup], ...]


Place = tuple[str, int]
"""A stack of layers and a layer's number; -1 for what is in no layer."""


def strip_of(report: Report, hues: Mapping[str, int], anchors: Sequence[str], statuses: Sequence[str]) -> Strip:
    """Lays the sites of a report out; ``anchors`` and ``statuses`` go with its sites."""
    columns = _columns([s.module for s in report.sites] + [m.module for m in report.near_misses])
    icons: dict[str, tuple[str, Markup]] = {}
    marks: dict[str, dict[int, list[Mark]]] = {op: {} for op in hues}
    for site, anchor, status in zip(report.sites, anchors, statuses, strict=True):
        kind = str(site.mask.get("kind")) if site.mask else ""
        icons.setdefault(kind, (f"mask-{len(icons)}", drawing.icon(site.mask)))
        mark = Mark(status, f"#{anchor}", _title(site, status), icons[kind][0])
        marks[site.op].setdefault(columns[_place(site.module)], []).append(mark)
    for miss in report.near_misses:
        title = f"near miss: {wording.module(miss.module)}, {miss.op} at {miss.node}: {miss.reason}"
        marks[miss.op].setdefault(columns[_place(miss.module)], []).append(Mark("miss", "#near-misses", title, ""))
    lanes = [
        Lane(op, hues[op], tuple(Cell(column, tuple(found)) for column, found in sorted(cells.items())))
        for op, cells in marks.items()
    ]
    return Strip(len(columns), _spans(columns), _labels(columns), tuple(lanes), tuple(icons.values()))


def _title(site: SiteReport, status: str) -> str:
    by = f" by {site.kernel}" if site.kernel else ""
    mask = f", {wording.mask(site.mask)}" if site.mask else ""
    return f"{wording.module(site.module)}: {site.op}{mask}; {status}{by}"


def _place(module: str) -> Place:
    stack, number, _ = split_layer(module)
    return (stack, number) if number is not None else (module, -1)


def _columns(modules: Sequence[str]) -> dict[Place, int]:
    """Columns from 1 on: stacks in the order of their first site, layers by number."""
    places = list(dict.fromkeys(map(_place, modules)))
    stacks = list(dict.fromkeys(stack for stack, _ in places))
    ordered = sorted(places, key=lambda place: (stacks.index(place[0]), place[1]))
    return {place: column for column, place in enumerate(ordered, 1)}


def _spans(columns: Mapping[Place, int]) -> tuple[Span, ...]:
    widths: dict[str, list[int]] = {}
    for (stack, _), column in columns.items():
        widths.setdefault(stack, []).append(column)
    return tuple(Span(wording.module(stack), min(c), len(c)) for stack, c in widths.items())


def _labels(columns: Mapping[Place, int]) -> tuple[tuple[int, str], ...]:
    step = 1 if len(columns) <= LABELS else 2 if len(columns) <= 2 * LABELS else 5
    return tuple((column, str(n)) for (_, n), column in columns.items() if n >= 0 and n % step == 0)
