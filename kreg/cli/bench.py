"""``kreg bench``: a rewritten model beside the original and ``torch.compile``, in one run."""

from __future__ import annotations

import inspect
import json as json_
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kreg.cli import options
from kreg.cli.models import FUNCTION, Shape, resolve
from kreg.cli.output import BadInput, ExitCode, Output, running
from kreg.rewriters.capture import split_inputs
from kreg.rewriters.report.table import SPARE

Lengths = Annotated[list[int] | None, typer.Option("--seq-len", min=1, help="Tokens; repeatable. Default: 1024.")]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="Repeatable. Default: float32.")]
Steps = Annotated[
    list[str] | None,
    typer.Option("--step", help="forward, training, prefill or decode; repeatable. Default: forward."),
]
Depths = Annotated[
    list[int] | None,
    typer.Option(
        "--depth",
        min=1,
        help="Measure capturing and raising this many layers of MODEL's config instead, without weights; repeatable.",
    ),
]
Baselines = Annotated[
    list[str] | None,
    typer.Option("--baseline", help="eager or inductor; repeatable. Default: both. 'none' for neither."),
]
Model = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help=f"{options.MODEL_HELP} None: kernels by themselves.", show_default=False),
]
Limit = Annotated[float, typer.Option("--limit", min=1, help="Seconds, without MODEL; what does not fit is skipped.")]
Out = Annotated[Path | None, typer.Option("--out", help="Without MODEL: also write the results as JSON to a file.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Interleaved runs of each variant.")]


