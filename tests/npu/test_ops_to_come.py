"""What is declared for ops to come, against the real torch_npu: its operators, and the gradients that specs claim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException

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


BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "npu_rms_norm": (((BF16, 2, 4, 64), (BF16, 64), 1e-6), {}, (2, 4, 64)),
    "npu_rotary_mul": (((BF16, 2, 4, 8, 64), (BF16, 1, 1, 8, 64), (BF16, 1, 1, 8, 64)), {}, (2, 4, 8, 64)),
    "npu_swiglu": (((BF16, 4, 64),), {}, (4, 32)),
    "npu_moe_token_permute": (((BF16, 4, 64), (I64, 4, 2)), {}, (8, 64)),
    "npu_moe_token_unpermute": (((BF16, 8, 64), (I32, 8), (BF16, 4, 2)), {}, (4, 64)),
    "npu_mhc_pre": (((BF16, 2, 8, 4, 64), (F32, 24, 256), (F32, 3), (F32, 24)), {"out_flag": 1}, (2, 8, 64)),
    "npu_mhc_post": (((BF16, 2, 8, 4, 64), (F32, 2, 8, 4, 4), (BF16, 2, 8, 64), (F32, 2, 8, 4)), {}, (2, 8, 4, 64)),
    "npu_mhc_sinkhorn": (((F32, 2, 8, 4, 4),), {"out_flag": 1}, (2, 8, 4, 4)),
    "npu_chunk_gated_delta_rule": (
        ((BF16, 8, 4, 128), (BF16, 8, 4, 128), (BF16, 8, 8, 128)),
        {"beta": (BF16, 8, 8), "initial_state": (BF16, 1, 8, 128, 128), "actual_seq_lengths": (I32, 1)}
        | {"scale": 0.1, "g": (F32, 8, 8)},
        (8, 8, 128),
    ),
}
"""By operator: a call of documented sizes, tensors as (dtype, *shape); and the shape of its first result."""

WITHOUT_A_RULE = ("npu_mhc_pre", "npu_mhc_post", "npu_mhc_sinkhorn")
"""Those whose gradient has no shape rule in torch_npu 2.13."""


def made(value: Any) -> Any:
    """A fake leaf on the NPU for (dtype, *shape); anything else as it is."""
    if not isinstance(value, tuple):
        return value
    dtype, *shape = value
    return torch.empty(shape, dtype=dtype, device="npu", requires_grad=dtype.is_floating_point)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_torch_npu_takes_a_call_of_documented_sizes_and_its_gradient_where_there_is_a_rule(spec: KernelSpec) -> None:
    name = spec.entry.removeprefix("torch_npu:")
    given, named, shape = CALLS[name]
    with FakeTensorMode():
        tensors, more = [made(x) for x in given], {key: made(x) for key, x in named.items()}
        found = getattr(torch.ops.npu, name)(*tensors, **more)
        out = found[0] if isinstance(found, tuple) else found
        assert (tuple(out.shape), out.dtype, out.device.type) == (shape, tensors[0].dtype, "npu")
        if not spec.trains:
            return
        if name in WITHOUT_A_RULE:
            with pytest.raises(UnsupportedOperatorException, match=f"{name}_backward"):
                out.sum().backward()
            return
        out.sum().backward()
        assert tensors[0].grad is not None and tensors[0].grad.shape == tensors[0].shape
