"""``kreg explain``: why a site got its kernel, and why what looked like an op was left as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from kreg.cli import options
from kreg.cli.models import Shape, Subject, resolve
from kreg.cli.output import BadInput, ExitCode, running
from kreg.cli.rewrite import Wish, analysed
from kreg.registry.wording import did_you_mean, listing
from kreg.rewriters.report import NearbyNode, NearMissReport, Report, SiteReport, wording
from kreg.rewriters.report.fold import Fold, fold_near_misses, fold_sites
from kreg.rewriters.report.lines import line_of

LINES = 12
"""Lines of a graph that are shown from each end."""

NAME = 32
"""Characters of a node's name that are shown."""

SUGGESTED = 4
"""Modules that an error lists."""


def explain(
    model: options.Model,
    module: Annotated[
        str | None, typer.Option("--module", metavar="PATH", help="Only this module of the model and those within it.")
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="ID", help="Only this site, with the nodes it replaces.")
    ] = None,
    device: options.Device = None,
    seq_len: options.SeqLen = None,
    batch: options.Batch = None,
    dtype: options.Dtype = None,
    dynamic: options.Dynamic = False,
    enable: options.Enable = None,
    disable: options.Disable = None,
    no_verify: options.NoVerify = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Explain every choice: each site with all its candidates, each near miss with what failed."""
    with running(json) as output:
        wish = Wish.of(device, dynamic, enable, disable, not no_verify, dry_run)
        output.progress(f"loading {model}")
        subject = resolve(model, Shape.of(seq_len, batch, dtype, dynamic), device, weightless=dry_run)
        report = analysed(subject, wish, output)
        part = narrowed(report, module, site, modules_of(subject))
        facts = {
            "model": report.model,
            "device": report.device,
            "dry_run": report.dry_run,
            "sites": [_facts(s) for s in part.sites],
            "near_misses": [_missed(miss) for miss in part.near_misses],
        }
        output.result(facts, *_shown(part, module, graphs=site is not None))
        output.end(ExitCode.DONE)


def narrowed(report: Report, module: str | None, site: str | None, modules: Collection[str] = ()) -> Report:
    """The part of a report about one module and those within it, or about one site.

    Args:
        report: the whole.
        module: its path.
        site: its id.
        modules: paths of the model's modules, where they are known.

    Raises:
        BadInput: there is no such module or site.
    """
    sites, misses = report.sites, report.near_misses
    if module is not None:
        sites = tuple(s for s in sites if inside(s.module, module))
        misses = tuple(m for m in misses if inside(m.module, module))
        if not (sites or misses or module in modules):
            raise BadInput(_unknown(module, report, modules))
    if site is not None:
        known = [s.id for s in sites]
        sites, misses = tuple(s for s in sites if s.id == site), ()
        if not sites:
            raise BadInput(f"there is no site {site!r}{did_you_mean(site, known)}. kreg explain lists the sites")
    return report.model_copy(update={"sites": sites, "near_misses": misses})


def _unknown(module: str, report: Report, modules: Collection[str]) -> str:
    """What to say of a module that is not there: the nearest one that is, and where something was found."""
    found = list(dict.fromkeys([s.module for s in report.sites] + [m.module for m in report.near_misses]))
    known = {path for whole in (*found, *modules) for path in _prefixes(whole)}
    where = listing(wording.module(path) for path in found[:SUGGESTED]) + (", ..." if len(found) > SUGGESTED else "")
    told = f"there is no module {module!r}" if modules else f"nothing in module {module!r} looked like an op"
    return f"{told}{did_you_mean(module, sorted(known, key=_depth))}. What looked like an op is in: {where}"


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _depth(path: str) -> int:
    return path.count(".")


def modules_of(subject: Subject) -> Collection[str]:
    """Paths of a model's modules; none of a program's, which has kept only those that computed something."""
    return [path for path, _ in subject.model.named_modules()] if isinstance(subject.model, nn.Module) else []


def inside(path: str, module: str) -> bool:
    """Whether a module's path is another's, or is within it."""
    return module == "" or path == module or path.startswith(f"{module}.")


def _facts(site: SiteReport) -> dict[str, Any]:
    taken = [{"kernel": site.kernel, "taken": True, "reason": site.reason}] if site.kernel else []
    others = [{"kernel": a.kernel, "taken": False, "reason": a.rejected} for a in site.alternatives]
    return site.model_dump(exclude={"alternatives"}) | {
        "candidates": [*taken, *others],
        "before": [*site.before],
        "after": [*site.after],
    }


def _missed(miss: NearMissReport) -> dict[str, Any]:
    return miss.model_dump() | {"around": [node.model_dump() for node in miss.around]}


def _shown(report: Report, module: str | None, *, graphs: bool) -> Iterator[RenderableType]:
    if module is not None and not (report.sites or report.near_misses):
        yield Text(f"nothing in module {module!r} looked like an op")
        return
    yield Text.assemble((report.model, "bold"), " on ", (report.device, "bold"), ": ", wording.headline(report))
    for fold in fold_sites(report.sites):
        yield from _site(fold, "" if report.dry_run else _now(fold.first))
        if graphs:
            yield from _graph(fold.first)
    misses = fold_near_misses(report.near_misses)
    if misses:
        yield Text.assemble(
            ("\nNear misses: what looked like an op and was left as it is", "bold"),
            ("\n▸ what looked like it, ✗ where it failed", "dim"),
        )
    for miss in misses:
        yield from _miss(miss)


def _site(fold: Fold[SiteReport], now: str) -> Iterator[RenderableType]:
    site = fold.first
    count = f" ×{fold.count}" if fold.count > 1 else ""
    yield Text.assemble("\n", (wording.module(fold.module), "bold"), (count, "bold"), "  ", (site.op, "cyan"))
    ids = ", ".join(m.id for m in fold.members[:3]) + (", ..." if fold.count > 3 else "")
    dims = ", ".join(f"{name} {wording.size(size)}" for name, size in site.dims.items())
    facts = [
        ("site", ids),
        ("now", now),
        ("mask", wording.mask_caption(site.mask, site.dims)),
        ("dims", f"{dims}; {site.dtype}{', trains' if site.trainable else ''}"),
        ("verified", _verified(fold.members)),
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, Text(value))
    yield Padding(table, (0, 0, 0, 2))
    if site.kernel:
        yield _candidate("✓", "green", site.kernel, site.reason)
    else:
        yield _candidate("·", "yellow", "open" if site.status == "replaced" else "original code", site.reason)
    for other in site.alternatives:
        yield _candidate("✗", "dim", other.kernel, other.rejected)


def _now(site: SiteReport) -> str:
    """What a site does now."""
    if site.status == "kept":
        return "the original code runs, node for node"
    ops = [str(line_of(line)) for line in site.after]
    return f"in place of {wording.plural(site.nodes_replaced, 'node')}" + (f": {ops[0]}" if ops else "")


def _candidate(mark: str, style: str, kernel: str, reason: str) -> RenderableType:
    return Padding(Text.assemble((f"{mark} {kernel}", style), f": {reason}"), (0, 0, 0, 2))


def _verified(sites: tuple[SiteReport, ...]) -> str:
    forward, backward = wording.worst(sites)
    if forward is None:
        return ""
    passed = all(site.verify is None or site.verify.passed for site in sites)
    gradients = "" if backward is None else f", of gradients {wording.error(backward)}"
    run = {site.verified_at for site in sites if site.verified_at}
    once = f"; run at {listing(sorted(run)[:3])} for all that are the same code" if 0 < len(run) < len(sites) else ""
    return f"{'passed' if passed else 'failed'}: error {wording.error(forward)}{gradients}{once}"


def _graph(site: SiteReport) -> Iterator[RenderableType]:
    for title, lines in (("before", site.before), ("after", site.after)):
        if lines:
            yield Text(f"\n  {title}: {wording.plural(len(lines), 'node')}", style="dim")
        for line in lines if len(lines) <= 2 * LINES else (*lines[:LINES], "...", *lines[-LINES:]):
            yield Padding(Text(str(line_of(line)) if line != "..." else line), (0, 0, 0, 4))


def _miss(fold: Fold[NearMissReport]) -> Iterator[RenderableType]:
    miss = fold.first
    count = f" ×{fold.count}" if fold.count > 1 else ""
    nodes = ", ".join(m.node for m in fold.members[:3]) + (", ..." if fold.count > 3 else "")
    yield Text.assemble("\n", (wording.module(fold.module) + count, "bold"), "  ", (miss.op, "cyan"))
    yield Padding(Text.assemble(("at ", "dim"), nodes), (0, 0, 0, 2))
    yield Padding(Text(miss.reason), (0, 0, 0, 2))
    if miss.around:
        yield Padding(_around(miss.around), (1, 0, 0, 2))


def _around(nodes: Iterable[NearbyNode]) -> RenderableType:
    """Nodes in the order of the graph, the one at which the obligation failed marked."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=NAME)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="cyan")
    for node in nodes:
        mark, style = ("✗", "bold red") if node.failed else ("▸", "bold") if node.anchor else ("", "")
        style = style or ("dim" if node.read else "")
        table.add_row(Text(mark, style), Text(f"%{node.name}", style), Text(node.call, style), Text(node.value))
    return table
