"""A rewritten model trains as the unmodified one does, in a plain loop and under transformers' Trainer.

Both are held to the unmodified model in float64; see `tests.live.training` for what counts as noise, and
`tests.live.models` for what keeps rounding from deciding anything. Each model is rewritten once, and gets its first
weights back before each test.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kreg
from kreg.rewriters.live import attached
from tests.live.models import MODELS
from tests.live.training import (
    EPSILON,
    Batch,
    answered,
    assert_curves,
    assert_gradients,
    autocast,
    batches,
    gradients,
    judged,
    replaced,
    train,
)

STEPS, SIZE, LENGTH = 50, 2, 64
SITES = {
    "qwen3": {"attention": 2},
    "qwen3_moe": {"attention": 2, "grouped_matmul": 4},
    "deepseek_v4": {"lightning_indexer": 1, "sparse_attention": 2, "grouped_matmul": 4},
}


@dataclass(frozen=True)
class Pair:
    """A model and its rewritten copy, which share their first weights."""

    name: str
    original: nn.Module
    rewritten: nn.Module

    def fresh(self) -> nn.Module:
        """A copy of the unmodified model, to be trained."""
        return copy.deepcopy(self.original)

    @cached_property
    def exact(self) -> list[float]:
        """The judge's curve."""
        found: list[float] = judged(train, self.original, batches(STEPS, SIZE, LENGTH))
        return found


@pytest.fixture(scope="module")
def _pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    torch._dynamo.reset()
    original = MODELS[request.param]()
    yield Pair(
        request.param, original, kreg.rewrite(copy.deepcopy(original), example_inputs=batches(1, SIZE, LENGTH)[0])
    )
    torch._dynamo.reset()


@pytest.fixture
def pair(_pair: Pair) -> Pair:
    """The pair with its first weights."""
    _pair.rewritten.load_state_dict(_pair.original.state_dict())
    _pair.rewritten.zero_grad()
    return _pair


