"""Example inputs for a model, by the names of its forward's parameters.

Where a name does not settle a shape (features before frames or after, one image or several), there are several
candidates, and the first that the model takes is right.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.zoo.examples import INPUTS
from tests.zoo.families import Specimen
from tests.zoo.shrink import LENGTH, special_tokens, sub_configs

BATCH = 2
Inputs = dict[str, Any]
MOST = 12
"""Candidates that are tried."""


def candidates(model: nn.Module, specimen: Specimen, text_only: bool = False) -> Iterator[Inputs]:
    """Keyword inputs that a model may take, the likeliest first.

    Token ids come without a mask, so that all the masks there are, the model makes itself.
    """
    about = _About(model, model.config, specimen.family, inspect.signature(model.forward).parameters)
    if text_only:
        yield {"input_ids": tokens(about.config)}
        return
    if specimen.id in INPUTS:
        yield {name: _drawn(*what) for name, what in INPUTS[specimen.id].items()}
        return
    if about.family in ("multimodal", "other") and "pixel_values" in about.parameters and _tokens_of_images(about):
        yield from _with_images(about)
    needed = _needed(about)
    if not {"grid_thw", "image_grid_thw"}.isdisjoint(_required(about)):
        yield from _image_inputs(about)
    yield from itertools.islice(_combined(about, needed), MOST)
    more = [name for name in about.parameters if name in needed or name in MODALITIES]
    if more != needed:
        yield from itertools.islice(_combined(about, more), MOST)
    if about.family == "multimodal" and "input_ids" in about.parameters:
        yield {"input_ids": tokens(about.config)}


@dataclass(frozen=True)
class _About:
    model: nn.Module
    config: Any
    family: str
    parameters: Mapping[str, inspect.Parameter]

    def find(self, *names: str, default: Any = None) -> Any:
        """The first field of one of the names, in the configuration or a part of it."""
        return next(_fields(self.config, names), default)


def _fields(config: Any, names: tuple[str, ...]) -> Iterator[Any]:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            yield value
    for part in sub_configs(config).values():
        yield from _fields(part, names)


def _combined(about: _About, wanted: list[str]) -> Iterator[Inputs]:
    """All combinations of what parameters may be, with masks that fit them."""
    names = [name for name in wanted if name in MAKERS]
    masks = {name: MASKED[name] for name in about.parameters if name in MASKED}
    for choice in itertools.product(*(list(MAKERS[name](about)) for name in names)):
        made = dict(zip(names, choice, strict=True))
        yield made
        for along in (1, 2):
            ones = {
                mask: torch.ones(made[of].shape[0], made[of].shape[along], dtype=torch.long)
                for mask, of in masks.items()
                if of in made and made[of].dim() > along
            }
            if ones:
                yield made | ones


def _required(about: _About) -> set[str]:
    given = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name for name, p in about.parameters.items() if p.default is inspect.Parameter.empty and p.kind not in given
    }


def _needed(about: _About) -> list[str]:
    required = _required(about)
    main = about.model.main_input_name
    required = required | ({main} if isinstance(main, str) else set(main))
    wanted = WITH.get(about.family, set()) | _decoded(about).keys()
    return [name for name in about.parameters if name in required | wanted]


WITH: dict[str, set[str]] = {
    "multimodal": {"input_ids", "pixel_values", "bbox", "pixel_mask"},
    "audio": {"input_ids"},
    "other": set(),
}
"""What is passed by family although a model can do without."""

MODALITIES = {"input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values", "bbox"}
"""What is passed if a model does not take what it says that it needs."""

MASKED = {
    "input_features_mask": "input_features",
    "audio_mel_mask": "audio_mel",
    "feature_attention_mask": "input_features",
    "padding_mask": "input_values",
}
"""Masks that have the length of another input."""


def _text(about: _About) -> Iterator[torch.Tensor]:
    yield tokens(about.config)


def _image_size(about: _About) -> tuple[int, int]:
    size = about.find("image_size", "img_size", "input_size", default=64)
    if isinstance(size, Mapping):
        size = (size.get("height", 64), size.get("width", 64))
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _channels(about: _About) -> int:
    channels = about.find("num_channels", "in_channels", "in_chans", "num_image_channels", default=3)
    return channels if isinstance(channels, int) else 3


def _images(about: _About) -> Iterator[torch.Tensor]:
    height, width = _image_size(about)
    for size in dict.fromkeys(((height, width), (64, 64), (128, 128), (224, 224))):
        yield _floats(BATCH, _channels(about), *size)
    for several in dict.fromkeys((about.find("num_frames", default=1), 1, 2)):
        yield _floats(BATCH, several, _channels(about), height, width)


def _videos(about: _About) -> Iterator[torch.Tensor]:
    frames = about.find("num_frames", "frames_per_clip", default=4)
    yield _floats(BATCH, frames, _channels(about), *_image_size(about))


def _features(about: _About) -> Iterator[torch.Tensor]:
    mels = about.find(
        "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "input_feat_size", default=80
    )
    frames = 2 * about.find("max_source_positions", default=LENGTH)
    for length in dict.fromkeys((frames, 2 * LENGTH)):
        yield _floats(BATCH, mels, length)
        yield _floats(BATCH, length, mels)


def _waves(about: _About) -> Iterator[torch.Tensor]:
    length, bins = about.find("max_length", default=0), about.find("num_mel_bins", default=0)
    if length and bins:
        yield _floats(BATCH, length, bins)
    yield _floats(BATCH, 8000)
    yield _floats(BATCH, 1, 8000)


def _boxes(about: _About) -> Iterator[torch.Tensor]:
    corners = torch.arange(LENGTH).reshape(1, LENGTH, 1).expand(BATCH, LENGTH, 4) % 30
    yield corners + torch.tensor([0, 0, 8, 8])


MAKERS: dict[str, Callable[[_About], Iterator[Any]]] = {
    "input_ids": _text,
    "decoder_input_ids": lambda about: iter([tokens(about.config, LENGTH - 16, seed=1)]),
    "qformer_input_ids": lambda about: iter([tokens(about.config, 8, seed=2)]),
    "attention_mask": lambda about: iter([torch.ones(BATCH, LENGTH, dtype=torch.long)]),
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "pixel_mask": lambda about: iter([torch.ones(BATCH, *_image_size(about), dtype=torch.long)]),
    "input_features": _features,
    "audio_mel": _features,
    "input_values": _waves,
    "bbox": _boxes,
    "inputs_embeds": lambda about: iter([_floats(BATCH, LENGTH, about.find("hidden_size", default=64))]),
    "past_values": lambda about: iter(
        [_floats(BATCH, about.find("context_length", default=64), about.find("num_input_channels", default=1))]
    ),
}
"""What a parameter may be."""


def _tokens_of_images(about: _About) -> int | None:
    """The token that stands for a piece of an image."""
    return next(_fields(about.config, ("image_token_id", "image_token_index", "image_patch_token_id")), None)


def _with_images(about: _About) -> Iterator[Inputs]:
    """Text with as many image tokens as the model makes features of the images."""
    token = _tokens_of_images(about)
    for images in _image_inputs(about):
        try:
            with torch.no_grad():
                count = _count(about.model.get_image_features(**images))
        except Exception:
            continue
        if not count or count % BATCH:
            continue
        text = tokens(about.config, 24)
        start, rest = text[:, :4], text[:, 4:]
        ids = torch.cat([start, torch.full((BATCH, count // BATCH), token), rest], 1)
        made = {"input_ids": ids, **images, **_decoded(about)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in about.parameters:
                yield made | {name: (ids == token).long()}
        yield made


def _decoded(about: _About) -> Inputs:
    """The tokens of a decoder: without them, many a model starts from a single one."""
    if "decoder_input_ids" in about.parameters and getattr(about.config, "is_encoder_decoder", False):
        return {"decoder_input_ids": next(MAKERS["decoder_input_ids"](about))}
    return {}


def _image_inputs(about: _About) -> Iterator[Inputs]:
    """Images as a vision tower takes them: whole, in tiles, or as rows of patches with their grid."""
    channels = _channels(about)
    pixels = next((name for name in ("pixel_values", "hidden_states") if name in about.parameters), "pixel_values")
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in about.parameters), None)
    if grid is not None:
        patch, frames = about.find("patch_size", default=14), about.find("temporal_patch_size", default=1)
        for depth in dict.fromkeys((frames, 1, 2)):
            row = channels * depth * patch * patch
            yield {pixels: _floats(BATCH * 64, row), grid: torch.tensor([[1, 8, 8]] * BATCH)}
        yield {pixels: _floats(BATCH * 64, channels, patch, patch), grid: torch.tensor([[1, 8, 8]] * BATCH)}
        return
    height, width = _image_size(about)
    sizes = {"image_sizes": torch.tensor([[height, width]] * BATCH)} if "image_sizes" in about.parameters else {}
    yield {"pixel_values": _floats(BATCH, channels, height, width), **sizes}
    yield {"pixel_values": _floats(BATCH, 1, channels, height, width), **sizes}
    yield {"pixel_values": _floats(BATCH, 3, channels, height, width), **sizes}


def _count(features: Any) -> int:
    """How many rows there are in what a vision tower gives: a tensor, several, or an output that holds them."""
    found = getattr(features, "pooler_output", features)
    if isinstance(found, torch.Tensor):
        return found[..., 0].numel()
    return sum(_count(part) for part in found) if isinstance(found, (list, tuple)) else 0


def tokens(config: Any, length: int = LENGTH, batch: int = BATCH, seed: int = 0) -> torch.Tensor:
    """Random ids, none of them special."""
    special = special_tokens(config)
    usable = torch.tensor([i for i in range(1, text_vocab(config)) if i not in special])
    drawn = torch.randint(len(usable), (batch, length), generator=torch.Generator().manual_seed(seed))
    return usable[drawn]


def text_vocab(config: Any) -> int:
    """Size of the smallest vocabulary of a configuration and its parts."""
    sizes = [size for size in _fields(config, ("vocab_size", "src_vocab_size")) if isinstance(size, int) and size > 8]
    return min(sizes, default=64)


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _drawn(kind: str, *shape: int) -> torch.Tensor:
    """A tensor of the table of inputs."""
    return KINDS[kind](shape)


KINDS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "float": lambda shape: _floats(*shape),
    "positive": lambda shape: _floats(*shape).abs(),
    "ids": lambda shape: torch.randint(6, 60, shape, generator=torch.Generator().manual_seed(0)),
    "image": lambda shape: torch.cat([torch.full((shape[0], 64), 127), KINDS["ids"]((shape[0], shape[1] - 64))], 1),
    "mask": lambda shape: torch.ones(shape, dtype=torch.long),
    "ones": torch.ones,
    "true": lambda shape: torch.ones(shape, dtype=torch.bool),
    "zeros": lambda shape: torch.zeros(shape, dtype=torch.long),
    "false": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "first8": lambda shape: (torch.arange(shape[-1]) < 8).expand(shape).clone(),
    "eights": lambda shape: torch.full(shape, 8),
    "grid": lambda shape: torch.tensor([1, 8, 8]).expand(shape).clone(),
    "square": lambda shape: torch.stack(
        [torch.arange(shape[1]) % round(shape[1] ** 0.5), torch.arange(shape[1]) // round(shape[1] ** 0.5)], -1
    ).repeat(shape[0], 1, 1),
}
"""What the table of inputs may ask for, by shape."""
