"""Tiny models with an indexer, by name. Sequences are longer than the top-k, so that a selection drops something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB = 96
BATCH, QUERIES, TOPK = 2, 48, 8

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "attn_implementation": "eager",
}
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
GROUPS: dict[str, Any] = {"n_group": 1, "topk_group": 1}
MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,  # not the keys' 24: values are their own tensor
}
INDEX: dict[str, Any] = {"index_topk": TOPK, "index_head_dim": 16, "index_n_heads": 4}
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse"]
FULL_SHARED_FULL = ["full", "shared", "full"]


def axk2() -> nn.Module:
    """Every layer indexed; queries and an output gate from one projection."""
    from transformers import AXK2Config, AXK2ForCausalLM

    options = COMMON | EXPERTS | MLA | INDEX | {"gated_norm_rank": 8}
    return AXK2ForCausalLM(AXK2Config(num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], **options))


def deepseek_v32() -> nn.Module:
    """Every layer indexed."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    options = COMMON | EXPERTS | GROUPS | MLA | INDEX
    return DeepseekV32ForCausalLM(
        DeepseekV32Config(num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], **options)
    )


def dots3_note() -> nn.Module:
    """Indexed, sliding, indexed; sliding layers have sizes of their own."""
    from transformers import Dots3NoteForCausalLM, Dots3NoteTextConfig

    options = COMMON | EXPERTS | GROUPS | MLA | INDEX | {
        "head_dim": 24,
        "sliding_window": 16,
        "shared_experts_intermediate_size": 32,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
    }  # fmt: skip
    return Dots3NoteForCausalLM(Dots3NoteTextConfig(num_hidden_layers=3, **options))


def glm5_next() -> nn.Module:
    """A linear (KDA) layer, an indexed one, one that shares its selection; pools of 2 positions.

    The text model: the architecture has no causal LM of its own, only an image-text model around this.
    """
    from transformers import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

    options = COMMON | EXPERTS | GROUPS | MLA | INDEX | {
        "qk_rope_head_dim": 0,
        "index_kpool": 2,
        "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "indexer_types": ["full", "full", "shared"],
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    }  # fmt: skip
    return Glm5NextTextModel(Glm5NextTextConfig(num_hidden_layers=3, **options))


def glm_moe_dsa() -> nn.Module:
    """Indexed, sharing the selection before it, indexed."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    options = COMMON | EXPERTS | GROUPS | MLA | INDEX
    return GlmMoeDsaForCausalLM(
        GlmMoeDsaConfig(
            num_hidden_layers=3, mlp_layer_types=DENSE_THEN_SPARSE, indexer_types=FULL_SHARED_FULL, **options
        )
    )


def hy_v4() -> nn.Module:
    """Indexed, sharing, indexed; attention sinks, an output gate, hyper-connections."""
    from transformers import HYV4Config, HYV4ForCausalLM

    options = COMMON | EXPERTS | GROUPS | MLA | INDEX | {"hc_mult": 2}
    return HYV4ForCausalLM(
        HYV4Config(num_hidden_layers=3, mlp_layer_types=DENSE_THEN_SPARSE, indexer_types=FULL_SHARED_FULL, **options)
    )


def minimax_m3() -> nn.Module:
    """A full layer and two that select 3 blocks of 5 keys for each of 2 key heads: 48 keys are 10 blocks, one short."""
    from transformers import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    options = COMMON | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": DENSE_THEN_SPARSE,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 5,
        "index_topk_blocks": 3,
        "index_local_blocks": 1,
    }  # fmt: skip
    return MiniMaxM3VLForCausalLM(
        MiniMaxM3VLTextConfig(num_hidden_layers=3, **_without(options, "moe_intermediate_size"))
    )


def mistral_large4() -> nn.Module:
    """Indexed; sharing its selection; indexed with the latent keys of layer 0; indexed without rotary positions.

    The text model: the architecture has no causal LM of its own, only an image-text model around this.
    """
    from transformers import MistralLarge4TextConfig
    from transformers.models.mistral_large4.modeling_mistral_large4 import MistralLarge4TextModel

    options = _without(COMMON | EXPERTS | GROUPS | MLA | INDEX, "q_lora_rank") | {
        "indexer_types": ["full", "shared", "full", "full"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "no_rope_layers": [1, 1, 1, 0],
        "kv_source_layers": [0, 1, 0, 3],
    }
    return MistralLarge4TextModel(MistralLarge4TextConfig(num_hidden_layers=4, **options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        axk2,
        deepseek_v32,
        dots3_note,
        glm5_next,
        glm_moe_dsa,
        hy_v4,
        minimax_m3,
        mistral_large4,
    )
}


def indexed_model(name: str, padding: str = "", attention: str = "eager") -> tuple[nn.Module, dict[str, Any]]:
    """One of `MODELS` in evaluation mode, and its inputs.

    Args:
        padding: "left" or "right" adds an attention mask that drops some positions of the second row.
        attention: transformers' implementation.
    """
    torch.manual_seed(0)
    model = randomized(MODELS[name]())
    model.set_attn_implementation(attention)  # type: ignore[operator]
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, VOCAB, (BATCH, QUERIES)), "use_cache": False}
    if padding:
        keep = torch.ones(BATCH, QUERIES, dtype=torch.int64)
        keep[1, slice(None, 7) if padding == "left" else slice(-7, None)] = 0
        inputs["attention_mask"] = keep
    return model.eval(), inputs


def randomized(model: nn.Module) -> nn.Module:
    """Weights away from their initial zeros and ones, so that every part of a model counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return model


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}
