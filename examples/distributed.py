"""Two processes and more: a rewritten model under data, tensor and expert parallelism, all of them PyTorch's own.

torchrun --nproc-per-node 2 examples/distributed.py --mode ddp       # every rank holds the model
torchrun --nproc-per-node 2 examples/distributed.py --mode fsdp      # FSDP2: every rank holds a part of each layer
torchrun --nproc-per-node 2 examples/distributed.py --mode tp        # every rank computes some heads of each layer
torchrun --nproc-per-node 2 examples/distributed.py --mode ep        # every rank computes some experts

--model deepseek_v4 for DeepSeek-V4 instead of Qwen3 (ddp, fsdp); --rewrite before | after | off: before the model is
sharded or after; --checkpoint FOLDER: writes the trained model there (DCP), and reads it again without kreg. Several
modes are run one after another: --mode ddp fsdp tp ep.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.distributed import DistributedConfig

import kreg

BATCH, LENGTH, VOCABULARY = 4, 64, 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "use_cache": False,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "deepseek_v4": DeepseekV4Config(
        **SIZES | {"num_attention_heads": 4, "num_key_value_heads": 1},
        layer_types=["sliding_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe"] * 2,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=8,
        sliding_window=16,
        n_routed_experts=4,
        moe_intermediate_size=32,
        num_experts_per_tok=2,
        hc_mult=2,
        hc_sinkhorn_iters=3,
    ),
}


def new_model(name: str) -> nn.Module:
    """The same random weights in every process."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").train()


def sharded(model: nn.Module, mode: str) -> nn.Module:
    """The model under PyTorch's own parallelism; ep is transformers' own, see `with_shared_experts`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if mode == "ddp":
        selects = hasattr(model.config, "index_topk")  # an indexer only selects: its weights have no gradient
        return DistributedDataParallel(model, find_unused_parameters=selects)
    if mode == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    columns = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
    columns |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
    rows = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer, mesh, columns | rows)
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):  # whole, but each rank sees only its heads
            norm.weight.register_post_accumulate_grad_hook(lambda weight: dist.all_reduce(weight.grad))
    return model


def with_shared_experts(name: str) -> nn.Module:
    """A model whose experts are spread over the ranks, as transformers does it while it loads one."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        new_model(name).save_pretrained(folder[0])
    dist.barrier()
    size = dist.get_world_size()
    spread = DistributedConfig(tp_size=size, ep_size=size, ep_implementation="all_to_all")
    return AutoModelForCausalLM.from_pretrained(
        folder[0], attn_implementation="eager", distributed_config=spread
    ).train()


def train(model: nn.Module, batches: torch.Tensor) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_of(model: nn.Module, batch: torch.Tensor) -> float:
    """The loss, without training."""
    with torch.no_grad():
        return model(input_ids=batch, labels=batch).loss.item()


def read_again(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the weights of a distributed checkpoint, and nothing of those it had."""
    weights = get_model_state_dict(model)
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    return model


def say(mode: str, line: str) -> None:
    """Prints what each rank has to say, in order."""
    lines = [""] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    if dist.get_rank() == 0:
        for rank, said in enumerate(lines):
            print(f"{mode}, rank {rank}: {said}", flush=True)


def run(mode: str, name: str, rewrite: str, steps: int, checkpoint: Path | None) -> None:
    """Trains a model, and prints what became of it in this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(VOCABULARY, (steps, BATCH, LENGTH), generator=generator)
    mine = batches[:, rank::ranks] if mode in ("ddp", "fsdp") else batches
    example = {"input_ids": mine[0]}  # any input of this rank's size

    model = with_shared_experts(name) if mode == "ep" else new_model(name)
    inner = model
    if rewrite == "before":
        kreg.rewrite(inner, example_inputs=example)
    if mode != "ep":
        model = sharded(model, mode)
    if rewrite == "after":
        kreg.rewrite(inner, example_inputs=example)

    losses = train(model, mine)
    say(mode, f"losses {' '.join(f'{loss:.6f}' for loss in losses)}")
    if rewrite != "off":
        found = kreg.report(inner)
        sites = ", ".join(f"{op} {n['replaced']} of {n['found']}" for op, n in sorted(found.summary.items()))
        calls = f"{found.calls.rewritten} calls rewritten, {found.calls.original} original"
        say(mode, f"replaced {sites}; {calls}")

    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    if rank == 0:
        alone = torch.tensor(train(new_model(name), batches))
        difference = (mean / ranks - alone).abs().max().item()
        print(f"{mode}: largest difference from one process: {difference:.1e}", flush=True)
    if checkpoint is not None:
        folder = checkpoint / mode
        before = loss_of(model, mine[0])
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
        plain = with_shared_experts(name) if mode == "ep" else sharded(new_model(name), mode)  # kreg never sees it
        after = [loss_of(read_again(reader, folder), mine[0]) for reader in (model, plain)]
        say(mode, f"loss {before:.6f}, from a checkpoint {after[0]:.6f}, without kreg {after[1]:.6f}")
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=("ddp", "fsdp", "tp", "ep"), default=["fsdp"])
    parser.add_argument("--model", choices=("qwen3", "deepseek_v4"), default="qwen3")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rewrite", choices=("before", "after", "off"), default="after")
    parser.add_argument("--checkpoint", type=Path)
    asked = parser.parse_args()
    if "tp" in asked.mode and asked.model != "qwen3":
        parser.error("the plan for tp is Qwen3's")
    if "ep" in asked.mode and asked.rewrite == "before":
        parser.error("transformers spreads the experts while it loads the model: there is nothing to rewrite before")

    dist.init_process_group("gloo")
    for mode in asked.mode:
        name = "qwen3_moe" if mode == "ep" else asked.model
        run(mode, name, asked.rewrite, asked.steps, asked.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
