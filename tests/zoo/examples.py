"""Inputs of the architectures whose parameters' names do not tell them, by family and name."""

from __future__ import annotations

from typing import Any

INPUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    # Without masks it looks for padding, and makes masks of what it finds.
    "seq2seq/fsmt": {
        "input_ids": ("ids", 2, 48),
        "attention_mask": ("mask", 2, 48),
        "decoder_input_ids": ("ids", 2, 32),
        "decoder_attention_mask": ("mask", 2, 32),
    },
    # Without a mask of padding they make one in eager Python and none while they are traced.
    "seq2seq/longt5": {
        "input_ids": ("ids", 2, 48),
        "attention_mask": ("mask", 2, 48),
        "decoder_input_ids": ("ids", 2, 32),
    },
    "seq2seq/switch_transformers": {
        "input_ids": ("ids", 2, 48),
        "attention_mask": ("mask", 2, 48),
        "decoder_input_ids": ("ids", 2, 32),
    },
    "audio/seamless_m4t": {"input_features": ("float", 2, 48, 160), "decoder_input_ids": ("ids", 2, 32)},
    "audio/seamless_m4t_v2": {"input_features": ("float", 2, 48, 160), "decoder_input_ids": ("ids", 2, 32)},
    "audio/musicgen_melody": {"input_ids": ("ids", 2, 24), "decoder_input_ids": ("ids", 8, 32)},
    "audio/musicgen": {"input_ids": ("ids", 2, 24), "decoder_input_ids": ("ids", 8, 32)},
    "audio/granite_speech5_ctc": {"input_features": ("float", 2, 96, 320)},
    "audio/dia": {"input_ids": ("ids", 2, 48), "decoder_input_ids": ("ids", 2, 32, 9)},
    "audio/kyutai_speech_to_text": {"input_ids": ("ids", 2, 32, 33)},
    "audio/speech-encoder-decoder": {"input_values": ("float", 2, 8000), "decoder_input_ids": ("ids", 2, 32)},
    "vision/depth_pro": {"pixel_values": ("float", 1, 3, 448, 448)},
    # The last of four halvings leaves four pieces by four, not one.
    "vision/mask2former": {"pixel_values": ("float", 2, 3, 128, 128)},
    "vision/maskformer": {"pixel_values": ("float", 2, 3, 128, 128)},
    "vision/oneformer": {"pixel_values": ("float", 2, 3, 128, 128), "task_inputs": ("ids", 2, 77)},
    "vision/pp_ocrv6_small_rec": {"pixel_values": ("float", 2, 3, 48, 320)},
    "vision/pp_ocrv6_tiny_rec": {"pixel_values": ("float", 2, 3, 48, 320)},
    # Their features of several images would have to be copied to be seen as the model wants to see them.
    "vision/edgetam_video": {"pixel_values": ("float", 1, 3, 256, 256)},
    "vision/sam2_video": {"pixel_values": ("float", 1, 3, 256, 256)},
    "vision/shieldgemma2": {"input_ids": ("ids", 2, 48)},
    "vision/siglip2": {
        "pixel_values": ("float", 2, 64, 768),
        "pixel_attention_mask": ("mask", 2, 64),
        "spatial_shapes": ("eights", 2, 2),
    },
    "audio/wav2vec2-bert": {"input_features": ("float", 2, 48, 160)},
    "audio/nemotron_asr_streaming": {"input_features": ("float", 2, 192, 80), "decoder_input_ids": ("ids", 2, 1)},
    "audio/nemotron3_5_asr": {
        "input_features": ("float", 2, 192, 80),
        "decoder_input_ids": ("ids", 2, 1),
        "prompt_ids": ("zeros", 2),
    },
    "causal/musicgen": {"input_ids": ("ids", 8, 48)},  # batch times codebooks
    "causal/musicgen_melody": {"input_ids": ("ids", 8, 48)},
}
INPUTS |= {
    f"{family}/{name}": value
    for family in ("multimodal", "other")
    for name, value in {
        "chameleon": {"input_ids": ("ids", 2, 48)},
        "diffusion_gemma": {"input_ids": ("ids", 2, 24), "decoder_input_ids": ("ids", 2, 16)},
        "emu3": {"input_ids": ("ids", 2, 48)},
        "kyutai_speech_to_text": {"input_ids": ("ids", 2, 32, 33)},
        "idefics": {
            "input_ids": ("ids", 2, 24),
            "pixel_values": ("float", 2, 1, 3, 112, 112),
            "image_attention_mask": ("mask", 2, 24, 1),
        },
        "kosmos-2": {
            "input_ids": ("ids", 2, 24),
            "pixel_values": ("float", 2, 3, 112, 112),
            "image_embeds_position_mask": ("first8", 2, 24),
        },
        "omdet-turbo": {
            "pixel_values": ("float", 2, 3, 128, 128),
            "classes_input_ids": ("ids", 2, 8),
            "classes_attention_mask": ("mask", 2, 8),
            "tasks_input_ids": ("ids", 2, 8),
            "tasks_attention_mask": ("mask", 2, 8),
            "classes_structure": ("mask", 2),
        },
        "pi0": {
            "state": ("float", 2, 32),
            "noise": ("float", 2, 8, 32),
            "timestep": ("ones", 2),
            "input_ids": ("image", 2, 80),
            "attention_mask": ("mask", 2, 80),
            "pixel_values": ("float", 2, 1, 3, 112, 112),
            "pixel_attention_mask": ("true", 2, 1),
        },
        "owlv2": {"input_ids": ("ids", 2, 16), "pixel_values": ("float", 2, 3, 128, 128)},
        "owlvit": {"input_ids": ("ids", 2, 16), "pixel_values": ("float", 2, 3, 256, 256)},
        "pix2struct": {"flattened_patches": ("positive", 2, 48, 770), "decoder_input_ids": ("ids", 2, 32)},
        "siglip2": {
            "input_ids": ("ids", 2, 24),
            "pixel_values": ("float", 2, 64, 768),
            "pixel_attention_mask": ("mask", 2, 64),
            "spatial_shapes": ("eights", 2, 2),
        },
        "siglip2_vision_model": {
            "pixel_values": ("float", 2, 64, 768),
            "pixel_attention_mask": ("mask", 2, 64),
            "spatial_shapes": ("eights", 2, 2),
        },
        "t5gemma2": {"input_ids": ("ids", 2, 48), "decoder_input_ids": ("ids", 2, 32)},
        "vilt": {"input_ids": ("ids", 2, 24), "pixel_values": ("float", 2, 3, 256, 256)},
    }.items()
}
INPUTS |= {
    # A token for every eight frames.
    f"{family}/voxtral_realtime": {"input_ids": ("ids", 2, 24), "input_features": ("float", 2, 128, 192)}
    for family in ("seq2seq", "audio", "multimodal")
}

