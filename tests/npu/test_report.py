"""``examples/npu_report.py``, as far as it can be tried without an NPU: on the CPU, and on the stand-in."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kreg
from kreg.registry import catalogue
from kreg.registry.calls import resolve
from kreg.registry.environment import Environment

pytest.importorskip("torch_npu", reason="torch_npu cannot be imported here: dev.py npu", exc_type=ImportError)

SCRIPT = Path(__file__).parents[2] / "examples" / "npu_report.py"


def run(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """The script's exit code, its report, and what it says."""
    out = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, json.loads(out.read_text(), parse_constant=pytest.fail), done.stdout + done.stderr


def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("npu_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_an_npu_it_says_so_in_its_report_and_by_its_exit_code(tmp_path: Path) -> None:
    code, report, said = run(tmp_path, LD_LIBRARY_PATH="")
    assert code == 2
    assert "device 'npu' cannot be used: ImportError: libhccl.so" in report["error"] and report["error"] in said
    assert report["environment"]["versions"]["torch_npu"] and not report["finished"]


def test_on_the_stand_in_each_exception_is_written_down_and_the_rest_goes_on(tmp_path: Path) -> None:
    arguments = ("--only", "kernels", "--kernel", "torch_npu.fusion_attention*")
    code, report, _ = run(tmp_path, *arguments)
    assert code == 1 and report["finished"] and report["summary"]["passed"] == 0
    assert report["environment"]["device"]["architecture"] == "Ascend910B1"
    names = [kernel["kernel"] for kernel in report["kernels"]]
    assert names == sorted(n for n in catalogue.catalogue().specs if n.startswith("torch_npu.fusion_attention"))
    for kernel in report["kernels"]:
        assert {sample["outcome"] for sample in kernel["samples"]} == {"failed"}
        assert {sample["from"] for sample in kernel["samples"]} == {"op", "report"}
        assert all("RuntimeError" in sample["error"] and sample["where"] for sample in kernel["samples"])


def test_on_the_cpu_its_kernels_model_and_bench_pass(tmp_path: Path) -> None:
    code, report, said = run(tmp_path, "--device", "cpu", "--sizes", "small", "--kernel", "kreg.tiled_indexer")
    assert code == 0, said
    assert report["summary"] == {"passed": 4, "failed": 0, "not run": 0} and report["finished"]
    (kernel,), (model,), bench = report["kernels"], report["model"], report["bench"]
    scored = [sample for sample in kernel["samples"] if sample["attributes"]["scored"] and sample["dims"]["entries"]]
    assert scored and all(set(sample["gradients"]) == {"q", "k", "weights"} for sample in scored)
    assert model["replaced"] == 4 and model["fallbacks"] == [] and len(model["report"]["sites"]) == 4
    assert 0 < model["kreg"]["logits"] < 0.1 and 0 < model["kreg"]["gradients"] < 0.1
    assert [case["step"] for case in bench] == ["forward", "training"] and all(c["medians"]["kreg"] > 0 for c in bench)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [(lambda out: 1.05 * out, "error"), (lambda out: out + 0.5 * (out - out.detach()), "gradients")],
    ids=["its result", "its gradient"],
)
def test_a_kernel_that_is_wrong_fails(wrong: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = catalogue.catalogue()
    monkeypatch.setattr(known, "_contents", known._contents)

    def off(*arguments: Any, **rest: Any) -> Any:
        out, lse = known.op("attention").reference(*arguments, **rest)
        return wrong(out), lse

    kreg.kernel(op="attention", name="test.off", devices=["cpu"], dtypes=["float32"], trains=True)(off)
    report, here = script(), Environment.detect("cpu")
    resolve.cache_clear()
    found = report.judged(known.kernel("test.off"), here, report.SIZES["small"])
    resolve.cache_clear()
    assert found["outcome"] == "failed"
    off_by = [sample["error"] > sample["accepted"] for sample in found["samples"] if sample["outcome"] == "failed"]
    assert any(off_by) == (where == "error")
