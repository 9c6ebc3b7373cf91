"""Kernels that exclude each other are weighed for the whole model, although its layers are planned one by one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from kreg.api import analyse
from kreg.rewriters.report import Report
from tests.models import CSA, HCA, SLIDING, deepseek_v4

SAS, LI = "mindspeed.sas", "mindspeed.li"


def planned(*layers: str) -> Report:
    """For an Ascend device, with the sizes that MindSpeed's functions take."""
    torch._dynamo.reset()
    config = deepseek_v4(
        layers,
        num_attention_heads=64,
        head_dim=512,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=64,
        compress_rates={CSA: 4, HCA: 128},
        hc_mult=1,
        hc_sinkhorn_iters=1,
    ).config
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        inputs = {"input_ids": torch.zeros(1, 256, dtype=torch.long), "use_cache": False}
    return analyse(model, inputs, device="npu", dry_run=True)


@pytest.fixture(autouse=True)
def _no_choice_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KREG_ENABLE", "KREG_DISABLE"):
        monkeypatch.delenv(name, raising=False)


def test_the_first_layer_does_not_decide_for_those_after_it() -> None:
    report = planned(SLIDING, CSA)
    kernels = {site.kernel for site in report.sites if site.op != "grouped_matmul"}
    assert LI in kernels and SAS not in kernels
    sliding = next(site for site in report.sites if site.op == "sparse_attention")
    why = next(other.rejected for other in sliding.alternatives if other.kernel == SAS)
    assert f"it and {LI} exclude each other: the model takes an estimated" in why and why.endswith("us with it")


def test_what_is_better_for_more_layers_is_taken() -> None:
    report = planned(*[SLIDING] * 9, CSA)
    kernels = [site.kernel for site in report.sites if site.op == "sparse_attention"]
    assert kernels == [SAS] * 10
    assert all(site.kernel is None for site in report.sites if site.op == "lightning_indexer")