SERIES = {
    "past_values": ("float", 2, 19),
    "past_time_features": ("float", 2, 19, 1),
    "past_observed_mask": ("ones", 2, 19),
    "future_values": ("float", 2, 8),
    "future_time_features": ("float", 2, 8, 1),
}
INPUTS |= {
    f"other/{name}": value
    for name, value in {
        "autoformer": SERIES,
        "informer": SERIES,
        "time_series_transformer": SERIES,
        "timesfm": {"past_values": ("float", 2, 512)},
        "timesfm2_5": {"past_values": ("float", 2, 512)},
        "blip_2_qformer": {"query_embeds": ("float", 2, 8, 64), "encoder_hidden_states": ("float", 2, 24, 64)},
        "clap": {"input_ids": ("ids", 2, 24), "input_features": ("float", 2, 1, 64, 64)},
        "decision_transformer": {
            "states": ("float", 2, 12, 17),
            "actions": ("float", 2, 12, 4),
            "rewards": ("float", 2, 12, 1),
            "returns_to_go": ("float", 2, 12, 1),
            "timesteps": ("ids", 2, 12),
            "attention_mask": ("mask", 2, 12),
        },
        "fun_asr_nano_encoder": {"input_features": ("float", 2, 48, 560), "input_features_mask": ("mask", 2, 48)},
        "gemma3n_audio": {"audio_mel": ("float", 2, 96, 128), "audio_mel_mask": ("false", 2, 96)},
        "gemma4_audio": {"input_features": ("float", 2, 96, 128)},
        "gemma4_vision": {"pixel_values": ("float", 2, 81, 768), "pixel_position_ids": ("square", 2, 81, 2)},
        "granite_speech5_encoder": {"input_features": ("float", 2, 96, 320)},
        "inkling2_vision": {"pixel_values": ("float", 128, 40, 40, 3), "image_grid_thw": ("grid", 2, 3)},
        "jev": {
            "input_ids": ("ids", 1, 48),
            "marks": ("eights", 1, 3),
            "num_options": ("eights", 1, 3),
            "question_type_ids": ("zeros", 1, 3),
        },
        "lxmert": {
            "input_ids": ("ids", 2, 24),
            "visual_feats": ("float", 2, 12, 2048),
            "visual_pos": ("float", 2, 12, 4),
        },
        "mimi_decoder": {"latents": ("float", 2, 64, 24)},
        "qwen3_asr_encoder": {"input_features": ("float", 2, 128, 200), "input_features_mask": ("mask", 2, 200)},
        "sam3": {"input_ids": ("ids", 2, 32), "pixel_values": ("float", 2, 3, 112, 112)},
        "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": ("float", 2, 64, 24)},
        "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": ("float", 2, 1, 6400)},
        "minicpm_ocr_vision": {"pixel_values": ("float", 1, 3, 16, 2048), "target_sizes": ("eights", 2, 2)},
        "minicpmv4_7_vision": {"pixel_values": ("float", 1, 3, 16, 2048), "target_sizes": ("eights", 2, 2)},
        "muse_glimmer_assistant": {
            "noise_embeds": ("float", 2, 16, 64),
            "context_hidden_states": ("float", 2, 24, 128),
            "attention_mask": ("mask", 2, 40),
        },
        "muse_spark_audio": {"input_values": ("float", 2, 7680)},
        "nemotron_asr_streaming_encoder": {"input_features": ("float", 2, 192, 80)},
        "neucodec": {"input_values": ("float", 2, 1, 3200), "input_features": ("float", 2, 10, 160)},
        "pocket_tts_audio_tokenizer_decoder": {"latents": ("float", 2, 64, 24)},
        "seggpt": {
            "pixel_values": ("float", 2, 3, 128, 128),
            "prompt_pixel_values": ("float", 2, 3, 128, 128),
            "prompt_masks": ("float", 2, 3, 128, 128),
        },
        "splinter": {"input_ids": ("ids", 2, 48), "question_positions": ("eights", 2, 1)},
        "tvp": {
            "input_ids": ("ids", 1, 16),
            "pixel_values": ("float", 1, 4, 3, 128, 128),
            "attention_mask": ("mask", 1, 16),
        },
        "video_llama_3_vision": {
            "pixel_values": ("float", 128, 768),
            "grid_thw": ("grid", 2, 3),
            "merge_sizes": ("mask", 2),
        },
        "vision-text-dual-encoder": {
            "input_ids": ("ids", 2, 24),
            "pixel_values": ("float", 2, 3, 128, 128),
            "attention_mask": ("mask", 2, 24),
        },
        "xcodec2": {"input_values": ("float", 2, 1, 3200), "input_features": ("float", 2, 10, 160)},
    }.items()
}
"""Inputs by family and name: a kind and a shape, see `inputs`."""
