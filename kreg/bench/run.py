"""The cases of a benchmark, and the interleaved runs that measure each."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from kreg import api
from kreg.bench.measure import free_bytes, matmul_rate, peak_bytes, seconds, timed
from kreg.bench.steps import CACHED, WITH_CACHE, step_of
from kreg.registry.catalogue import catalogue
from kreg.rewriters import live

Progress = Callable[[str], None]
BASELINES = ("eager", "inductor")
ROUNDS = 5
TURNS = {"decode": 16}
"""Calls of each variant in a round, where one call is short."""
WARM = {"decode": 3}
"""Calls before the first that counts: `torch.compile` captures a cache that grows a second time."""


@dataclass(frozen=True)
class Case:
    """One row: a length, a dtype, and what is done (see `steps`)."""

    seq_len: int
    dtype: str
    step: str


@dataclass(frozen=True)
class Share:
    """Where a call's time goes: an op of kreg's or an ATen operator, and its part of the whole."""

    name: str
    share: float
    calls: int


@dataclass(frozen=True)
class Result:
    """What one case gave.

    Attributes:
        medians: seconds by variant.
        ratios: median over turns of (a baseline's seconds / kreg's), by baseline.
        processor_ratios: the same of processor time.
        peaks: bytes above the idle model, by variant.
        first: seconds of the first call, in which the variant compiles, by variant.
        skipped: why a baseline was not run.
        shares: the rewritten call's time by operator, largest first.
        op_rates: floating-point operations a second of kreg's ops in that call, by op.
        matmul_rate: the same of a square matrix product in the case's dtype.
    """

    case: Case
    medians: dict[str, float]
    ratios: dict[str, float]
    peaks: dict[str, int]
    first: dict[str, float]
    skipped: dict[str, str] = field(default_factory=dict)
    processor_ratios: dict[str, float] = field(default_factory=dict)
    shares: tuple[Share, ...] = ()
    op_rates: dict[str, float] = field(default_factory=dict)
    matmul_rate: float = 0.0


def cases(lengths: Iterable[int], dtypes: Iterable[str], steps: Iterable[str]) -> list[Case]:
    """Every combination, short ones first."""
    return [Case(n, dtype, step) for dtype in dtypes for step in steps for n in sorted(lengths)]


Build = Callable[[Case], tuple[nn.Module, dict[str, Any]]]
"""A fresh model and keyword inputs for a case."""


def run(
    todo: Sequence[Case],
    build: Build,
    device: str,
    *,
    baselines: Sequence[str] = BASELINES,
    rounds: int = ROUNDS,
    progress: Progress = lambda step: None,
) -> Iterator[Result]:
    """Measures cases one by one, every variant in each round."""
    largest: dict[tuple[str, str, str], tuple[int, int]] = {}
    for case in todo:
        result = _measure(case, build, device, baselines, rounds, progress, largest)
        for variant, peak in result.peaks.items():
            largest[variant, case.dtype, case.step] = (case.seq_len, peak)
        yield result


def _measure(
    case: Case,
    build: Build,
    device: str,
    baselines: Sequence[str],
    rounds: int,
    progress: Progress,
    largest: dict[tuple[str, str, str], tuple[int, int]],
) -> Result:
    label = f"{case.dtype} {case.step}" + (f" S={case.seq_len}" if case.seq_len else "")
    model, inputs = build(case)
    model.train(case.step == "training")
    variants: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name in baselines:
        reason = _too_large(case, largest.get((name, case.dtype, case.step)))
        if reason:
            skipped[name] = reason
        else:
            variants[name] = copy.deepcopy(model)
    first: dict[str, float] = {}
    for name, variant in variants.items():
        if name == "inductor":
            variant.compile()
    progress(f"{label}: rewriting")
    with contextlib.redirect_stdout(io.StringIO()):
        first["kreg"] = seconds(lambda: _rewrite(model, device, inputs, case), device)
    calls: dict[str, Callable[[], object]] = {}
    for name, variant in (*variants.items(), ("kreg", model)):
        progress(f"{label}: {name}, first call")
        try:
            call = step_of(case.step, variant, inputs)
            first[name] = first.get(name, 0.0) + seconds(call, device)
            for _ in range(1, WARM.get(case.step, 1)):
                call()
        except Exception as error:  # a baseline that fails is a finding, not the end of the run
            if name == "kreg":
                raise
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            calls[name] = call
    times = _in_turn(calls, rounds * TURNS.get(case.step, 1), device, lambda text: progress(f"{label}: {text}"))
    peaks = {name: peak for name, call in calls.items() if (peak := peak_bytes(call, device)) is not None}
    shares, rates = _profile(model, calls["kreg"])
    rate = matmul_rate(getattr(torch, case.dtype), device)
    medians = {name: statistics.median(wall for wall, _ in t) for name, t in times.items()}
    answered = api.report(model).calls
    if answered.original and case.step != "decode":  # where that is meant
        skipped["kreg"] = f"{answered.original} calls ran the original code"
    return Result(case, medians, _ratios(times, 0), peaks, first, skipped, _ratios(times, 1), shares, rates, rate)


Times = dict[str, list[tuple[float, float]]]
"""Wall and processor time of each turn, by variant."""


def _in_turn(calls: dict[str, Callable[[], object]], turns: int, device: str, progress: Progress) -> Times:
    """Every variant once in each turn, in an order that is turned round each time: none is always behind another."""
    times: Times = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            progress(f"{name}, turn {turn + 1} of {turns}")
            times[name].append(timed(calls[name], device))
    return times


def _ratios(times: Times, clock: int) -> dict[str, float]:
    return {
        name: statistics.median(a[clock] / max(b[clock], 1e-9) for a, b in zip(turns, times["kreg"], strict=True))
        for name, turns in times.items()
        if name != "kreg"
    }


def _rewrite(model: nn.Module, device: str, inputs: dict[str, Any], case: Case) -> None:
    settings = replace(api.settings_for(device, model, verify=False), dynamic=False)
    with torch.set_grad_enabled(case.step == "training"):
        live.attach(model, settings, inputs | CACHED if case.step in WITH_CACHE else inputs)


def _too_large(case: Case, seen: tuple[int, int] | None) -> str:
    """Memory of dense attention grows with the square of the length: a run that cannot fit is not begun."""
    free = free_bytes()
    if seen is None or free is None:
        return ""
    expected = seen[1] * (case.seq_len / seen[0]) ** 2
    if expected < 0.85 * free:
        return ""
    return f"would need about {expected / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"


def _profile(model: nn.Module, call: Callable[[], object]) -> tuple[tuple[Share, ...], dict[str, float]]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=False) as recorded:
        start = time.perf_counter()
        call()
        spent = time.perf_counter() - start
    events = recorded.key_averages()
    ours = {e.key: e for e in events if e.key.startswith("kreg::")}
    inside = {name: e.cpu_time_total / 1e6 for name, e in ours.items()}
    rows = [Share(name, took / spent, ours[name].count) for name, took in inside.items()]
    rows += [
        Share(e.key, e.self_cpu_time_total / 1e6 / spent, e.count)
        for e in events
        if e.key.startswith("aten::") and e.self_cpu_time_total / 1e6 / spent > 0.02
    ]
    work = _work(model)
    rates = {
        name.removeprefix("kreg::"): work[name.removeprefix("kreg::")] / took
        for name, took in inside.items()
        if took and name.removeprefix("kreg::") in work
    }
    return tuple(sorted(rows, key=lambda r: -r.share)), rates


def _work(model: nn.Module) -> dict[str, float]:
    """Floating-point operations of one call's ops, from the sizes that the report gives."""
    total: dict[str, float] = {}
    for site in api.report(model).sites:
        if site.status != "replaced" or not all(isinstance(v, int) for v in site.dims.values()):
            continue
        mask = dict(site.mask or {})
        attributes = {
            "window": mask.get("window", 0),
            "ratio": mask.get("ratio", 0),
            "causal": "causal" in str(mask),
        }
        operations, _ = catalogue().op(site.op).work(site.dims, attributes)
        total[site.op] = total.get(site.op, 0.0) + operations
    return total
