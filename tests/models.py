"""Tiny models for tests, by name: every size small, every weight random and none of them degenerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

VOCAB = 64
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYERS = (SLIDING, CSA, HCA)
WINDOW, TOPK, CSA_RATIO, HCA_RATIO = 16, 8, 4, 16


def randomized(model: nn.Module, seed: int, std: float = 0.15) -> nn.Module:
    """Parameters drawn anew: vectors (sinks, norms, biases) around what they were, matrices from a normal.

    Fresh models have zeros for sinks, biases and hyper-connections, under which many a mistake has no effect.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(std * noise)
            else:
                parameter.add_(0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of each token, in hash-routed layers
                experts = model.config.n_routed_experts  # type: ignore[union-attr]
                order = torch.rand(len(buffer), experts, generator=generator).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])
    return model


def deepseek_v4(
    layers: Sequence[str] = LAYERS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    experts: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """DeepSeek-V4 with the given layers, in eager attention, without a cache.

    Routing is by token (``hash_moe``), so rounding cannot send a token to other experts. ``experts`` is one
    of transformers' implementations; "batched_mm" is plain PyTorch.
    """
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": TOPK,
        "sliding_window": WINDOW,
        "compress_rates": {CSA: CSA_RATIO, HCA: HCA_RATIO},
        "layer_types": list(layers),
        "mlp_layer_types": ["hash_moe"] * len(layers),
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "max_position_embeddings": 512,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(DeepseekV4Config(**(options | overrides)))
    if experts or dtype is torch.float64:  # grouped matrix products know no float64
        model.config._experts_implementation = experts or "batched_mm"
    return randomized(model, seed).to(dtype).eval()


def _decoder(config: str, dtype: torch.dtype, seed: int, **options: Any) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(common | options)))
    return randomized(made, seed).to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> nn.Module:
    """Grouped heads, causal."""
    return _decoder("LlamaConfig", dtype, seed, num_hidden_layers=layers)


def qwen3(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Normalised queries and keys."""
    return _decoder("Qwen3Config", dtype, seed)


def gemma2(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Soft cap; one sliding layer, one causal."""
    return _decoder("Gemma2Config", dtype, seed, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)


def gemma3(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """One sliding layer, one causal, norms on queries and keys."""
    layers = ["sliding_attention", "full_attention"]
    return _decoder("Gemma3TextConfig", dtype, seed, sliding_window=6, layer_types=layers, query_pre_attn_scalar=8)


def gpt_oss(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Sinks; one sliding layer, one causal."""
    return _decoder("GptOssConfig", dtype, seed, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)


def mistral(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Sliding in every layer."""
    return _decoder("MistralConfig", dtype, seed, sliding_window=6)


def phi3(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Queries, keys and values from one projection."""
    return _decoder("Phi3Config", dtype, seed)


def gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Learned positions, biases everywhere."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        use_cache=False,
        attn_implementation="eager",
    )
    return randomized(transformers.AutoModelForCausalLM.from_config(config), seed).to(dtype).eval()


DECODERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (llama, qwen3, gemma2, gemma3, gpt_oss, mistral, phi3, gpt2)
}


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them 0, which some models pad with."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
