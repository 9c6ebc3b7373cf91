"""The stand-in for CANN: one Ascend910B, the real operators with their shape rules, and no arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import kreg
from kreg.registry.environment import Environment, availability
from tests.npu import fake

SCHEMAS = {
    "npu_fusion_attention": ("sparse_mode", "sink"),
    "npu_fusion_attention_grad": ("sparse_mode", "sink"),
    "npu_sparse_flash_attention": ("sparse_indices", "attention_mode"),
    "npu_lightning_indexer": ("sparse_count", "sparse_mode"),
    "npu_grouped_matmul": ("group_list", "split_item"),
}


def test_there_is_one_npu_of_a_known_kind() -> None:
    found = Environment.detect("npu")
    assert found.present and found.architecture == "Ascend910B1"
    assert torch.npu.device_count() == 1
    spec = kreg.registry.catalogue.catalogue().kernel("torch_npu.fusion_attention")
    assert availability(spec, found) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_operators_are_torch_npus_own(name: str) -> None:
    schema = getattr(torch.ops.npu, name).default._schema
    assert {argument.name for argument in schema.arguments} >= set(SCHEMAS[name])


def test_a_fake_call_has_the_shapes_and_dtypes_of_torch_npus_rule() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 8, 96, 128, dtype=torch.bfloat16, device="npu")
        k = torch.empty(2, 2, 96, 128, dtype=torch.bfloat16, device="npu")
        out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention(q, k, k, 8, "BNSD", scale=0.1)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, fake.DEVICE)
    assert maximum.shape == total.shape == (2, 8, 96, 8) and maximum.dtype == torch.float32


def test_a_call_that_its_schema_does_not_have_is_refused() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 8, 96, 128, dtype=torch.bfloat16, device="npu")
        with pytest.raises(RuntimeError, match="no_such_argument"):
            torch.ops.npu.npu_fusion_attention(q, q, q, 8, "BNSD", no_such_argument=1)
        with pytest.raises(RuntimeError, match="head_num"):
            torch.ops.npu.npu_fusion_attention(q, q, q, 8.5, "BNSD")


ON_THE_DEVICE = """
import torch, torch_npu
values = torch.arange(24.0).reshape(4, 6)
there = values.to("npu")
print(there.device, torch.equal(there.cpu(), values))
x = torch.ones(1, 8, 64, 64, dtype=torch.bfloat16).to("npu")
for call in (lambda: torch.ops.npu.npu_fusion_attention(x, x, x, 8, "BNSD")[0].cpu(), lambda: (x + 1).cpu()):
    try:
        print("computed", call().shape)
    except RuntimeError as error:
        print("refused")
"""


def test_memory_is_the_hosts_and_no_operator_seems_to_have_run() -> None:
    done = subprocess.run([sys.executable, "-c", ON_THE_DEVICE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == ["npu:0 True", "refused", "refused"]


LOADED = "import torch, kreg; print(kreg.registry.environment.Environment.detect('npu').present)"


def test_an_npu_is_there_for_kreg_when_torch_has_loaded_its_backend_by_itself() -> None:
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "True"
