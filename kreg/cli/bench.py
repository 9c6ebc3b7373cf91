"""``kreg bench``: a rewritten model beside the original and ``torch.compile``, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kreg.cli import options
from kreg.cli.models import Shape, resolve
from kreg.cli.output import BadInput, Output, running
from kreg.rewriters.report.table import SPARE

Lengths = Annotated[list[int] | None, typer.Option("--seq-len", min=1, help="Tokens; repeatable. Default: 1024.")]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="Repeatable. Default: float32.")]
Steps = Annotated[list[str] | None, typer.Option("--step", help="forward or training; repeatable. Default: forward.")]
Baselines = Annotated[
    list[str] | None,
    typer.Option("--baseline", help="eager or inductor; repeatable. Default: both. 'none' for neither."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Interleaved runs of each variant.")]


def bench(
    model: options.Model,
    device: options.Device = None,
    seq_len: Lengths = None,
    dtype: Dtypes = None,
    step: Steps = None,
    baseline: Baselines = None,
    rounds: Rounds = 5,
    json: options.Json = False,
) -> None:
    """Measure a rewritten model beside the original and torch.compile: medians, ratios and peak memory.

    Every round runs each variant once, in turn; a ratio is the median over rounds of the baseline's seconds over
    kreg's in the same round. Peak memory is what one call holds above the idle model. "training" is forward and
    backward. Seconds are of this machine in this hour; the ratios are what can be compared.
    """
    with running(json) as output:
        from kreg.bench.run import BASELINES, PASSES, Case, cases, run

        wanted = [name for name in (baseline or BASELINES) if name != "none"]
        _known("--baseline", wanted, BASELINES)
        steps = step or ["forward"]
        _known("--step", steps, PASSES)

        def build(case: Case) -> tuple[Any, dict[str, Any]]:
            output.progress(f"building {model} for {case.seq_len} tokens in {case.dtype}")
            subject = resolve(model, Shape.of(case.seq_len, None, case.dtype), device)
            if subject.program is not None:
                raise BadInput("a .pt2 file cannot be benchmarked: give the model that it was made from")
            inputs = dict(subject.inputs)
            if "use_cache" not in inputs and hasattr(subject.model, "config"):
                inputs["use_cache"] = False
            return subject.model, inputs

        todo = cases(seq_len or [1024], dtype or ["float32"], steps)
        results = []
        for result in run(todo, build, device or "cpu", baselines=wanted, rounds=rounds, progress=output.progress):
            results.append(result)
            _report_row(output, result)
        output.result([asdict(r) for r in results], *_shown(results, wanted))


def _known(option: str, given: list[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise BadInput(f"{option} {unknown[0]!r} is not known; known: {', '.join(known)}")


def _report_row(output: Output, result: Any) -> None:
    """A line as soon as a case is done: long runs are cut short, and what is measured should be seen."""
    ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in result.ratios.items())
    case = result.case
    output.note(f"{case.dtype} {case.step} S={case.seq_len}: {result.medians['kreg']:.3f} s; {ratios}")


def _shown(results: list[Any], baselines: list[str]) -> Iterator[RenderableType]:
    table = Table(box=SPARE, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("dtype", "step"):
        table.add_column(title)
    table.add_column("S", justify="right")
    for name in (*baselines, "kreg"):
        table.add_column(f"{name} s", justify="right")
    for name in baselines:
        table.add_column(f"x {name}", justify="right", style="bold")
    for r in results:
        row = [r.case.dtype, r.case.step, str(r.case.seq_len)]
        row += [_number(r.medians.get(name), 3) for name in (*baselines, "kreg")]
        row += [_number(r.ratios.get(name), 2) for name in baselines]
        table.add_row(*row)
    yield table
    for r in results:
        case = f"{r.case.dtype} {r.case.step} S={r.case.seq_len}"
        peaks = ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in r.peaks.items())
        yield Text(f"{case}: peak memory {peaks}")
        for name, reason in r.skipped.items():
            yield Text(f"{case}: {name}: {reason}", "yellow")
    for r in results:
        case = f"{r.case.dtype} {r.case.step} S={r.case.seq_len}"
        shares = ", ".join(f"{s.name.removeprefix('aten::')} {s.share:.0%}" for s in r.shares[:8])
        rates = ", ".join(f"{op} {rate / 1e9:.0f}" for op, rate in r.op_rates.items())
        line = f"{case}: {shares}"
        if rates:
            line += f"\n    GFLOP/s: {rates}, against {r.matmul_rate / 1e9:.0f} of a matrix product"
        firsts = ", ".join(f"{name} {took:.0f} s" for name, took in r.first.items())
        yield Text(f"{line}\n    first call: {firsts}", "dim")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
