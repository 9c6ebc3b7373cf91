"""Every attention of a model is raised, verified, and its mask proven: a varied sample here, the whole zoo if slow."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.zoo.build import Implementation, build, find, specimens
from tests.zoo.examples import INPUTS
from tests.zoo.measure import Record, measure
from tests.zoo.overrides import CONFIG, SHARED
from tests.zoo.score import is_verified, mask_is_proven, score
from tests.zoo.shrink import TOPK

SAMPLE: dict[str, tuple[Implementation, str]] = {
    "causal/llama": ("sdpa", "grouped heads"),
    "causal/gpt2": ("sdpa", "one projection for queries, keys and values"),
    "causal/gemma2": ("eager", "soft cap, sliding and causal layers"),
    "causal/gpt_oss": ("eager", "sinks"),
    "causal/bloom": ("eager", "ALiBi by baddbmm"),
    "causal/mpt": ("eager", "ALiBi as a bias"),
    "causal/gptj": ("eager", "masked by where, before the scale"),
    "causal/falcon": ("sdpa", "one key head"),
    "causal/openai-gpt": ("eager", "a mask that is a buffer"),
    "causal/opt": ("eager", "learned positions with an offset"),
    "causal/xglm": ("eager", "bmm over merged heads"),
    "causal/llama4_text": ("sdpa", "chunked layers"),
    "causal/diffllama": ("eager", "two attentions subtracted"),
    "causal/deepseek_v3": ("eager", "latent keys and values"),
    "causal/deepseek_v32": ("eager", "an indexer over all keys"),
    "causal/deepseek_v4": ("eager", "compressed entries, an indexer, shared keys and values"),
    "causal/minimax_m3_vl_text": ("eager", "selected blocks"),
    "causal/qwen3_next": ("eager", "linear layers between"),
    "causal/modernbert-decoder": ("sdpa", "sliding both ways made causal"),
    "encoder/bert": ("sdpa", "no mask at all"),
    "seq2seq/t5": ("eager", "relative position bias, cross attention"),
    "seq2seq/bart": ("sdpa", "cross attention of two lengths"),
    "vision/vit": ("eager", "images"),
    "audio/whisper": ("eager", "audio, encoder and decoder"),
    "multimodal/clip": ("sdpa", "two towers"),
}
"""Architectures as different from each other as there are, in one form each, and what is particular about them."""


@cache
def measured(name: str, implementation: Implementation) -> Record:
    """One record for all tests of an architecture."""
    return measure(find(name), implementation, peers=False)


def assert_all_raised_and_verified(record: Record) -> None:
    """Every attention that the oracle counted has a site that came out equal, forward and backward."""
    assert "failed" not in record, record["failed"]
    told = score(record)
    reasons = [miss["reason"] for miss in record["near_misses"]]
    assert not told.missed, f"not raised in {told.missed}: {reasons}"
    unverified = [(s["module"], s["reason"], s["verify"]) for s in record["sites"] if not is_verified(s)]
    assert told.right, f"{told.raised - told.verified} of {told.raised} not verified: {unverified}"


def assert_masks_proven(record: Record) -> None:
    """No mask is left as a tensor where the model made all its masks itself."""
    tensors = [(s["module"], s["mask"]) for s in record["sites"] if not mask_is_proven(s, bool(record["causal"]))]
    assert not tensors


@pytest.mark.parametrize("name", SAMPLE)
def test_every_attention_of_the_sample_is_raised_and_verified(name: str) -> None:
    record = measured(name, SAMPLE[name][0])
    assert record["oracle"]["attentions"]
    assert_all_raised_and_verified(record)


@pytest.mark.parametrize("name", [name for name in SAMPLE if name.startswith("causal/")])
def test_masks_of_a_causal_model_are_proven(name: str) -> None:
    assert_masks_proven(measured(name, SAMPLE[name][0]))


@pytest.mark.parametrize("name", ["causal/deepseek_v32", "causal/deepseek_v4", "causal/minimax_m3_vl_text"])
def test_every_indexer_of_the_sample_is_raised(name: str) -> None:
    told = score(measured(name, "eager"))
    assert told.indexers > 0
    assert told.indexers_raised == told.indexers


def test_selections_of_the_sample_leave_keys_out() -> None:
    for name in ("causal/deepseek_v32", "causal/deepseek_v4"):
        for indexer in measured(name, "eager")["oracle"]["indexers"]:
            assert indexer["k"] <= TOPK < indexer["scores"][-1]


def test_specimens_have_ids_of_their_own() -> None:
    ids = [specimen.id for specimen in specimens()]
    assert len(set(ids)) == len(ids)
    assert set(SAMPLE) <= set(ids)


def test_overrides_are_of_architectures_that_there_are() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = set(CONFIG) | {name for shared, _ in SHARED for name in shared}
    assert {name for name in names if name not in CONFIG_MAPPING} == set()
    # Rows for two families hold architectures that are in one of them.
    known = {specimen.name for specimen in specimens()}
    assert {name for name in INPUTS if name.partition("/")[2] not in known} == set()


def test_a_small_model_keeps_every_kind_of_layer() -> None:
    model, _ = build(find("causal/gemma2"), "eager")
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    model, _ = build(find("causal/deepseek_v4"), "eager")
    assert len(set(model.config.layer_types)) == 3


def test_sinks_norms_and_biases_are_random() -> None:
    model, _ = build(find("causal/gpt_oss"), "eager")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and len(parameter) > 1:
            assert parameter.std() > 0.05, name


def test_a_specimen_is_the_same_each_time_it_is_built() -> None:
    first, inputs = build(find("causal/llama"), "eager")
    second, same = build(find("causal/llama"), "eager")
    assert all(torch.equal(inputs[name], same[name]) for name in inputs)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [specimen.id for specimen in specimens() if not specimen.alias_of])
def test_every_attention_of_the_zoo_is_raised_and_verified(name: str, implementation: Implementation) -> None:
    record = measure(find(name), implementation, peers=False)
    if record["stage"] in ("build", "export"):
        pytest.skip(record["failed"])
    assert_all_raised_and_verified(record)
    if name.startswith("causal/"):
        assert_masks_proven(record)
