"""``kreg verify``: each site's original code against its kernel, with float64 as the judge."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kreg.cli import options
from kreg.cli.models import Shape, resolve
from kreg.cli.output import code_of, running
from kreg.cli.rewrite import Wish, analysed
from kreg.rewriters.report import Report, SiteReport, wording
from kreg.rewriters.report.errors import tolerance_of
from kreg.rewriters.report.table import SPARE


def verify(
    model: options.Model,
    device: options.Device = None,
    seq_len: options.SeqLen = None,
    batch: options.Batch = None,
    dtype: options.Dtype = None,
    dynamic: options.Dynamic = False,
    enable: options.Enable = None,
    disable: options.Disable = None,
    json: options.Json = False,
) -> None:
    """Run every site old against new on random inputs, forward and backward, and show the errors.

    Exits with 1 if a site is off by more than its op's tolerance, and with 3 if there was nothing to verify.
    """
    with running(json) as output:
        wish = Wish.of(device, dynamic, enable, disable)
        output.progress(f"loading {model}")
        subject = resolve(model, Shape.of(seq_len, batch, dtype, dynamic), device)
        report = analysed(subject, wish, output)
        sites = [_facts(site) for site in report.sites]
        checked = [site for site in report.sites if site.verify]
        passed = bool(checked) and all(site.verify.passed for site in checked if site.verify)
        facts = {"model": report.model, "device": report.device, "passed": passed, "sites": sites}
        output.result(facts, *_shown(report))
        output.end(code_of(report))


def _facts(site: SiteReport) -> dict[str, object]:
    tolerance = tolerance_of(site)
    return {
        "id": site.id,
        "op": site.op,
        "module": site.module,
        "kernel": site.kernel,
        "dtype": site.dtype,
        "verify": site.verify.model_dump() if site.verify else None,
        "tolerance": {"atol": tolerance.atol, "rtol": tolerance.rtol} if tolerance else None,
        "reason": site.reason,
    }


def _shown(report: Report) -> Iterator[RenderableType]:
    checked = [site for site in report.sites if site.verify]
    failed = [site for site in checked if site.verify and not site.verify.passed]
    verdict = f"{len(checked) - len(failed)} of {wording.plural(len(checked), 'verified site')} passed"
    style = "bold red" if failed else "bold green" if checked else "bold yellow"
    yield Text.assemble((report.model, "bold"), " on ", (report.device, "bold"), ": ", (verdict, style))
    if not report.sites:
        return
    table = Table(box=SPARE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", width=1)
    table.add_column("site", overflow="fold", ratio=2)
    table.add_column("kernel", overflow="fold", ratio=2)
    for title in ("error", "grad"):
        table.add_column(title, no_wrap=True, width=8)
    table.add_column("tolerance", no_wrap=True)
    for site in report.sites:
        table.add_row(*_row(site))
    yield table


def _row(site: SiteReport) -> tuple[RenderableType, ...]:
    where = Text.assemble(wording.module(site.module), "\n", (site.op, "cyan"))
    if site.verify is None:
        return Text("-", "dim"), where, Text(f"not run: {site.reason}", "yellow"), "", "", ""
    mark = Text("✓", "green") if site.verify.passed else Text("✗", "bold red")
    kernel = Text(site.kernel or "original code", "" if site.kernel else "yellow")
    if not site.verify.passed:
        kernel.append(f"\n{site.reason}", "red")
    tolerance = tolerance_of(site)
    accepted = "-" if tolerance is None else f"{tolerance.atol:.0e} + {tolerance.rtol:.0e}·max"
    errors = wording.error(site.verify.max_error), wording.error(site.verify.max_grad_error)
    return mark, where, kernel, *errors, Text(accepted, "dim")
