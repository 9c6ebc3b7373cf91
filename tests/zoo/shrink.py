"""Configurations made small, by the names of their fields: widths, depths and vocabularies shrink, what decides the
computation stays.

Of layers that alternate (sliding and full, dense and sparse, with and without an indexer …), one of each kind is kept,
in the model's own order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.zoo.overrides import overrides_for

Value = Any

VOCAB, HIDDEN, WIDE, HEADS, HEAD_DIM = 128, 64, 96, 4, 16
WINDOW, TOPK, LENGTH = 16, 8, 48
MAX_LAYERS = 6


Rule = Callable[[int, Mapping[str, Value]], int]


def cap(limit: int) -> Rule:
    """No more than a limit."""
    return lambda value, fields: min(value, limit)


def _key_heads(value: int, fields: Mapping[str, Value]) -> int:
    """One head stays one, as many as queries stays so, anything between is grouped by two."""
    heads = next((fields[name] for name in ("num_attention_heads", "n_heads") if isinstance(fields.get(name), int)), 0)
    if value == 1:
        return 1
    return HEADS if value >= heads else HEADS // 2


def _image(value: int, fields: Mapping[str, Value]) -> int:
    """Eight patches by eight, and two by two at least after the last of stages that halve them."""
    patch, stages, stride = (fields.get(name) for name in ("patch_size", "depths", "output_stride"))
    if not isinstance(patch, int):
        return value
    if isinstance(stride, int):  # of the features that are cut into patches
        return min(value, 4 * patch * stride)
    patches = max(8, 2 ** len(stages)) if isinstance(stages, (list, tuple)) else 8
    return min(value, patches * patch)


COUNTS = r"(num_)?(hidden_layers|layers|blocks)|n_layers?|(num_)?(encoder|decoder|.*_num)_(hidden_)?layers|depth"

_FIELDS: tuple[tuple[str, Rule], ...] = (
    (COUNTS + r"|resampler_depth|decoder_depth|num_.*_hidden_layers|max_window_layers|[lrx]_layers", cap(2)),
    (r"vocab_size.*|.*_vocab_size|.*vocab_size_base|.*_hash_byte_group_vocab", cap(VOCAB)),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_sequence_length)", cap(512)),
    (r"max_(source|target)_positions", cap(64)),
    (r"qk_rope_head_dim|rotary_dim", cap(HEAD_DIM // 2)),
    (r"swa_num_key_value_heads|num_(key_value|kv)_heads|.*num_key_value_heads", _key_heads),
    (r"(indexer|index)_kv_heads", cap(1)),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", cap(8)),
    (r"mamba_(d_head|head_dim)", cap(16)),
    (r"linear_num_key_heads", cap(2)),
    (r"linear_num_value_heads", cap(4)),
    (r".*((?<!_)n|num)_(attention_)?heads?|.*attention_heads|.*_n_heads|n_heads?|linear_num_heads", cap(HEADS)),
    (r"(.*_)?(head_dim|head_size|dim_head|attention_head_dim|d_head)|d_kv|kv_channels|.*_head_dim", cap(HEAD_DIM)),
    (r"query_pre_attn_scalar", cap(HEAD_DIM)),
    (r"(q|kv)_lora_rank", cap(32)),
    (r".*(_rank|lowrank)|d_rel", cap(16)),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", cap(4)),
    (r"zero_expert_num|num_centroids", cap(4)),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|centroid_intermediate_top_k", cap(2)),
    (r"n_group", cap(2)),
    (r"topk_group|(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_end_index", cap(1)),
    (r"num_(nextn_predict|mtp)_layers", cap(0)),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|n_inner|.*ffn_hidden_size|emb_dim_ff|d_inner", cap(WIDE)),
    (r"mlp_dim|feed_forward_size|ffn_hidden_size|shared_intermediate_size", cap(WIDE)),
    (r"moe_.*hidden_size|router_hidden_size", cap(32)),
    (r".*hidden_size(_per_layer_input)?|d_model|n_embd|.*embed_dim|.*embedding_(size|dim)|emb_dim", cap(HIDDEN)),
    (
        r"projection_dim|dim_model|model_dim|hidden_dim|lru_width|word_embed_proj_dim|.*hidden_dim|ple_embed_dim",
        cap(64),
    ),
    (
        r"sliding_window(_size)?|local_attention|attention_chunk_size|attention_window_size|keep_window_size",
        cap(WINDOW),
    ),
    (r"(index_)?topk|index_topk|indexer_budget", cap(TOPK)),
    (r"index_block_size|index_topk_blocks", lambda v, f: 8 if v > 16 else 2),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size|mamba_d_state|(mamba_)?chunk_size", cap(16)),
    (r"time_step_rank|mamba_dt_rank", cap(4)),
    (r"image_size|img_size", _image),
    (r"out_hidden_size", cap(HIDDEN)),
    # As many as there are pieces of an image to choose them from.
    (r"num_queries", cap(12)),
)
"""What becomes of an integer field: the first row whose pattern is the whole name."""

FIELDS = tuple((re.compile(pattern), rule) for pattern, rule in _FIELDS)
DEPTH_FIELDS = FIELDS[:4]

SPECIAL = re.compile(r".*_token_(id|index)|(bo|eo|pad)[si]?_(index|token)|mask_index|unk_index|pad_index")


def shrunk(config_class: type, overrides: Mapping[str, Value], *, widths: bool = True) -> Any:
    """A small configuration of a class.

    Args:
        overrides: fields to be set whatever the rules say; dotted names reach into nested configurations.
        widths: whether widths shrink too, not only depths, vocabularies and positions.
    """
    try:
        default = config_class()
    except Exception:  # a class that has no defaults of its own
        default = config_class(**_nested(overrides))
    return config_class(**_changes(default, overrides, widths))


def _nested(overrides: Mapping[str, Value]) -> dict[str, Value]:
    """Dotted names as dictionaries in dictionaries."""
    result: dict[str, Value] = {}
    for name, value in overrides.items():
        *path, field = name.split(".")
        within = result
        for part in path:
            within = within.setdefault(part, {})
        within[field] = value
    return result


def _changes(default: Any, overrides: Mapping[str, Value], widths: bool) -> dict[str, Value]:
    own = {name: value for name, value in overrides.items() if "." not in name}
    fields = _fields(default)
    changes: dict[str, Value] = {}
    for name, sub in sub_configs(default).items():
        within = {key.removeprefix(f"{name}."): value for key, value in overrides.items() if key.startswith(f"{name}.")}
        within = overrides_for(sub.model_type) | within
        given = _given(default, name, sub)
        changes[name] = type(sub)(**(given | _changes(sub, within | _outputs(sub, given), widths)))
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            rule = next(
                (rule for pattern, rule in (FIELDS if widths else DEPTH_FIELDS) if pattern.fullmatch(name)), None
            )
            if rule is not None and (small := rule(value, fields)) != value:
                changes[name] = small
    changes |= _layers(fields, own)
    changes |= _rope(fields, changes, own, widths)
    if "use_cache" in fields:
        changes["use_cache"] = False
    changes |= {name: _configured(value) for name, value in own.items()}
    return changes | _tokens(fields, changes)


def _configured(value: Value) -> Value:
    """A part of another kind than a configuration has by default is given as a configuration."""
    from transformers import AutoConfig

    if not isinstance(value, dict) or "model_type" not in value:
        return value
    return AutoConfig.for_model(**value)


def _given(config: Any, part: str, sub: Any) -> dict[str, Value]:
    """What a configuration sets in a part of its own accord."""
    spec = type(config).sub_configs_defaults.get(part)
    if spec is not None and spec.model_type != sub.model_type:  # meant for a part of another kind
        return {}
    return dict(getattr(spec, "init_kwargs", None) or {})


def _fields(config: Any) -> dict[str, Value]:
    """The declared fields and their values; not those that differ from layer to layer, which have no single one."""
    return {f.name: vars(config).get(f.name) for f in dataclasses.fields(config)}


def _outputs(backbone: Any, given: Mapping[str, Value]) -> dict[str, Value]:
    """A backbone whose several layers are used has as many layers, and all of them are used."""
    wanted = given.get("out_indices") or given.get("out_features")
    depth = next((name for name in DEPTHS if isinstance(_fields(backbone).get(name), int)), None)
    if not wanted or depth is None:
        return {}
    given.pop("out_features", None)  # type: ignore[attr-defined]
    layers = max(2, len(wanted))
    return {depth: layers, "out_indices": list(range(layers - len(wanted) + 1, layers + 1))}


def sub_configs(config: Any) -> dict[str, Any]:
    """The nested configurations, by field."""
    from transformers import PreTrainedConfig

    return {name: value for name, value in _fields(config).items() if isinstance(value, PreTrainedConfig)}


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")


def _layers(fields: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """One layer of each kind: every list with an entry a layer is cut to the same layers."""
    depth_name = next((name for name in DEPTHS if isinstance(fields.get(name), int)), None)
    if depth_name is None or depth_name in own:
        return {}
    depth = fields[depth_name]
    lists = {
        name: list(value)
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and len({str(v) for v in value}) <= MAX_LAYERS
    }
    lists = {name: value for name, value in lists.items() if depth > 2 and name not in own}
    chosen = _cover(list(zip(*lists.values(), strict=True))) if lists else []
    if not chosen:
        return {}
    return {depth_name: len(chosen)} | {name: [values[i] for i in chosen] for name, values in lists.items()}


def _cover(layers: list[tuple[Value, ...]]) -> list[int]:
    """The first layer of each kind that is not like one before it in every respect; two layers at least."""
    seen: list[str] = []
    chosen: list[int] = []
    for i, layer in enumerate(layers):
        if str(layer) not in seen:
            seen.append(str(layer))
            chosen.append(i)
    chosen = chosen[:MAX_LAYERS]
    for i in range(len(layers)):
        if len(chosen) < 2 and i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def _rope(
    fields: Mapping[str, Value], changes: Mapping[str, Value], own: Mapping[str, Value], widths: bool
) -> dict[str, Value]:
    """Sections of a multi-axis rotary embedding, which have to add up to half the rotated width."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" not in rope or "rope_parameters" in own or not widths:
        return {}
    width = int(changes.get("head_dim", fields.get("head_dim") or HEAD_DIM) * rope.get("partial_rotary_factor", 1.0))
    axes = len(rope["mrope_section"])
    rest = [width // 2 // axes] * (axes - 1)
    return {"rope_parameters": rope | {"mrope_section": [width // 2 - sum(rest), *rest]}}


def _tokens(fields: Mapping[str, Value], changes: Mapping[str, Value]) -> dict[str, Value]:
    """Special tokens inside the small vocabulary, no two of them equal."""
    vocab = changes.get("vocab_size", fields.get("vocab_size"))
    limit = vocab if isinstance(vocab, int) else VOCAB
    special = [name for name in fields if SPECIAL.fullmatch(name)]
    free = iter(range(limit - 1, 0, -1))
    result: dict[str, Value] = {}
    for name in special:
        value = changes.get(name, fields[name])
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(v, int) and v >= limit for v in values):
            result[name] = next(free, 0)
    return result


def special_tokens(config: Any) -> set[int]:
    """Ids that mean something to a model, in a configuration and its parts."""
    return set(_special(config))


def _special(config: Any) -> Iterator[int]:
    for name, value in _fields(config).items():
        if SPECIAL.fullmatch(name):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))
    for sub in sub_configs(config).values():
        yield from _special(sub)
