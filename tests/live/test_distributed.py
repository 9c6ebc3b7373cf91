"""Scaling out is PyTorch's own: rewritten models under DDP, FSDP2, tensor and expert parallelism, in two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

import kreg
from kreg.rewriters.live.cuts import local_parts
from tests.models import qwen3, tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
SITES = {
    "ddp": "attention 2 of 2",
    "fsdp": "attention 2 of 2",
    "tp": "attention 2 of 2",
    "ep": "attention 2 of 2, grouped_matmul 4 of 4",
}
DEEPSEEK = "grouped_matmul 4 of 4, lightning_indexer 1 of 1, sparse_attention 2 of 2"
NOISE = 5e-6
"""Of a mean of float32 losses around 5, some of whose sums are made in another order."""


def printed_by_two_processes(*options: str) -> str:
    """What the example prints, started as torchrun starts it."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(EXAMPLE),
            *options,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The original code answers" not in done.stderr
    return done.stdout


def trains_as_one_process(out: str, mode: str, steps: int, sites: str) -> bool:
    """Both ranks ran rewritten layers at every step, and lost what one process loses."""
    ranks = re.findall(rf"^{mode}, rank (\d): replaced (.*); (\d+) calls rewritten, (\d+) original$", out, re.MULTILINE)
    found = re.search(rf"^{mode}: largest difference from one process: (\S+)$", out, re.MULTILINE)
    assert found is not None, out
    assert sorted(ranks) == [(rank, sites, str(steps), "0") for rank in "01"]
    return float(found[1]) < NOISE


def reads_its_checkpoint(out: str, mode: str) -> bool:
    """Written by a rewritten model: into a rewritten model again, and into one that kreg never saw."""
    pattern = rf"^{mode}, rank \d: loss (\S+), from a checkpoint (\S+), without kreg (\S+)$"
    losses = [tuple(map(float, line)) for line in re.findall(pattern, out, re.MULTILINE)]
    assert len(losses) == 2
    return all(again == before and abs(plain - before) < NOISE for before, again, plain in losses)


def test_every_parallelism_of_a_model_rewritten_after_trains_as_one_process_and_keeps_its_checkpoints(
    tmp_path: Path,
) -> None:
    modes = ("ddp", "fsdp", "tp", "ep")
    out = printed_by_two_processes("--mode", *modes, "--steps", "2", "--checkpoint", str(tmp_path))
    for mode in modes:
        assert trains_as_one_process(out, mode, 2, SITES[mode]), mode
        assert reads_its_checkpoint(out, mode), mode


@pytest.mark.slow
def test_a_model_may_be_rewritten_before_it_is_sharded(tmp_path: Path) -> None:
    modes = ("ddp", "fsdp", "tp")
    out = printed_by_two_processes(
        "--mode", *modes, "--steps", "3", "--rewrite", "before", "--checkpoint", str(tmp_path)
    )
    for mode in modes:
        assert trains_as_one_process(out, mode, 3, SITES[mode]), mode
        assert reads_its_checkpoint(out, mode), mode


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_deepseek_v4_trains_under_ddp_and_fsdp_in_either_order(order: str) -> None:
    out = printed_by_two_processes(
        "--mode", "ddp", "fsdp", "--model", "deepseek_v4", "--steps", "3", "--rewrite", order
    )
    for mode in ("ddp", "fsdp"):
        assert trains_as_one_process(out, mode, 3, DEEPSEEK), mode


# ---- in one process, which is a group of its own


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.DeviceMesh]:
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    torch._dynamo.reset()


def tensor_parallel(model: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def fully_sharded(model: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


INPUTS = {"input_ids": tokens(2, 16), "use_cache": False}


def test_a_model_may_be_rewritten_before_tensor_parallelism_too(group: dist.DeviceMesh) -> None:
    model = kreg.rewrite(qwen3(), example_inputs=INPUTS)
    want = model(**INPUTS).logits
    tensor_parallel(model, group)
    torch.testing.assert_close(model(**INPUTS).logits, want, rtol=2e-5, atol=2e-5)
    calls = kreg.report(model).calls
    assert (calls.rewritten, calls.original, calls.fallbacks) == (2, 0, {})


def test_the_run_that_captures_leaves_every_parameter_sharded(group: dist.DeviceMesh) -> None:
    model = kreg.rewrite(fully_sharded(qwen3(), group), example_inputs=INPUTS)
    assert kreg.report(model).summary == {"attention": {"found": 2, "replaced": 2}}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_model_whose_weights_are_to_come_is_captured_by_its_first_call(group: dist.DeviceMesh) -> None:
    source = qwen3()
    with torch.device("meta"):
        model = type(source)(source.config).eval()
    kreg.rewrite(model, device="cpu")
    fully_sharded(model, group).to_empty(device="cpu")
    set_model_state_dict(model, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    for name, buffer in source.named_buffers():
        model.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(model(**INPUTS).logits, source(**INPUTS).logits, rtol=2e-5, atol=2e-5)
    assert kreg.report(model).summary == {"attention": {"found": 2, "replaced": 2}}


def test_what_talks_to_other_ranks_is_in_no_part_that_may_be_run_again_and_keeps_its_order(
    group: dist.DeviceMesh,
) -> None:
    graphs: list[GraphModule] = []

    def backend(module: GraphModule, inputs: object) -> object:
        graphs.append(module)
        return module.forward

    model = tensor_parallel(qwen3(), group)
    torch.compile(model.model.layers[0], backend=backend)(
        torch.randn(2, 16, 32), position_embeddings=(torch.ones(1, 16, 8), torch.ones(1, 16, 8))
    )
    (graph,) = graphs
    before = [node.name for node in graph.graph.nodes if node.op.startswith("call_")]
    cut = local_parts(graph)
    assert cut is not None
    line, local = cut
    after = []
    for call in (node for node in line.graph.nodes if node.op == "call_module"):
        part = line.get_submodule(call.target)
        calls = [node for node in part.graph.nodes if node.op.startswith("call_")]
        after += [node.name for node in calls]
        talks = any(isinstance(node.meta["example_value"], DTensor) for node in part.graph.nodes if node.op != "output")
        assert talks is (call not in local)
    assert after == before
    assert any("softmax" in name for name in after)


@pytest.mark.parametrize("shard", [tensor_parallel, fully_sharded, lambda model, mesh: DistributedDataParallel(model)])
def test_a_sharded_model_is_not_exported_and_the_error_says_what_to_do(shard, group: dist.DeviceMesh) -> None:
    with pytest.raises(kreg.CaptureError, match=r"is sharded over processes|in several processes: export"):
        kreg.export(shard(qwen3(), group), INPUTS)
