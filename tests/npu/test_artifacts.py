"""A portable program, saved on a CPU, is lowered for the NPU, saved again, and loaded by a process with torch_npu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_npu", reason="torch_npu cannot be imported here: dev.py npu", exc_type=ImportError)

ROOT = Path(__file__).parents[2]

SAVED_ON_A_CPU = """
import sys, torch, kreg
from tests.models import CSA, SLIDING, deepseek_v4, tokens
assert "torch_npu" not in sys.modules and not hasattr(torch, "npu")
real = dict(num_attention_heads=64, head_dim=512, sliding_window=128, index_n_heads=64, index_head_dim=128,
            compress_rates={CSA: 4, "heavily_compressed_attention": 128}, max_position_embeddings=2048)
model = deepseek_v4([SLIDING, CSA], torch.bfloat16, **real)
program = kreg.export(model, {"input_ids": tokens(1, 512)}, portable=True, verify=False)
torch.export.save(program, sys.argv[1])
"""

LOWERED_FOR_AN_NPU = """
import sys, torch, torch_npu, kreg
from tests.npu import fake
fake.with_mindspeed()
portable = torch.export.load(sys.argv[1])
lowered = kreg.lower(portable, "npu", verify=False, enable=["mindspeed.li"])
torch.export.save(lowered, sys.argv[2])
"""

LOADED_WITH_TORCH_NPU = """
import json, sys, torch, torch_npu, kreg
from collections import Counter
from torch._subclasses import FakeTensorMode
from tests.npu import fake
from tests.npu.by_kernels import by_kernels
fake.with_mindspeed()
before, after = (torch.export.load(path) for path in sys.argv[1:])
print(json.dumps(Counter(site.kernel for site in kreg.program_report(after).sites)))
print(fake.elsewhere(after.graph_module), {str(value.device) for value in after.state_dict.values()})
print(all(torch.equal(value, after.state_dict[name].cpu()) for name, value in before.state_dict.items()))
mode = FakeTensorMode()
loaded = after.module()
module = fake.on_npu(lambda: loaded, mode)
with mode, by_kernels() as calls:
    logits = module(**fake.tokens(mode, 1, 512))["logits"]
    logits.float().sum().backward()
print(tuple(logits.shape), logits.device, module.get_parameter("lm_head.weight").grad.device)
print(json.dumps({way: calls.of(way) for way in ("forward", "backward")}))
"""

WANTED = {
    "torch_npu.fusion_window": 1,
    "mindspeed.li": 1,
    "torch_npu.sparse_flash_attention": 1,
    "torch_npu.grouped_matmul": 4,
}


def run(code: str, *paths: Path) -> list[str]:
    """What a program prints, in a process of its own."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_program_saved_on_a_cpu_is_lowered_for_an_npu_and_loads_where_torch_npu_is(tmp_path: Path) -> None:
    portable, lowered = tmp_path / "portable.pt2", tmp_path / "lowered.pt2"
    run(SAVED_ON_A_CPU, portable)
    run(LOWERED_FOR_AN_NPU, portable, lowered)
    kernels, places, same, result, calls = run(LOADED_WITH_TORCH_NPU, portable, lowered)[-5:]
    assert json.loads(kernels) == WANTED
    assert places == "[] {'npu:0'}"
    assert same == "True"  # the weights are those that were saved
    assert result == "(1, 512, 64) npu:0 npu:0"
    trains = {name: count for name, count in WANTED.items() if name != "mindspeed.li"}
    assert json.loads(calls) == {"forward": WANTED, "backward": trains}
