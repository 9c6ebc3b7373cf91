"""The fine-tuning example, in its short form: transformers' Trainer, peft, activation checkpointing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
REPLACED = {
    "qwen3": {"4 of 4 attention"},
    "deepseek-v4": {"1 of 1 lightning_indexer", "3 of 3 sparse_attention", "6 of 6 grouped_matmul"},
}


@pytest.mark.parametrize("model", ["qwen3", pytest.param("deepseek-v4", marks=pytest.mark.slow)])
def test_losses_with_kreg_are_those_without(model: str) -> None:
    steps = 3
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", model, "--steps", str(steps), "--length", "64"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ *(\d+) +(\d+\.\d+) +(\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == list(range(1, steps + 1))
    found = re.search(r"largest difference of a loss: (\S+)", done.stdout)
    assert found is not None and float(found[1]) < 1e-4
    replaced = re.search(r"replaced: (\d.*)", done.stdout)
    assert replaced is not None and set(replaced[1].split(", ")) == REPLACED[model]
    assert f"{steps} calls ran the rewritten graphs, 0 the original code" in done.stdout
