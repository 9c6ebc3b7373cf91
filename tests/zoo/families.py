"""Which architectures there are: transformers' auto classes, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

FAMILIES: dict[str, tuple[str, ...]] = {
    "causal": ("CAUSAL_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "encoder": ("MASKED_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "VIDEO_CLASSIFICATION",
        "SEMANTIC_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "IMAGE_SEGMENTATION",
        "OBJECT_DETECTION",
        "DEPTH_ESTIMATION",
        "NORMAL_ESTIMATION",
        "POINTMAP_ESTIMATION",
        "POSE_ESTIMATION",
        "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING",
        "MASK_GENERATION",
        "IMAGE_MATTING",
        "IMAGE_TO_IMAGE",
        "MASKED_IMAGE_MODELING",
        "CAUSAL_IMAGE_MODELING",
        "TEXT_RECOGNITION",
        "TABLE_RECOGNITION",
    ),
    "audio": (
        "SPEECH_SEQ_2_SEQ",
        "CTC",
        "RNNT",
        "TDT",
        "AUDIO_CLASSIFICATION",
        "AUDIO_FRAME_CLASSIFICATION",
        "AUDIO_XVECTOR",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
    ),
    "multimodal": (
        "IMAGE_TEXT_TO_TEXT",
        "MULTIMODAL_LM",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "ZERO_SHOT_OBJECT_DETECTION",
        "VISUAL_QUESTION_ANSWERING",
        "DOCUMENT_QUESTION_ANSWERING",
        "RETRIEVAL",
    ),
    "other": (
        "TIME_SERIES_PREDICTION",
        "TIME_SERIES_CLASSIFICATION",
        "TIME_SERIES_REGRESSION",
        "TABLE_QUESTION_ANSWERING",
        "DECISION",
        "PRETRAINING",
        "",  # MODEL_MAPPING: bodies without a head, of architectures that have come in no other way
    ),
}
"""Auto mappings by family, the preferred head first; ``X`` stands for ``MODEL_FOR_X_MAPPING_NAMES``."""


@dataclass(frozen=True)
class Specimen:
    """One architecture to be built.

    Attributes:
        name: its ``model_type``.
        family: see `FAMILIES`.
        auto: the auto mapping that names it.
        model_class: the class to build.
        alias_of: the name of an earlier specimen of the same model and configuration classes, or "".
    """

    name: str
    family: str
    auto: str
    model_class: str
    alias_of: str = ""

    @property
    def id(self) -> str:
        """Family and name: unique in the zoo."""
        return f"{self.family}/{self.name}"


def specimens(family: str | None = None) -> list[Specimen]:
    """All architectures, or those of a family.

    Language models are also listed as what else they are: a vision-language model that has a causal head is fed
    text alone in the family "causal", and text with images in "multimodal".
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    return [s for s in _all() if family in (None, s.family)]


@cache
def _all() -> tuple[Specimen, ...]:
    return tuple(_enumerate())


def _enumerate() -> Iterator[Specimen]:
    seen: set[str] = set()  # architectures, of the families whose models differ in their heads only
    for family, mappings in FAMILIES.items():
        models: dict[tuple[str, str], str] = {}
        here: set[str] = set()
        for auto in mappings:
            for name, model_class in _mapping(auto).items():
                if name in here or (family == "other" and name in seen):
                    continue
                here.add(name)
                key = (model_class, _configuration(name))
                yield Specimen(name, family, auto or "MODEL", model_class, models.get(key, ""))
                models.setdefault(key, name)
        seen |= here


def classes_of(name: str) -> set[str]:
    """All models of an architecture, with whatever head."""
    every = [auto for mappings in FAMILIES.values() for auto in mappings]
    return {_mapping(auto)[name] for auto in (*every, "BACKBONE") if name in _mapping(auto)}


def _mapping(auto: str) -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{auto}_MAPPING_NAMES" if auto else "MODEL_MAPPING_NAMES")
    return {name: value if isinstance(value, str) else value[0] for name, value in names.items()}


def _configuration(name: str) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES.get(name, name)
