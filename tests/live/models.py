"""Small models with random weights, as a user trains them: two or three layers, hidden size 64, an id for each byte.

What decides by comparing would make a curve jump where rounding decides otherwise, with kreg and without. So that few
such decisions are close, DeepSeek-V4's experts go by the token (``hash_moe``) and its indexer has 16 heads: with a
few, scores are exactly 0 (every head's product negative) often enough to be equal at the edge of the selection. Qwen3
MoE's experts are chosen by scores, and so is what an indexer keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests import models
from tests.models import CSA, HCA

BYTES = 256


def _qwen3(config: str, seed: int, **options: Any) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": BYTES,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(common | options)))
    return models.randomized(made, seed, std=0.06).train()


def qwen3(seed: int = 0, **options: Any) -> nn.Module:
    """Dense, with PyTorch's fused attention, as transformers has it by default."""
    return _qwen3("Qwen3Config", seed, **options)


def qwen3_moe(seed: int = 0, **options: Any) -> nn.Module:
    """Four experts, two for each token, and attention written out."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return _qwen3("Qwen3MoeConfig", seed, **({"attn_implementation": "eager"} | experts | options))


def deepseek_v4(seed: int = 0, layers: tuple[str, ...] = (CSA, HCA), **options: Any) -> nn.Module:
    """A layer that attends to selected entries of 4 tokens, and one that attends to all entries of 16."""
    made = models.deepseek_v4(layers, seed=seed, **({"vocab_size": BYTES, "index_n_heads": 16} | options))
    return models.randomized(made, seed, std=0.06).train()


MODELS: dict[str, Callable[..., nn.Module]] = {b.__name__: b for b in (qwen3, qwen3_moe, deepseek_v4)}
