"""The examples do what they print, each in a process of its own, on short inputs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed_by(example: str, *arguments: str) -> str:
    """What an example prints: 600 tokens make 150 entries of 4, of which 128 are selected, and 4 of 128."""
    short = {"TOKENS": "600", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        env={**os.environ, **short},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_deepseek_v4_is_rewritten_right_and_restored() -> None:
    out = printed_by("deepseek_v4.py")
    assert "all 10 sites replaced" in out
    assert "Near misses" not in out
    assert "2 calls ran the rewritten graph, 0 the original code" in out
    found = re.search(r"relative error of logits (\S+), of gradients (\S+)", out)
    assert found is not None
    assert max(float(error) for error in found.groups()) < 1e-4
    assert "restored: True" in out


def test_an_exported_program_gives_the_same_numbers_in_a_process_without_transformers() -> None:
    out = printed_by("export_and_reload.py")
    assert "cpu.pt2 gives the same numbers: True" in out
    assert "portable.pt2, lowered here, gives the same numbers: True" in out
    assert "its kernels: kreg.grouped_matmul, kreg.tiled_indexer, kreg.tiled_sparse_attention" in out
    assert "transformers was imported: False" in out


def test_an_op_a_rule_and_a_kernel_of_ones_own_are_used_and_verified() -> None:
    out = printed_by("own_op.py")
    assert "mine.swiglu" in out
    assert "2 swiglu sites, all replaced and verified: True" in out
    found = re.search(r"largest difference from eager: (\S+)", out)
    assert found is not None
    assert float(found[1]) < 1e-5


def test_generation_gives_equal_tokens_and_only_prompts_run_rewritten_graphs() -> None:
    out = printed_by("generate.py", "--prompt", "96", "--new", "4", "--rounds", "1")
    assert out.count("equal tokens: True") == 2
    # of 6 runs, 2 are of the original; of the others 3 have 3 tokens behind the prompt's, and 1 has none
    for name in ("qwen3", "deepseek_v4"):
        assert f"{name}: 4 calls ran rewritten graphs, 9 the original code" in out
