"""What is declared for ops to come, against the real torch_npu: its operators, and the gradients that specs claim."""

from __future__ import annotations

import pytest
import torch

from kreg.registry.catalogue import Catalogue
from kreg.registry.ops.to_come import OPS_TO_COME
from kreg.registry.spec import KernelSpec

torch_npu = pytest.importorskip(
    "torch_npu", reason="torch_npu cannot be imported here: dev.py npu", exc_type=ImportError
)

SPECS = [
    spec
    for spec in Catalogue.builtin(packages=False).specs.values()
    if spec.op in OPS_TO_COME and spec.provider == "torch_npu"
]
GRADIENTS = ("_backward", "_grad")
KEY = "AutogradPrivateUse1"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_torch_npu_has_the_function_and_the_operator_of_its_name(spec: KernelSpec) -> None:
    name = spec.entry.removeprefix("torch_npu:")
    assert spec.entry_point() is getattr(torch_npu, name)
    assert getattr(torch.ops.npu, name).default._schema.name == f"npu::{name}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_trains_has_a_gradient_and_what_does_not_has_none(spec: KernelSpec) -> None:
    name = spec.entry.removeprefix("torch_npu:")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", KEY)
    operators = [end for end in GRADIENTS if hasattr(torch.ops.npu, f"{name}{end}")]
    assert (registered, bool(operators)) == (spec.trains, spec.trains)


def test_only_the_form_for_inference_is_declared_without_a_gradient() -> None:
    assert [spec.name for spec in SPECS if not spec.trains] == ["torch_npu.chunk_gated_delta_rule"]
