"""The cost run on shallow stacks: what it measures is there, adds up, and the fit says what it should."""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kreg.api import settings_for
from kreg.rewriters.capture import export_model
from kreg.rewriters.pipeline import Clock, rewrite_graph
from kreg.rewriters.program import functional
from kreg.rewriters.report import Seconds
from tests.zoo import cost


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_that_power(power: float) -> None:
    assert cost.exponent([(n, 3e-4 * n**power) for n in (100, 250, 900, 4000)]) == pytest.approx(power)


def test_one_size_has_no_exponent() -> None:
    assert math.isnan(cost.exponent([(100, 1.0), (100, 2.0)]))


def made(layers: int, capture: float, raising: float) -> cost.Cost:
    """A cost by hand."""
    seconds = Seconds.model_validate({"capture": capture, "raise": raising, "plan": 0.1, "lower": 0.2, "verify": 9.0})
    return cost.Cost("llama", layers, 100 * layers, layers, layers, seconds)


def test_the_share_of_capture_counts_raising_planning_and_lowering() -> None:
    found = made(2, 10.0, 0.7)
    assert found.own == pytest.approx(1.0) and found.share == pytest.approx(0.1)
    assert found.per_node == pytest.approx(5000.0)


def test_a_stack_costs_the_median_of_its_rounds_stage_by_stage() -> None:
    found = cost.medians([made(4, 9.0, 3.0), made(2, 1.0, 5.0), made(4, 7.0, 4.0), made(4, 8.0, 1.0)])
    assert [(c.layers, c.seconds.capture, c.seconds.raise_) for c in found] == [(2, 1.0, 5.0), (4, 8.0, 3.0)]


@pytest.mark.parametrize("model", list(cost.STACKS))
def test_a_stack_has_a_site_a_layer_and_all_are_replaced(model: str) -> None:
    found = cost.measure(model, 4)
    assert (found.sites, found.replaced) == (4, 4) and found.nodes > 200
    seconds = found.seconds.model_dump(by_alias=True)
    assert all(seconds[stage] > 0 for stage in cost.STAGES)


def test_the_command_prints_a_table_for_each_model_and_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(model: str, layers: int, *, verify: bool = True) -> cost.Cost:
        return made(layers, layers, layers / 10)

    monkeypatch.setattr(cost, "measure", measured)
    path = tmp_path / "cost.json"
    arguments = ["cost", "--model", "llama", "--layers", "2", "4", "8", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    cost.main()
    shown = capsys.readouterr().out
    assert "llama: seconds by stage" in shown and "exponent" in shown and "median share of capture" in shown
    written: list[dict[str, Any]] = json.loads(path.read_text())
    assert [line["layers"] for line in written] == [2, 4, 8]
    assert written[0]["share_of_capture"] == pytest.approx((0.2 + 0.3) / 2)


def calls(layers: int) -> int:
    """Calls that a rewrite of a stack takes, once captured: a measure that no busy machine disturbs."""
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    captured = functional(export_model(cost.llama(layers), inputs)).module
    settings = settings_for("cpu", None)
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what it would clear away calls too
    sys.setprofile(counted)
    try:
        rewrite_graph(captured, settings, model="llama", frontend="export", clock=Clock())
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_the_calls_that_a_rewrite_takes_grow_with_the_layers_and_no_faster() -> None:
    calls(1)  # what is read once a process: the catalogue, the ops
    one, two, four = map(calls, (1, 2, 4))
    assert (four - two) / (two - one) == pytest.approx(2.0, rel=0.1)
