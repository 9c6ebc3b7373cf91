"""Models, inputs and programs as fake tensors on device "npu": shapes, dtypes and layouts, and no numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("torch_npu", reason="torch_npu cannot be imported here: dev.py npu", exc_type=ImportError)

STAND_INS = Path(__file__).parent / "stand_ins"
"""MindSpeed, as far as kreg calls it."""

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
DEVICE = torch.device("npu", 0)


def with_mindspeed() -> None:
    """Makes the stand-in for MindSpeed importable in this process."""
    if str(STAND_INS) not in sys.path:
        sys.path.insert(0, str(STAND_INS))


def on_npu(make: Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """A model whose parameters and buffers are fake and on the NPU."""
    with mode:
        return make().apply(_move)


def _move(module: nn.Module) -> None:
    """As ``Module.to``, which a model of fake tensors that share memory does not survive."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(_there(parameter), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = _there(buffer)


def _there(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="npu")


def tokens(mode: FakeTensorMode, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids."""
    with mode:
        return {"input_ids": torch.empty(batch, length, dtype=torch.int64, device="npu")}


def elsewhere(module: nn.Module) -> list[str]:
    """The nodes of a graph, its submodules' too, that have a value on another device."""
    parts = [part for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    return [
        str(node)
        for part in parts
        for node in part.graph.nodes
        for value in tree_leaves(node.meta.get("val"))
        if isinstance(value, torch.Tensor) and value.device != DEVICE
    ]


def deepseek_v4() -> nn.Module:
    """One layer of each kind, in the sizes of the real one; experts are few, and so are the words."""
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    layers = [SLIDING, CSA, HCA]
    config = DeepseekV4Config(
        vocab_size=1024,
        num_hidden_layers=len(layers),
        layer_types=layers,
        mlp_layer_types=["hash_moe"] * len(layers),
        n_routed_experts=8,
        hc_sinkhorn_iters=1,
        use_cache=False,
    )
    return _made(AutoModelForCausalLM, config)


def _decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        common = {"num_hidden_layers": 2, "vocab_size": 1024, "pad_token_id": 0, "use_cache": False}
        config = getattr(transformers, name)(**common, **options)
        return _made(transformers.AutoModelForCausalLM, config)

    return make


def _made(library: Any, config: Any) -> nn.Module:
    model: nn.Module = library.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
    return model.train()


LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "deepseek_v4": deepseek_v4,
    "qwen3": _decoder("Qwen3Config", num_key_value_heads=8),
    "llama": _decoder("LlamaConfig", num_key_value_heads=8),
    "gemma3": _decoder("Gemma3TextConfig", layer_types=LAYERS),
    "gpt_oss": _decoder("GptOssConfig", layer_types=LAYERS, num_local_experts=4, num_experts_per_tok=2),
}
"""Heads in groups, in the sizes of transformers' defaults; gemma3 and gpt_oss have a sliding layer and a causal one."""
