"""``kreg rewrite`` and ``kreg verify`` on models small enough to be captured in a blink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kreg as package
from kreg.kernels.attention.cpu import forward
from kreg.registry.catalogue import catalogue

from .conftest import Kreg

KEYS = {
    "model",
    "device",
    "frontend",
    "nodes",
    "sites",
    "near_misses",
    "summary",
    "seconds",
    "calls",
    "dry_run",
    "unused",
}


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel that computes something else, so dear that only --enable chooses it."""
    known = catalogue()
    monkeypatch.setattr(known, "_contents", known._contents)  # put back afterwards

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(result + 1 for result in forward(*args, **kwargs))

    fields: dict[str, Any] = {"devices": ["cpu"], "dtypes": ["float32"], "trains": True}
    package.kernel(op="attention", name="toys.wrong", cost={"overhead_us": 1e6}, **fields)(wrong)
    return "toys.wrong"


def test_a_model_of_a_function_is_rewritten_and_reported(kreg: Kreg) -> None:
    ended = kreg("rewrite", "toys:attention")
    assert ended.code == 0
    assert "Block on cpu: all 2 sites replaced" in ended.out and "layers.{0,1}" in ended.out
    assert "exporting" in ended.err


def test_standard_output_is_the_json_report_and_nothing_else(kreg: Kreg) -> None:
    ended = kreg("rewrite", "toys:attention", "--json")
    assert ended.code == 0 and set(ended.json) == KEYS
    assert ended.json["summary"] == {"attention": {"found": 2, "replaced": 2}}
    assert all(site["verify"]["passed"] for site in ended.json["sites"])
    assert "the model is being made" in ended.err  # what the model's code prints goes elsewhere


def test_keyword_inputs_dtypes_and_dynamic_shapes_are_taken(kreg: Kreg) -> None:
    ended = kreg("rewrite", "toys:by_keyword", "--dtype", "float64", "--dynamic", "--json")
    assert ended.code == 0
    assert {site["dtype"] for site in ended.json["sites"]} == {"float64"}
    assert any(isinstance(size, str) for size in ended.json["sites"][0]["dims"].values())


def test_reports_are_saved_by_their_suffix(kreg: Kreg, tmp_path: Path) -> None:
    ended = kreg(
        "rewrite",
        "toys:attention",
        "--report",
        tmp_path / "r.json",
        "--report",
        tmp_path / "r.html",
        "--no-verify",
    )
    assert ended.code == 0 and "saved" in ended.err
    assert set(json.loads((tmp_path / "r.json").read_text())) == KEYS
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_an_exported_program_loads_and_gives_the_same_result(kreg: Kreg, tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    ended = kreg("rewrite", "toys:attention", "--export", path, "--json")
    assert ended.code == 0 and set(ended.json) == KEYS
    import toys  # type: ignore[import-not-found]

    model, inputs = toys.attention()
    torch.testing.assert_close(torch.export.load(path).module()(*inputs), model(*inputs))


def test_a_portable_program_is_lowered_by_a_second_rewrite(kreg: Kreg, tmp_path: Path) -> None:
    portable, lowered = tmp_path / "portable.pt2", tmp_path / "lowered.pt2"
    first = kreg("rewrite", "toys:attention", "--export", portable, "--portable", "--json")
    assert first.code == 0 and {s["kernel"] for s in first.json["sites"]} == {None}
    kreg("rewrite", portable, "--export", lowered)
    graph = str(torch.export.load(lowered).graph)
    assert graph.count("kernel: ") == 2


def test_a_plain_program_is_raised(kreg: Kreg, tmp_path: Path) -> None:
    import toys

    path = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(*toys.attention()), path)
    ended = kreg("rewrite", path, "--json")
    assert ended.code == 0 and ended.json["summary"]["attention"]["replaced"] == 2


