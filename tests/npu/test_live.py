"""Live models of fake tensors on the fake NPU: ``kreg.rewrite(model, device="npu")``, and undone again."""

from __future__ import annotations

from collections import Counter

import pytest
from torch._subclasses import FakeTensorMode

import kreg
from tests.npu import fake
from tests.npu.by_kernels import Calls
from tests.npu.test_models import (
    DEEPSEEK,
    GQA,
    PLANS,
    PRODUCTS,
    check_calls,
    check_experts,
    check_operators,
    kernels_of,
    trained,
)


def live(name: str, length: int, plan: str) -> tuple[kreg.Report, Calls]:
    """A model's report after one step of training, and that step's calls; the step is held against eager's."""
    fake.with_mindspeed()
    mode = FakeTensorMode()
    model, inputs = fake.on_npu(fake.MODELS[name], mode), fake.tokens(mode, 1, length)
    _, eager = trained(model, inputs, mode)
    with mode:
        assert kreg.rewrite(model, "npu", inputs, verify=False, **PLANS[plan]) is model
    calls, found = trained(model, inputs, mode)
    report = kreg.report(model)
    assert found == eager
    assert report.calls.original == 0 and not report.calls.fallbacks
    kreg.restore(model)
    assert trained(model, inputs, mode)[0].kernels == {}
    return report, calls


@pytest.mark.parametrize("plan", ["SAS", "LI"])
def test_a_live_deepseek_v4_trains_through_its_kernels(plan: str) -> None:
    report, calls = live("deepseek_v4", 4096, plan)
    wanted = DEEPSEEK[plan]
    assert kernels_of(report) == wanted
    check_experts(report, plan, PRODUCTS["deepseek_v4"])
    replaced = [(site.kernel, site.trainable) for site in report.sites if site.kernel]  # the rest is no op here
    assert calls.of("forward") == Counter(kernel for kernel, _ in replaced)
    assert calls.of("backward") == Counter(kernel for kernel, trains in replaced if trains)
    check_operators(calls)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_a_live_gqa_model_trains_through_its_kernels(name: str) -> None:
    report, calls = live(name, 1024, "torch_npu only")
    assert kernels_of(report) == [GQA[name]] * 2
    check_experts(report, "torch_npu only", PRODUCTS.get(name, 0))
    check_calls(calls, report)
