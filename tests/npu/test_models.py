"""Whole models on the fake NPU, rewritten with each plan: every call of torch_npu is checked by torch_npu itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import nn
from torch._subclasses import FakeTensorMode

import kreg
from kreg import Report
from tests.npu import fake
from tests.npu.by_kernels import Calls, by_kernels

PLANS: dict[str, dict[str, list[str]]] = {
    "SAS": {"enable": ["mindspeed.sas"]},
    "LI": {"enable": ["mindspeed.li"]},
    "torch_npu only": {"disable": ["mindspeed.*"]},
    "nothing": {"disable": ["mindspeed.*", "torch_npu.*"]},
}

WINDOW, SELECTED = "torch_npu.fusion_window", "torch_npu.sparse_flash_attention"
DEEPSEEK = {  # the sliding layer's attention; the indexer and the attention of CSA; the attention of HCA
    "SAS": ["mindspeed.sas", None, "mindspeed.sas", "mindspeed.sas"],
    "LI": [WINDOW, "mindspeed.li", SELECTED, SELECTED],
    "torch_npu only": [WINDOW, None, SELECTED, SELECTED],
    "nothing": [None, None, None, None],
}
GQA = {
    "qwen3": "torch_npu.fusion_attention",
    "llama": "torch_npu.fusion_attention",
    "gemma3": "torch_npu.fusion_attention",
    "gpt_oss": "torch_npu.fusion_attention_sinks",
}
PRODUCTS = {"deepseek_v4": 6, "gpt_oss": 4}
"""Two for each layer with experts."""
OPERATORS = {
    "torch_npu.fusion_attention": "npu_fusion_attention",
    "torch_npu.fusion_attention_sinks": "npu_fusion_attention",
    WINDOW: "npu_fusion_attention",
    SELECTED: "npu_sparse_flash_attention",
}
"""The operator of torch_npu that a kernel calls; its gradient is ``<operator>_grad``."""


@pytest.fixture
def mode() -> FakeTensorMode:
    fake.with_mindspeed()
    return FakeTensorMode()


def kernels_of(report: Report) -> list[str | None]:
    """What each attention and each indexer got, in the order of the graph."""
    return [site.kernel for site in report.sites if site.op != "grouped_matmul"]


def check_experts(report: Report, plan: str, products: int) -> None:
    """The products of the experts: as many as there are, all by torch_npu where the plan has it."""
    wanted = None if plan == "nothing" else "torch_npu.grouped_matmul"
    assert [site.kernel for site in report.sites if site.op == "grouped_matmul"] == [wanted] * products


def trained(model: nn.Module, inputs: dict[str, Any], mode: FakeTensorMode) -> tuple[Calls, dict[str, Any]]:
    """A step's calls, and its logits and gradients by name, as (shape, dtype, device)."""
    for parameter in model.parameters():
        parameter.grad = None
    with mode, by_kernels() as calls:
        logits = model(**inputs).logits
        logits.float().sum().backward()
    found = {"logits": logits, **{name: p.grad for name, p in model.named_parameters()}}
    return calls, {n: None if t is None else (tuple(t.shape), t.dtype, t.device) for n, t in found.items()}


def check_calls(calls: Calls, report: Report) -> None:
    """Each site ran its kernel once each way, by torch_npu's operators; gradients only where they flow."""
    names = [(site.kernel or "", site.trainable) for site in report.sites]
    assert calls.of("forward") == Counter(name for name, _ in names)
    assert calls.of("backward") == Counter(name for name, trains in names if trains)
    check_operators(calls)


def check_operators(calls: Calls) -> None:
    """torch_npu's operators ran as often as the kernels that call them."""
    for direction, suffix in (("forward", ""), ("backward", "_grad")):
        wanted: Counter[str] = Counter()
        for kernel, count in calls.of(direction).items():
            if kernel in OPERATORS:
                wanted[OPERATORS[kernel] + suffix] += count
        assert wanted == {name: calls.operators[name] for name in wanted}
    products, gradients = (calls.of(way)["torch_npu.grouped_matmul"] for way in ("forward", "backward"))
    assert calls.operators["npu_grouped_matmul"] == products + gradients  # the rows' gradient is one more
    assert calls.operators["npu_grouped_matmul_add"] == gradients


def check_plans(name: str, length: int, wanted: dict[str, Any], mode: FakeTensorMode, subtests: Any) -> None:
    """One portable program, lowered with each plan, trains one step on fake tensors as the model does."""
    model, inputs = fake.on_npu(fake.MODELS[name], mode), fake.tokens(mode, 1, length)
    _, eager = trained(model, inputs, mode)
    portable = kreg.export(model, inputs, device="npu", portable=True, verify=False)
    for which, plan in PLANS.items():
        with subtests.test(which):
            lowered = kreg.lower(portable, "npu", verify=False, **plan)
            report = kreg.program_report(lowered)
            assert report is not None and kernels_of(report) == wanted[which]
            check_experts(report, which, PRODUCTS.get(name, 0))
            assert fake.elsewhere(lowered.graph_module) == []
            calls, found = trained(lowered.module(), inputs, mode)
            check_calls(calls, report)
            assert found == eager


def test_deepseek_v4_trains_with_sas_with_li_with_torch_npu_only_and_with_nothing(
    mode: FakeTensorMode, subtests: Any
) -> None:
    check_plans("deepseek_v4", 4096, DEEPSEEK, mode, subtests)


@pytest.mark.parametrize("name", GQA)
def test_a_gqa_model_trains_with_every_plan(name: str, mode: FakeTensorMode, subtests: Any) -> None:
    kernels: dict[str, list[str | None]] = {plan: [GQA[name]] * 2 for plan in PLANS}
    kernels["nothing"] = [None, None]
    check_plans(name, 1024, kernels, mode, subtests)
