"""Specimens are small and still whole: several keys for every query, every part in the form that it has."""

from __future__ import annotations

import pytest

from tests.zoo.build import CannotBuild, build, find
from tests.zoo.measure import measure
from tests.zoo.oracle import Attention, census
from tests.zoo.score import score


def keys(attention: Attention) -> int:
    """How many keys there are to choose from, by the shape of the probabilities or of the keys."""
    return attention.shapes[0][-1] if attention.kind == "softmax" else attention.shapes[1][-2]


@pytest.mark.parametrize("name", ["vision/swinv2", "vision/mobilevit", "multimodal/florence2"])
def test_every_attention_has_several_keys(name: str) -> None:
    """After the last stage that halves an image, in patches of features, and in a decoder beside an image."""
    attentions = census(*build(find(name), "eager")).attentions
    assert attentions
    assert min(map(keys, attentions)) > 1


def test_a_part_without_an_sdpa_form_stays_eager() -> None:
    model, _ = build(find("vision/detr"), "sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert model.config.backbone_config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_a_model_that_only_generates_is_said_to_have_no_forward() -> None:
    with pytest.raises(CannotBuild, match="no forward of its own"):
        build(find("audio/bark"), "eager")


def test_a_tower_over_images_of_any_size_is_measured_as_transformers_exports_it() -> None:
    record = measure(find("other/qwen2_5_vl_vision"), "sdpa", peers=False)
    assert "data-dependent" in record["prepared"]
    assert score(record).right
    assert score(record).attentions == 2
