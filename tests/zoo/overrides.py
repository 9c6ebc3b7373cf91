"""What the generic rules cannot guess, by architecture: fields of its configuration, dotted into nested ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from tests.zoo import perception

CONFIG: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    # Longer sequences than (5 + 2 * random) blocks are attended to sparsely.
    "big_bird": {"block_size": 4, "num_random_blocks": 2},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 2},
    # All parts have one width, except for the global part, which has that of two cross-attended bytes.
    "blt": {
        "global_config.hidden_size": 128,
        "global_config.intermediate_size": 96,
        "encoder_config.hidden_size_global": 128,
        "decoder_config.hidden_size_global": 128,
        "local_attention_window_len": 16,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "o_groups": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    # The last layers take the keys of layers before them, of their own kind.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "glm5_next_text": {"index_kpool": 4, "hc_mult": 2, "hc_sinkhorn_iters": 3},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 2, "L_bp_cycles": [2]},
    "hunyuan_v1_dense": {"head_dim": 16, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2},
    "informer": {"distil": False},  # traced masks are not halved with the sequence
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},
    "hunyuan_vl_text": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]},
    },
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "index_n_heads": 2,
    },
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # The axes' product is the longest sequence, their sum the width.
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [24, 40],
        "max_position_embeddings": 64,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 8,
    },
    "shieldgemma2": {"yes_token_index": 100, "no_token_index": 101},
    "xmod": {"default_language": "en_XX"},
    # The hybrid layers share one attention.
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
}
CONFIG |= perception.CONFIG
"""Fields by architecture."""

SHARED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    # Sections of the rotary embedding have a default in the model, not in the configuration.
    (
        (
            "glm4v_text",
            "glm_image_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
        ),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
    ),
    # The token of images is not set, and the number of queries decides how often it has to be there.
    (("blip-2", "instructblip"), {"image_token_index": 127, "num_query_tokens": 8}),
    (
        ("autoformer", "informer", "time_series_transformer"),
        {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1},
    ),
    *perception.SHARED,
)
"""Fields of several architectures."""


def overrides_for(name: str) -> dict[str, Any]:
    """All rows that concern an architecture, or a configuration of this type that is nested in another one."""
    shared = {field: value for names, row in SHARED if name in names for field, value in row.items()}
    return deepcopy(shared | CONFIG.get(name, {}))  # configurations change what they are given
