"""What can be chosen, and what is, where torch_npu is installed: with MindSpeed, without it, and on another chip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram
from typer.testing import CliRunner

import kreg
from kreg.cli import app
from kreg.cli.catalogue import reasons_of
from kreg.registry.catalogue import catalogue
from tests.models import CSA, HCA, SLIDING, deepseek_v4, tokens
from tests.npu.fake import STAND_INS

ROOT = Path(__file__).parents[2]
SAS, LI = "mindspeed.sas", "mindspeed.li"
WINDOW, SELECTED = "torch_npu.fusion_window", "torch_npu.sparse_flash_attention"
MINDSPEED = 'package mindspeed is not installed: pip install "mindspeed @ git+https://gitcode.com/Ascend/MindSpeed.git"'


@pytest.fixture(autouse=True)
def _no_choice_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KREG_ENABLE", "KREG_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_mindspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have put the stand-in on the path, or imported it."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != STAND_INS.resolve()])
    for name in [n for n in sys.modules if n.partition(".")[0] == "mindspeed"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def with_mindspeed(without_mindspeed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STAND_INS))


def unavailable() -> dict[str, list[str]]:
    """The kernels for this device of ops there are that cannot be used, with the reasons."""
    known = catalogue()
    specs = {name: spec for name, spec in known.specs.items() if "npu" in spec.devices and spec.op in known.ops}
    found = {name: reasons_of(spec, "npu") for name, spec in specs.items()}
    return {name: reasons for name, reasons in found.items() if reasons}


@pytest.mark.usefixtures("without_mindspeed")
def test_with_torch_npu_alone_only_mindspeed_is_missing() -> None:
    assert unavailable() == {SAS: [MINDSPEED], LI: [MINDSPEED]}


@pytest.mark.usefixtures("with_mindspeed")
def test_with_mindspeed_every_kernel_can_be_used() -> None:
    assert unavailable() == {}
    assert "mindspeed" not in sys.modules


@pytest.mark.usefixtures("with_mindspeed")
@pytest.mark.parametrize("chip", ["Ascend310P3", "Ascend910A"])
def test_on_another_chip_the_reason_names_it_and_those_that_will_do(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.npu, "get_device_name", lambda index=0: chip)
    for reasons in (unavailable()[SAS], unavailable()[SELECTED]):
        assert reasons == [f"it needs Ascend910B[1-9]*, Ascend910_93*, the npu device is {chip}"]


@pytest.mark.usefixtures("without_mindspeed")
@pytest.mark.parametrize("width", [80, 120])
def test_the_list_shows_what_is_here_and_the_one_thing_that_is_not(width: int) -> None:
    done = CliRunner().invoke(app, ["list", "--device", "npu"], env={"COLUMNS": str(width)})
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and max(map(len, lines)) <= width
    rows = {cells[0]: cells for cells in map(str.split, lines) if "npu" in cells}
    assert rows[SAS][-2:] == ["no", "1"] and rows[SELECTED][-1] == "yes"
    assert sum("is not installed" in line for line in lines) == 1
    assert MINDSPEED.partition(": ")[2] in [line.strip() for line in lines]


def test_torch_npu_that_is_installed_and_not_loaded_is_told_apart_from_no_device() -> None:
    code = "from kreg.cli.catalogue import reasons_of as r; from kreg.registry.catalogue import catalogue as c; "
    code += f"print(r(c().kernel({SELECTED!r}), 'npu'))"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "torch_npu is installed and not loaded" in told and "TORCH_DEVICE_BACKEND_AUTOLOAD" in told


# ---- what is taken


@pytest.fixture(scope="module")
def portable() -> ExportedProgram:
    """A sliding layer and one with an indexer, in the head and index sizes of the real model."""
    model = deepseek_v4(
        (SLIDING, CSA),
        torch.bfloat16,
        num_attention_heads=64,
        head_dim=512,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=64,
        compress_rates={CSA: 4, HCA: 128},
        hc_mult=1,
        hc_sinkhorn_iters=1,
    )
    return kreg.export(model, {"input_ids": tokens(1, 256)}, portable=True, verify=False)


def taken(portable: ExportedProgram, **choice: Any) -> dict[str, str | None]:
    """Kernels by op and module, those of experts aside, as the lowered program's own report has them."""
    report = kreg.program_report(kreg.lower(portable, "npu", verify=False, **choice))
    assert report is not None and report.device == "npu" and not report.dry_run
    return {f"{site.op} {site.module}": site.kernel for site in report.sites if site.op != "grouped_matmul"}


SITES = (
    "sparse_attention model.layers.0.self_attn",
    "lightning_indexer model.layers.1.self_attn.compressor.indexer",
    "sparse_attention model.layers.1.self_attn",
)


@pytest.mark.usefixtures("with_mindspeed")
@pytest.mark.parametrize(
    ("choice", "kernels"),
    [
        ({}, (WINDOW, LI, SELECTED)),
        ({"enable": [SAS]}, (SAS, None, SAS)),
        ({"disable": ["mindspeed.*"]}, (WINDOW, None, SELECTED)),
    ],
    ids=["neither forced", "SAS forced", "both off"],
)
def test_a_program_is_lowered_with_the_kernels_that_were_chosen(
    portable: ExportedProgram, choice: dict[str, Any], kernels: tuple[str | None, ...]
) -> None:
    assert taken(portable, **choice) == dict(zip(SITES, kernels, strict=True))


@pytest.mark.usefixtures("without_mindspeed")
def test_sas_forced_without_mindspeed_falls_back_and_the_report_says_how_to_get_it(portable: ExportedProgram) -> None:
    lowered = kreg.lower(portable, "npu", verify=False, enable=[SAS])
    report = kreg.program_report(lowered)
    assert report is not None
    for site in report.sites:
        if site.op == "sparse_attention":
            assert site.kernel in (WINDOW, SELECTED)
            assert MINDSPEED in next(other.rejected for other in site.alternatives if other.kernel == SAS)


@pytest.mark.usefixtures("with_mindspeed")
def test_both_forced_is_a_value_error_here_too(portable: ExportedProgram) -> None:
    with pytest.raises(ValueError, match=f"{SAS} and {LI} are both enabled"):
        kreg.lower(portable, "npu", enable=[SAS, LI])
