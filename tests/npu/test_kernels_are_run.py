"""What these tests rest on: that kernels run on fake tensors, and that one which is wrong is seen to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import kreg
from kreg.registry import catalogue, library
from kreg.registry.calls import resolve
from kreg.registry.ops import BUILTIN_OPS
from tests.npu.by_kernels import by_kernels

pytest.importorskip("torch_npu", reason="torch_npu cannot be imported here: dev.py npu", exc_type=ImportError)

ATTENTION = next(op for op in BUILTIN_OPS if op.name == "attention")
B, H, S, D = 1, 4, 32, 64


def right(q: Any, k: Any, v: Any, *rest: Any, scale: float, **more: Any) -> Any:
    out = torch.ops.npu.npu_fusion_attention(q, k, v, H, "BNSD", scale=scale)[0]
    return out.transpose(1, 2).contiguous().transpose(1, 2), out.new_empty(B, H, S, dtype=torch.float32)


def of_another_layout(q: Any, k: Any, v: Any, *rest: Any, scale: float, **more: Any) -> Any:
    out = torch.ops.npu.npu_fusion_attention(q, k, v, H, "BNSD", scale=scale)[0]
    return out, out.new_empty(B, H, S, dtype=torch.float32)


def of_another_dtype(q: Any, k: Any, v: Any, *rest: Any, scale: float, **more: Any) -> Any:
    out, lse = right(q, k, v, scale=scale)
    return out, lse.half()


def of_another_signature(q: Any, k: Any, v: Any, *rest: Any, scale: float, **more: Any) -> Any:
    return torch.ops.npu.npu_fusion_attention(q, k, v, H, "BNSD", scale=scale, head_number=H)


def on_the_host(q: Any, k: Any, v: Any, *rest: Any, scale: float, **more: Any) -> Any:
    out, lse = right(q, k, v, scale=scale)
    return out, torch.empty(lse.shape)


def broken(*arguments: Any, **more: Any) -> Any:
    raise ArithmeticError("the gradient")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Registers a function as a kernel for the length of a test."""
    known = catalogue.catalogue()
    monkeypatch.setattr(known, "_contents", known._contents)

    def registered(function: Callable[..., Any], **options: Any) -> str:
        name = f"test.{function.__name__}"
        declared = {"op": "attention", "devices": ["npu"], "dtypes": ["bfloat16"], "trains": True}
        kreg.kernel(name=name, **declared, **options)(function)
        return name

    resolve.cache_clear()
    yield registered
    resolve.cache_clear()


def run(kernel: str) -> Any:
    """An attention by a kernel, and its gradient."""
    with FakeTensorMode():
        q, k, v = (torch.empty(B, H, S, D, dtype=torch.bfloat16, device="npu", requires_grad=True) for _ in "qkv")
        with by_kernels() as calls:
            out, _ = library.overload(ATTENTION)(q, k, v, scale=0.1, kernel=kernel)
            out.float().sum().backward()
    return calls


def test_a_kernel_that_is_right_runs_forward_and_backward(register: Any) -> None:
    calls = run(register(right))
    assert calls.of("forward") == calls.of("backward") == {"test.right": 1}
    # its gradient is autograd's, through the kernel run again
    assert calls.operators["npu_fusion_attention"] == 2 and calls.operators["npu_fusion_attention_grad"] == 1


@pytest.mark.parametrize("wrong", [of_another_layout, of_another_dtype, on_the_host])
def test_results_that_are_not_as_the_graph_has_them_are_seen(wrong: Any, register: Any) -> None:
    with pytest.raises(AssertionError, match=f"attention by test.{wrong.__name__}"):
        run(register(wrong))


def test_a_call_with_a_wrong_argument_is_not_answered_for_by_the_reference(register: Any) -> None:
    with pytest.raises(RuntimeError, match="head_number"):
        run(register(of_another_signature))


def test_a_kernel_that_cannot_be_had_is_not_taken_for_one_that_ran() -> None:
    resolve.cache_clear()
    with pytest.raises(AssertionError, match="not importable"):
        run("test.nowhere")


def test_a_backward_that_raises_is_judged_though_a_device_has_threads_of_its_own(register: Any) -> None:
    with pytest.raises(ArithmeticError, match="the gradient"):
        run(register(right, backward=f"{__name__}:broken"))
