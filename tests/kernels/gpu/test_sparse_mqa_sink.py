"""``sparse_mqa_sink``: the Triton kernel, on a GPU or interpreted, and the CPU kernel, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kreg.kernels.gpu import TARGETS, record
from kreg.kernels.gpu.targets import COMPILED
from kreg.kernels.sparse_mqa_sink import cpu, triton
from kreg.registry.ops import SPARSE_ATTENTION, SPARSE_MQA_SINK
from kreg.registry.ops.sparse_mqa_sink import random_slots

SAMPLES = 9


def check(forward: Callable[..., tuple[torch.Tensor, ...]], device: str, arguments: dict[str, Any]) -> None:
    """Compare an output with the reference's in float64."""
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    exact = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in arguments.items()
    }
    want = SPARSE_MQA_SINK.reference(**exact)
    got = forward(**arguments)
    fake = SPARSE_MQA_SINK.fake(**arguments)
    assert [(x.shape, x.dtype, x.stride()) for x in got] == [(x.shape, x.dtype, x.stride()) for x in fake]
    largest = float(want[0].abs().max()) if want[0].numel() else 0.0
    tolerance = SPARSE_MQA_SINK.tolerances[arguments["q"].dtype]
    assert tolerance.accepts(SPARSE_MQA_SINK.error(arguments, got, want), largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_kernel_gives_the_references_result_on_every_sample(dtype: torch.dtype, device: str) -> None:
    samples = list(SPARSE_MQA_SINK.samples(dtype, torch.Generator().manual_seed(0)))
    assert len(samples) == SAMPLES
    for arguments in samples:
        check(triton.forward, device, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_kernel_gives_the_references_result_on_every_sample(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "GATHERED_PER_TILE", 300)  # tiles of one token and of several
    for arguments in SPARSE_MQA_SINK.samples(dtype, torch.Generator().manual_seed(0)):
        check(cpu.forward, "cpu", arguments)


@pytest.mark.parametrize("apart", [False, True])
def test_pages_may_be_apart_in_memory_and_are_not_copied(apart: bool, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    pages = torch.randn(6, 8, 16, generator=g)[:, : 5 if apart else 8]
    call = {"q": torch.randn(3, 4, 16, generator=g), "kv": pages, "scale": 0.3}
    call["topk_indices"] = random_slots((3, 12), torch.int32, g, call)
    check(triton.forward, device, call)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    meta["kv"] = torch.empty(6, 8, 16, device="meta")[:, : pages.shape[1]]
    first = record("sm_90", triton.forward, **meta)[0].arguments
    assert first["PAGE"] == (5 if apart else 0)
    assert first["compressed"].untyped_storage()._cdata == meta["kv"].untyped_storage()._cdata


def test_it_is_sparse_attention_without_a_window() -> None:
    g = torch.Generator().manual_seed(0)
    arguments = next(call for call in SPARSE_MQA_SINK.samples(torch.float64, g) if len(call["q"]) > 1)
    q, indices = arguments["q"].transpose(0, 1).unsqueeze(0), arguments["topk_indices"].unsqueeze(0)
    entries = arguments["kv"].flatten(0, 1).unsqueeze(0)
    no_keys = entries[:, :0]
    sinks, scale = arguments["attn_sink"], arguments["scale"]
    out, _ = SPARSE_ATTENTION.reference(q, no_keys, entries, indices, sinks, scale=scale, window=1)
    torch.testing.assert_close(SPARSE_MQA_SINK.reference(**arguments)[0], out[0].transpose(0, 1))


@pytest.mark.parametrize("target", COMPILED)
def test_what_is_built_gathers_from_pages_side_by_side_and_apart(target: str) -> None:
    pages = {launch.arguments["PAGE"] for launch in triton.builds(TARGETS[target]) if "PAGE" in launch.arguments}
    assert pages == {0, 32}
