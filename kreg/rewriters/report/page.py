"""The report as one HTML page: no script or font or picture from elsewhere, made to be looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kreg.rewriters.report import drawing, wording
from kreg.rewriters.report.errors import ErrorAxis, error_axis
from kreg.rewriters.report.fold import Fold, fold_near_misses, fold_sites, split_layer
from kreg.rewriters.report.lines import Line, line_of
from kreg.rewriters.report.model import Alternative, Report, SiteReport
from kreg.rewriters.report.strip import Strip, strip_of

HUES = 8
"""Colours for ops; a ninth op shares the first one's."""


@dataclass(frozen=True)
class OpRow:
    """One op in the overview, with a mark for each of its sites."""

    name: str
    hue: int
    marks: tuple[str, ...]
    replaced: int
    kernels: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Stage:
    """A stage of the rewrite, and its share of the time."""

    name: str
    time: str
    percent: float


@dataclass(frozen=True)
class Member:
    """One site of a card; ``anchor`` is where the strip's mark leads."""

    anchor: str
    layer: str
    site: SiteReport


@dataclass(frozen=True)
class Card:
    """Everything about sites that are equal but for their layer."""

    title: str
    site: SiteReport
    hue: int
    status: str
    members: tuple[Member, ...]
    caption: str
    picture: Markup
    dims: tuple[tuple[str, str], ...]
    errors: ErrorAxis | None
    choices: tuple[Alternative, ...]
    elsewhere: tuple[Alternative, ...]
    before: tuple[Line, ...]
    after: tuple[Line, ...]


def render(report: Report) -> str:
    """The report as one self-contained HTML page."""
    hues = {op: index % HUES for index, op in enumerate(_ops(report))}
    anchors = [f"site-{number}" for number in range(1, len(report.sites) + 1)]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            title=f"{report.model} on {report.device}",
            headline=wording.headline(report),
            replaced=sum(site.status == "replaced" for site in report.sites),
            folded=sum(site.nodes_replaced for site in report.sites if site.status == "replaced"),
            worst=wording.worst(tuple(site for site in report.sites if site.status == "replaced")),
            kept=any(status_of(site) == "kept" for site in report.sites),
            failed=sum(site.verify is not None and not site.verify.passed for site in report.sites),
            total=wording.seconds(sum(time for _, time in wording.stage_times(report.seconds))),
            stages=_stages(report),
            ops=[_op_row(report, op, hue) for op, hue in hues.items()],
            hues=hues,
            icon_size=drawing.ICON,
            strip=_strip(report, hues, anchors),
            cards=_cards(report, hues, anchors),
            misses=fold_near_misses(report.near_misses),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kreg.rewriters.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"error": wording.error, "module": wording.module, "size": wording.size}
    environment.globals |= {"plural": wording.plural}
    return environment


def _ops(report: Report) -> list[str]:
    return list(dict.fromkeys([s.op for s in report.sites] + [m.op for m in report.near_misses]))


def _stages(report: Report) -> list[Stage]:
    times = wording.stage_times(report.seconds)
    total = sum(time for _, time in times) or 1.0
    return [Stage(name, wording.seconds(time), 100 * time / total) for name, time in times if time > 0]


def status_of(site: SiteReport) -> str:
    """``replaced``, ``kept``, or ``failed`` where it is kept because verification failed."""
    return "failed" if site.verify and not site.verify.passed else site.status


def _op_row(report: Report, op: str, hue: int) -> OpRow:
    sites = [site for site in report.sites if site.op == op]
    kernels = Counter(site.kernel or "open" for site in sites if site.status == "replaced")
    marks = sorted((status_of(site) for site in sites), key=("replaced", "kept", "failed").index)
    replaced = sum(site.status == "replaced" for site in sites)
    return OpRow(op, hue, tuple(marks), replaced, tuple(kernels.most_common()))


def _strip(report: Report, hues: dict[str, int], anchors: Sequence[str]) -> Strip:
    statuses = [status_of(site) for site in report.sites]
    return strip_of(report, hues, anchors, statuses)


def _cards(report: Report, hues: dict[str, int], anchors: Sequence[str]) -> list[Card]:
    places = {id(site): anchor for site, anchor in zip(report.sites, anchors, strict=True)}
    return [_card(report, fold, hues, places) for fold in fold_sites(report.sites)]


def _card(report: Report, fold: Fold[SiteReport], hues: dict[str, int], places: dict[int, str]) -> Card:
    site = fold.first
    mask = "" if site.mask is None else wording.mask(site.mask)
    picture = Markup("")
    if site.mask is not None:
        picture = drawing.draw(site.mask, site.dims, f"Mask: {mask}", f"mask-of-{places[id(site)]}")
    choices = wording.worth_knowing(site, report.device)
    return Card(
        title=wording.module(fold.module),
        site=site,
        hue=hues[site.op],
        status=status_of(site),
        members=tuple(Member(places[id(m)], _layer(m.module), m) for m in fold.members),
        caption=wording.mask_caption(site.mask, site.dims),
        picture=picture,
        dims=tuple((name.replace("_", " "), wording.size(size)) for name, size in site.dims.items()),
        errors=error_axis(fold.members),
        choices=tuple(choices),
        elsewhere=tuple(a for a in site.alternatives if a not in choices),
        before=tuple(map(line_of, site.before)),
        after=tuple(map(line_of, site.after)),
    )


def _layer(module: str) -> str:
    _, number, _ = split_layer(module)
    return wording.module(module) if number is None else str(number)