def bench(
    model: Model = None,
    device: options.Device = None,
    seq_len: Lengths = None,
    dtype: Dtypes = None,
    step: Steps = None,
    baseline: Baselines = None,
    rounds: Rounds = 5,
    depth: Depths = None,
    limit: Limit = 450.0,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """Measure a rewritten model beside the original and torch.compile: medians, ratios and peak memory.

    Every round runs each variant once, in turn; a ratio is the median over rounds of the baseline's seconds over
    kreg's in the same round. Peak memory is what one call holds above the idle model. "training" is forward and
    backward, "prefill" a forward that fills a cache, "decode" one token behind a cache that a prompt of --seq-len has
    filled, 16 of them in a round. Seconds are of this machine in this hour; the ratios are what can be compared.

    Without MODEL and with --device cuda: every kernel of the attention and indexer ops by itself, at sizes of
    published models. It is checked against its op's reference, and measured beside transformers' code, torch.compile
    and FlexAttention, and against the roofline. The exit code is 1 if a kernel is wrong.
    """
    with running(json) as output:
        if model is None:
            if step or baseline or depth or len(dtype or []) > 1:
                raise BadInput("--step, --baseline, --depth and several --dtype need a MODEL")
            bench_kernels(output, device, (dtype or ["bfloat16"])[0], tuple(seq_len or ()), limit, out)
            return
        from kreg.bench import BASELINES, STEPS, WITH_CACHE, Case, cases, run, takes_cache

        if depth:
            if step or baseline or len(seq_len or []) > 1 or len(dtype or []) > 1:
                raise BadInput(
                    "--depth goes with one --seq-len and one --dtype, and with neither --step nor --baseline"
                )
            shape = Shape.of((seq_len or [1024])[0], None, dtype[0] if dtype else None)
            _bench_depth(output, model, depth, shape, device or "cpu", rounds)
            return
        wanted = [name for name in (baseline or BASELINES) if name != "none"]
        _known("--baseline", wanted, BASELINES)
        steps = step or ["forward"]
        _known("--step", steps, tuple(STEPS))

        def build(case: Case) -> tuple[Any, dict[str, Any]]:
            output.progress(f"building {model} in {case.dtype}")
            subject = resolve(model, Shape.of(case.seq_len or None, None, case.dtype), device)
            if not isinstance(subject.model, torch.nn.Module):
                raise BadInput("a .pt2 file cannot be benchmarked: give the model that it was made from")
            inputs = _by_name(subject.model, subject.inputs)
            if case.step in WITH_CACHE:
                if not takes_cache(subject.model):
                    raise BadInput(f"--step {case.step} needs a model that fills a cache, and {subject.name} has none")
                inputs.pop("use_cache", None)
            elif "use_cache" not in inputs and hasattr(subject.model, "config"):
                inputs["use_cache"] = False
            return subject.model, inputs

        lengths = seq_len or [0 if FUNCTION.fullmatch(model) else 1024]  # a function brings its own inputs
        todo = cases(lengths, dtype or ["float32"], steps)
        results = []
        for result in run(todo, build, device or "cpu", baselines=wanted, rounds=rounds, progress=output.progress):
            results.append(result)
            _report_row(output, result)
        output.result([asdict(r) for r in results], *_shown(results, wanted))


def bench_kernels(
    output: Output, device: str | None, dtype: str, lengths: tuple[int, ...], limit: float, out: Path | None
) -> None:
    """Kernels by themselves, on a GPU."""
    from kreg.bench.gpu import Run
    from kreg.bench.gpu_cases import FLASH, PREFILL, cases
    from kreg.bench.gpu_table import facts, shown
    from kreg.bench.gpu_timing import DeviceTimer
    from kreg.registry.environment import Environment

    if device is None or torch.device(device).type != "cuda":
        raise BadInput("kreg bench measures kernels by themselves on a GPU: give --device cuda, or else a MODEL")
    here = Environment.detect(device)
    if not here.present:
        raise BadInput(
            f"there is no cuda device here (torch {torch.__version__}), so nothing was measured. "
            "On a machine with a GPU: kreg bench --device cuda"
        )
    chosen = getattr(torch, dtype, None)
    if chosen not in (torch.bfloat16, torch.float16, torch.float32):
        raise BadInput(f"--dtype {dtype!r}: the kernels are measured in bfloat16, float16 or float32")
    run = Run("cuda", chosen, DeviceTimer(), limit, output.progress)
    rows = list(run.rows(cases(FLASH, lengths or PREFILL)))
    name = f"{here.name} ({here.architecture})"
    if out is not None:
        out.write_text(json_.dumps(facts(run, rows, name), indent=1) + "\n", encoding="utf-8")
    output.result(facts(run, rows, name), *shown(run, rows, name))
    wrong = [check.kernel for check in run.checks if check.failed]
    if wrong:
        output.note(f"wrong, and not measured: {', '.join(wrong)}")
        output.end(ExitCode.FAILED)


def _bench_depth(output: Output, model: str, depths: list[int], shape: Shape, device: str, rounds: int) -> None:
    from kreg.bench import measure_depth

    folder = Path(model).parent if Path(model).name == "config.json" else Path(model)
    if not (folder / "config.json").is_file():
        raise BadInput(f"--depth needs a folder with a config.json, whose number of layers it changes; found {model!r}")
    config = json_.loads((folder / "config.json").read_text(encoding="utf-8"))

    def build(layers: int) -> tuple[Any, Any]:
        with TemporaryDirectory() as scratch:
            text = json_.dumps(_with_layers(config, layers, folder))
            (Path(scratch) / "config.json").write_text(text, encoding="utf-8")
            subject = resolve(scratch, shape, device, weightless=True)
        return subject.model, subject.inputs

    results = list(measure_depth(depths, build, device, rounds=rounds, progress=output.progress))
    output.result([asdict(r) for r in results], *_depth_table(results, device, shape))


def _with_layers(config: dict[str, Any], layers: int, folder: Path) -> dict[str, Any]:
    """A config with another number of layers: lists with an entry for each layer are cut, or go round again."""
    part = config.get("text_config", config)
    had = part.get("num_hidden_layers")
    if not isinstance(had, int):
        raise BadInput(f"{str(folder / 'config.json')!r} has no num_hidden_layers, which --depth would change")
    changed = {
        name: [value[i % had] for i in range(layers)] if isinstance(value, list) and len(value) == had else value
        for name, value in part.items()
    } | {"num_hidden_layers": layers}
    return changed if part is config else config | {"text_config": changed}


def _depth_table(results: Sequence[Any], device: str, shape: Shape) -> Iterator[RenderableType]:
    yield Text(f"capture, raise and plan for {device}, S={shape.seq_len}, without weights: medians, from nothing each")
    first = results[0].layers
    table = Table(box=SPARE, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("layers", "s", "processor s", f"x {first} layers", "in processor time"):
        table.add_column(title, justify="right", style="bold" if title.startswith("x ") else "")
    table.add_column("sites")
    for r in results:
        numbers = (r.seconds, r.processor_seconds, r.ratio, r.processor_ratio)
        found = ", ".join(f"{op} {count}" for op, count in r.sites.items())
        table.add_row(str(r.layers), *(_number(n, 2) for n in numbers), found)
    yield table


def _known(option: str, given: list[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise BadInput(f"{option} {unknown[0]!r} is not known; known: {', '.join(known)}")


def _report_row(output: Output, result: Any) -> None:
    """A line as soon as a case is done: long runs are cut short, and what is measured should be seen."""
    ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in result.ratios.items())
    output.note(f"{_label(result.case)}: {_seconds(result.medians['kreg'])} s; {ratios}")


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
        row = [r.case.dtype, r.case.step, str(r.case.seq_len or "-")]
        row += [_seconds(r.medians.get(name)) for name in (*baselines, "kreg")]
        row += [_number(r.ratios.get(name), 2) for name in baselines]
        table.add_row(*row)
    yield table
    for r in results:
        case = _label(r.case)
        peaks = ", ".join(f"{name} {peak / 1e6:,.0f} MB" for name, peak in r.peaks.items())
        yield Text(f"{case}: peak memory {peaks}")
        processor = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in r.processor_ratios.items())
        if processor:
            yield Text(f"{case}: in processor time {processor}")
        for name, reason in r.skipped.items():
            yield Text(f"{case}: {name}: {reason}", "yellow")
    for r in results:
        case = _label(r.case)
        shares = ", ".join(f"{s.name.removeprefix('aten::')} {s.share:.0%}" for s in r.shares[:8])
        rates = ", ".join(f"{op} {rate / 1e9:.0f}" for op, rate in r.op_rates.items())
        line = f"{case}: {shares}"
        if rates:
            line += f"\n    GFLOP/s: {rates}, against {r.matmul_rate / 1e9:.0f} of a matrix product"
        firsts = ", ".join(f"{name} {took:.0f} s" for name, took in r.first.items())
        yield Text(f"{line}\n    first call: {firsts}", "dim")


def _by_name(model: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    args, kwargs = split_inputs(inputs)
    return dict(inspect.signature(model.forward).bind(*args).arguments) | kwargs if args else kwargs


def _label(case: Any) -> str:
    return f"{case.dtype} {case.step}" + (f" S={case.seq_len}" if case.seq_len else "")


def _seconds(value: float | None) -> str:
    return _number(value, 3 if value is None or value >= 0.1 else 5)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
