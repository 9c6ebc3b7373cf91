"""What the generic rules cannot guess of models that see and hear, see `overrides`."""

from __future__ import annotations

from typing import Any

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
CLASSIFIER = TOWER | {"model_type": "vit", "num_labels": 64}

CONFIG: dict[str, dict[str, Any]] = {
    "instructblipvideo": {"video_token_index": 127, "num_query_tokens": 8},
    "dots3_note": {
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "vision_config.mlp_layer_types": ["dense", "sparse"],
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_output_size": 64,
    },
    # Codes of an image and the token that stands for each.
    "chameleon": {
        "vocabulary_map": {"<image>": 0}
        | {f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(i))}Z": 64 + i for i in range(32)},
    },
    "chameleon_vqgan": {"num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 2], "resolution": 64},
    "emu3": {
        "vocabulary_map": {"<image>": 0, "<|extra_200|>": 1} | {f"<|visual token {i:06d}|>": 64 + i for i in range(32)},
    },
    "emu3_vqgan": {"codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 2]},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "vision_config.image_size": 128,
        "vision_config.patch_size": 16,
    },
    "inkling_vision": {"num_hidden_layers": 4},
    "kosmos-2": {"latent_query_num": 8},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 768},
    "step3p5": {"sliding_window": 16},
    "t5gemma2_encoder": {"mm_tokens_per_image": 16},
    "pp_doclayout_v2": {
        "decoder_in_channels": [64, 64, 64],
        "class_thresholds": [0.0, 0.0],
        "class_order": [0, 1],
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "efficientnet": {"image_size": 64},
    "swin2sr": {"image_size": 16},  # windows of eight, and no stage halves the image
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2},
    "dpt": {
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [16, 32, 64, 64],
        "fusion_hidden_size": 32,
    },
    # Images are cut into crops of this size, which are the images of the encoders.
    "depth_pro": {
        "patch_size": 112,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [32, 32],
        "scaled_images_feature_dims": [64, 64, 32],
        "fusion_hidden_size": 32,
    },
    "sapiens2": {"num_hidden_layers": 2, "num_key_value_heads_per_layer": [4, 2]},
    "sapiens2_head": {"upsample_out_channels": [32, 32], "conv_out_channels": [32]},
    "vitmatte": {"fusion_hidden_sizes": [64, 32, 16, 16], "backbone_config.num_channels": 4},
    "pp_ocrv6_small_det": {
        "backbone_config": {
            "model_type": "pp_lcnet_v3",
            "scale": 0.75,
            "divisor": 16,
            "out_features": ["stage2", "stage3", "stage4", "stage5"],
        },
        "layer_list_out_channels": [48, 96, 192, 384],
    },
    "pp_ocrv5_server_det": {
        "kernel_list": [3, 2, 2],
        "scale_factor_list": [1, 2, 4, 8],
        "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
        | {
            f"{name}_{ratio}ratio": [3, 1, 1]
            for ratio in ("long", "mid", "short")
            for name in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
        },
    },
    "pe_video_encoder": {"vision_config": CLASSIFIER},
    # Chunks of four frames, each of which looks at two before it.
    "nemotron_asr_streaming_encoder": {"sliding_window": 9, "default_num_lookahead_tokens": 3},
    "omdet-turbo": {
        "image_size": 128,
        "apply_layernorm_after_vision_backbone": False,
        "backbone_config": {
            "model_type": "swin",
            "image_size": 128,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 4],
            "window_size": 4,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [32, 64, 128],
        "encoder_hidden_dim": 32,
        "vision_features_channels": [32, 32, 32],
        "text_projection_in_dim": 64,
        "text_projection_out_dim": 64,
        "class_embed_dim": 64,
        "decoder_hidden_dim": 32,
    },
    # Widths are given by stage, and stay.
    "sam2_hiera_det_model": {"hidden_size": 96, "image_size": [256, 256]},
    "sam2_vision_model": {"backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]]},
    "clap_audio_model": {
        "spec_size": 64,
        "window_size": 2,
        "depths": [1, 1, 1, 1],
        "hidden_size": 512,
        "patch_embeds_hidden_size": 64,
    },
    "muse_glimmer_assistant": {"target_layer_ids": [0, 1], "sliding_window": 64},
    "tvp": {"num_frames": 4, "max_img_size": 128, "visual_prompt_size": 16},
    "seggpt": {"image_size": [256, 128], "merge_index": 0, "intermediate_hidden_state_indices": [1, 1, 1, 1]},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "uvdoc": {"backbone_config.out_features": [f"stage{i}" for i in range(1, 7)]},
    "lw_detr": {"projector_scale_factors": [1.0]},
}
"""Fields by architecture."""

SHARED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    # timm's backbones and towers need torchvision; transformers' own may stand in their place.
    (
        ("detr", "conditional_detr", "dab-detr", "table-transformer"),
        {"backbone_config": RESNET | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    ),
    (("deformable_detr",), {"backbone_config": RESNET | {"out_features": ["stage2", "stage3", "stage4"]}}),
    (("fast_vlm", "perception_lm"), {"vision_config": TOWER | {"model_args": {"embed_dim": 64}}}),
    (("wav2vec2-bert", "wav2vec2-conformer"), {"vocab_size": 128}),
    # What their own validation asks for.
    (
        ("gemma4_assistant", "gemma4_unified_assistant"),
        {
            "text_config.hidden_size_per_layer_input": 0,
            "text_config.vocab_size_per_layer_input": 0,
            "text_config.num_hidden_layers": 2,
            "text_config.num_kv_shared_layers": 0,
            "text_config.layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # As many groups as channels.
    (("mimi", "mimi_decoder", "pocket_tts_audio_tokenizer_decoder"), {"upsample_groups": 64}),
    (
        (
            "edgetam_prompt_encoder",
            "edgetam_video_prompt_encoder",
            "sam2_prompt_encoder",
            "sam2_video_prompt_encoder",
        ),
        {"image_size": 256},
    ),
    # Heads double with every stage, and stay; so does the width of a head.
    (("donut-swin", "maskformer-swin", "swin", "swinv2"), {"embed_dim": 48}),
    (("mask2former", "maskformer", "oneformer"), {"backbone_config.depths": [1, 1, 2, 1]}),
    (("neucodec", "xcodec2"), {"quantization_dim": 128}),
    # Widths double with every ratio.
    (
        (
            "vibevoice_acoustic_tokenizer",
            "vibevoice_acoustic_tokenizer_decoder",
            "vibevoice_acoustic_tokenizer_encoder",
        ),
        {"num_filters": 2, "depths": [1] * 7},
    ),
)
"""Fields of several architectures."""