def every(*fast: str) -> pytest.MarkDecorator:
    """Of all models; those not named in the full sweep alone."""
    params = [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
    return pytest.mark.parametrize("_pair", params, indirect=True)


@every("qwen3", "qwen3_moe", "deepseek_v4")
def test_fifty_steps_of_adamw_follow_the_original_curve(pair: Pair) -> None:
    data = batches(STEPS, SIZE, LENGTH)
    with answered(pair.rewritten, STEPS):
        got = train(pair.rewritten, data)
    assert replaced(pair.rewritten) == SITES[pair.name]
    assert_curves(got, train(pair.fresh(), data), pair.exact)


@every("qwen3", "qwen3_moe", "deepseek_v4")
def test_gradients_are_as_close_to_float64_as_the_original_ones(pair: Pair) -> None:
    data = batches(1, SIZE, LENGTH)
    with answered(pair.rewritten, 1):
        got = gradients(pair.rewritten, data)
    assert_gradients(got, gradients(pair.fresh(), data), judged(gradients, pair.original, data))


@every("qwen3")
def test_fifty_steps_under_the_trainer_follow_the_original_curve(pair: Pair, tmp_path: Path) -> None:
    data = batches(STEPS, SIZE, LENGTH)
    with answered(pair.rewritten, STEPS):
        got = under_trainer(pair.rewritten, data, tmp_path)
    same = under_trainer(pair.fresh(), data, tmp_path)
    assert_curves(got, same, judged(under_trainer, pair.original, data, tmp_path))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@every("qwen3")
def test_with_gradient_checkpointing_gradients_are_the_same(pair: Pair, reentrant: bool) -> None:
    data = batches(1, SIZE, LENGTH)
    same, exact = gradients(pair.fresh(), data), judged(gradients, pair.original, data)
    pair.rewritten.activation_checkpointing_enable({"use_reentrant": reentrant})
    try:
        with answered(pair.rewritten, 2):
            assert_gradients(gradients(pair.rewritten, data), same, exact)
            assert_gradients(gradients(pair.rewritten, data), same, exact)
    finally:
        pair.rewritten.activation_checkpointing_disable()


@every("qwen3")
def test_under_bfloat16_autocast_the_curve_is_as_close_to_float64_as_the_original_one(pair: Pair) -> None:
    data = batches(STEPS, SIZE, LENGTH)
    with answered(pair.rewritten, STEPS):
        got = train(pair.rewritten, data, step=autocast)
    assert_curves(got, train(pair.fresh(), data, step=autocast), pair.exact)


@every("qwen3")
def test_gradients_accumulate_over_batches(pair: Pair) -> None:
    data = batches(16, SIZE, LENGTH)
    same, exact = gradients(pair.fresh(), data[:4]), judged(gradients, pair.original, data[:4])
    with answered(pair.rewritten, 4 + len(data)):
        assert_gradients(gradients(pair.rewritten, data[:4]), same, exact)
        got = train(pair.rewritten, data, accumulate=4)
    assert_curves(got, train(pair.fresh(), data, accumulate=4), judged(train, pair.original, data, accumulate=4))


@pytest.mark.parametrize("order", ["rewrite first", "peft first"])
@every("qwen3")
def test_lora_trains_its_adapters_alone(pair: Pair, order: str) -> None:
    data = batches(STEPS // 2, SIZE, LENGTH)
    same = with_lora(pair.fresh())
    model = pair.fresh()
    if order == "rewrite first":
        model = with_lora(kreg.rewrite(model, example_inputs=data[0], verify=False))
    else:
        model = kreg.rewrite(with_lora(model), example_inputs=data[0], verify=False)
    rewritten = model if order == "peft first" else model.get_base_model()
    exact = judged(train, same, data, lr=1e-2)
    with answered(rewritten, len(data)):
        got = train(model, data, lr=1e-2)
    assert replaced(rewritten) == SITES[pair.name]
    assert_curves(got, train(same, data, lr=1e-2), exact)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(torch.equal(p, same.get_parameter(name)) for name, p in frozen.items())


ADAPTED = ["q_proj", "v_proj", "o_proj", "q_b_proj", "o_b_proj", "kv_proj"]


def with_lora(model: nn.Module) -> nn.Module:
    """The model with adapters in its attention, all drawn with the same seed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=ADAPTED, lora_dropout=0.0))


@every("qwen3")
def test_packed_documents_are_told_apart_by_their_positions(pair: Pair) -> None:
    data = [packed(batch) for batch in batches(STEPS, SIZE, LENGTH)]
    with answered(pair.rewritten, STEPS):
        got = train(pair.rewritten, data)
    assert_curves(got, train(pair.fresh(), data), judged(train, pair.original, data))
    assert masks(pair.rewritten) & {"input", "documents", "causal+documents"}


def packed(batch: Batch) -> Batch:
    """Three documents in a row, of which the second begins elsewhere in each row."""
    length = batch["input_ids"].shape[1]
    rows = []
    for i in range(len(batch["input_ids"])):
        lengths = (length // 4 + 5 * i, length // 2 - 3, length - length // 4 - 5 * i - length // 2 + 3)
        rows.append(torch.cat([torch.arange(n) for n in lengths]))
    return batch | {"position_ids": torch.stack(rows), "use_cache": False}  # with a cache, transformers packs nothing


def masks(model: nn.Module) -> set[str]:
    """What was proven of the masks in all graphs so far."""
    sites = (site for variant in attached(model).account.variants for site in variant.report.sites)
    return {site.mask["kind"] for site in sites if site.mask is not None and site.status == "replaced"}


@pytest.mark.parametrize("side", ["right", "left"])
@every("qwen3")
def test_padded_batches_train_as_before(pair: Pair, side: str) -> None:
    data = [padded(batch, side) for batch in batches(STEPS // 2, SIZE, LENGTH)]
    with answered(pair.rewritten, len(data)):
        got = train(pair.rewritten, data)
    assert_curves(got, train(pair.fresh(), data), judged(train, pair.original, data))
    assert any("padding" in kind for kind in masks(pair.rewritten))


def padded(batch: Batch, side: str) -> Batch:
    """One row in full, the others shorter; padding is no target."""
    kept = torch.ones_like(batch["input_ids"])
    for i, row in enumerate(kept):
        short = 11 * i
        if short:
            row[slice(-short, None) if side == "right" else slice(short)] = 0
    return {
        "input_ids": batch["input_ids"] * kept,
        "labels": batch["labels"].masked_fill(kept == 0, -100),
        "attention_mask": kept,
    }


def under_trainer(model: nn.Module, data: list[Batch], folder: Path, **options: Any) -> list[float]:
    """The losses of transformers' Trainer with its own AdamW, in the order of the data."""
    from transformers import Trainer, TrainingArguments

    class Recorded(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    given: dict[str, Any] = {
        "max_steps": len(data),
        "per_device_train_batch_size": SIZE,
        "learning_rate": 3e-3,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(folder), **(given | options))
    rows = [{name: values[i] for name, values in batch.items()} for batch in data for i in range(SIZE)]
    Recorded(model=model, args=arguments, train_dataset=rows).train()
    return losses