def test_a_dry_run_plans_for_a_device_that_is_not_here(kreg: Kreg) -> None:
    ended = kreg("rewrite", "toys:attention", "--dry-run", "--device", "npu", "--json")
    assert ended.code == 0 and ended.json["dry_run"] and ended.json["device"] == "npu"
    assert {site["kernel"] for site in ended.json["sites"]} == {"torch_npu.fusion_attention"}
    here = kreg("rewrite", "toys:attention", "--dry-run")
    assert here.code == 0 and "would be replaced" in here.out


@pytest.mark.parametrize("toy", ["linear", "dropout"])
def test_exit_3_where_nothing_is_found(kreg: Kreg, toy: str) -> None:
    ended = kreg("rewrite", f"toys:{toy}")
    assert ended.code == 3 and "nothing was found to replace" in ended.out


def test_exit_3_where_the_device_has_no_usable_kernel(kreg: Kreg) -> None:
    ended = kreg("rewrite", "toys:attention", "--device", "npu")
    assert ended.code == 3 and "0 of 2 sites replaced" in ended.out and "there is no npu device here" in ended.words


def test_exit_4_where_the_model_cannot_be_captured(kreg: Kreg) -> None:
    ended = kreg("rewrite", "toys:branches", "--json")
    assert ended.code == 4 and ended.json["error"]["type"] == "CaptureError"
    assert "Branches could not be exported" in ended.json["error"]["message"]
    assert "Traceback" not in ended.err and "def forward" not in ended.err


def test_exit_1_where_a_site_fails_verification(kreg: Kreg, wrong_kernel: str) -> None:
    ended = kreg("rewrite", "toys:attention", "--enable", wrong_kernel, "--json")
    assert ended.code == 1
    assert {(s["status"], s["verify"]["passed"]) for s in ended.json["sites"]} == {("kept", False)}
    shown = kreg("verify", "toys:attention", "--enable", wrong_kernel)
    assert shown.code == 1 and "0 of 2 verified sites passed" in shown.out and "✗" in shown.out


def test_exit_1_and_no_traceback_where_kreg_itself_fails(kreg: Kreg, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(package, "analyse", fails)
    ended = kreg("rewrite", "toys:attention", "--json")
    assert ended.code == 1 and ended.json["error"]["type"] == "InternalError"
    assert "in the middle" in ended.err and "Traceback" not in ended.err
    monkeypatch.setenv("KREG_DEBUG", "1")
    assert "Traceback" in kreg("rewrite", "toys:attention").err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--enable", "nobody.nothing"], "no kernel is called 'nobody.nothing'"),
        (["--enable", "mindspeed.sas,mindspeed.li"], "exclude each other"),
        (["--enable", "mindspeed.sas", "--enable", "mindspeed.li"], "exclude each other"),
        (["--device", "gpu"], "torch calls it 'cuda'"),
        (["--dtype", "float12"], "Known: float32, bfloat16, float16, float64"),
        (["--seq-len", "7"], "--seq-len cannot be given with a function"),
        (["--report", "r.txt"], "should end in .json or .html"),
        (["--report", "nowhere/r.json"], "there is no folder 'nowhere'"),
        (["--export", "p.onnx"], "should end in .pt2"),
        (["--export", "p.pt2", "--dry-run"], "exclude each other"),
        (["--portable"], "give --export PATH too"),
        (["--seq-len", "0"], "Invalid value"),
        (["--nonsense"], "No such option"),
    ],
)
def test_exit_2_for_bad_options(kreg: Kreg, options: list[str], told: str) -> None:
    ended = kreg("rewrite", "toys:attention", *options)
    assert ended.code == 2 and told in ended.words and not ended.out


def test_verify_shows_errors_against_tolerances(kreg: Kreg) -> None:
    facts = kreg("verify", "toys:attention", "--json")
    assert facts.code == 0 and facts.json["passed"]
    for site in facts.json["sites"]:
        assert site["verify"]["max_error"] < 1e-5 and site["tolerance"]["rtol"] > 0
    assert "2 of 2 verified sites passed" in kreg("verify", "toys:attention").out


def test_verify_of_nothing_exits_3(kreg: Kreg) -> None:
    ended = kreg("verify", "toys:linear", "--json")
    assert ended.code == 3 and not ended.json["passed"]
