"""``generate()`` gives token for token what it gave before: prompts run rewritten graphs, decode steps the old code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import kreg
from kreg.rewriters.live import attached
from tests import models as small
from tests.live import models

VOCAB = small.VOCAB
LENGTH, NEW = 40, 6

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: models.qwen3(num_hidden_layers=1),
    "deepseek_v4": models.deepseek_v4,
    "gemma3": small.gemma3,  # a sliding layer and a causal one
    "gpt_oss": small.gpt_oss,  # the same, with sinks
}


def prompt(batch: int = 2, length: int = LENGTH, seed: int = 1) -> dict[str, Any]:
    return {"input_ids": small.tokens(batch, length, seed)}


def left_padded() -> dict[str, Any]:
    """The first of two prompts is shorter."""
    found = prompt()
    mask = torch.ones_like(found["input_ids"])
    mask[0, :7] = 0
    found["input_ids"][0, :7] = 0
    return found | {"attention_mask": mask}


@dataclass(frozen=True)
class Form:
    """One way to generate: what is given, and how many calls fill the cache."""

    inputs: Callable[[], dict[str, Any]]
    options: dict[str, Any]
    prefills: int = 1


FORMS = {
    "greedy": Form(prompt, {}),
    "beam": Form(prompt, {"num_beams": 3}),
    "sampled": Form(prompt, {"do_sample": True, "top_k": 20}),
    "left_padded": Form(left_padded, {}),
    "another_length": Form(lambda: prompt(1, LENGTH + 24, seed=2), {}),
    "a_long_prompt": Form(lambda: prompt(1, 3 * LENGTH, seed=3), {"max_new_tokens": 3 * NEW}),
    "chunked": Form(prompt, {"prefill_chunk_size": 16}, prefills=3),
}
QUICK = [("qwen3", form) for form in FORMS if form != "chunked"] + [
    ("deepseek_v4", "greedy"),
    ("gemma3", "greedy"),
    ("gpt_oss", "greedy"),
    ("gpt_oss", "left_padded"),
]
OTHERS = [(name, form) for name in BUILDERS for form in FORMS if (name, form) not in QUICK]


@dataclass
class Pair:
    """A model and what it was."""

    rewritten: nn.Module
    original: nn.Module

    @property
    def captures(self) -> tuple[int, int]:
        """Graphs that were made, and frames that Dynamo has looked at, so far."""
        return len(attached(self.rewritten).account.variants), counters["frames"]["total"]


@pytest.fixture(scope="module")
def pairs() -> Iterator[Callable[[str], Pair]]:
    """Models by name, each rewritten once, for the call that fills a cache."""
    torch._dynamo.reset()
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            model = BUILDERS[name]().eval()
            original = copy.deepcopy(model)
            with torch.no_grad():
                kreg.rewrite(model, verify=False, example_inputs=prompt() | {"use_cache": True})
            made[name] = Pair(model, original)
        return made[name]

    yield pair
    torch._dynamo.reset()


def generated(model: nn.Module, form: Form, **options: Any) -> torch.Tensor:
    """The tokens, the prompt's among them."""
    torch.manual_seed(0)
    common = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    found: torch.Tensor = model.generate(**form.inputs(), **(common | form.options | options))
    return found


def assert_generates_as_before(pair: Pair, form: Form) -> None:
    want = generated(pair.original, form)
    generated(pair.rewritten, form, max_new_tokens=1)  # the prompt alone
    captures, before = pair.captures, kreg.report(pair.rewritten).calls
    got = generated(pair.rewritten, form)
    after = kreg.report(pair.rewritten).calls
    assert torch.equal(got, want)
    steps = want.shape[1] - form.inputs()["input_ids"].shape[1] - 1
    assert after.rewritten - before.rewritten == form.prefills
    assert after.original - before.original == steps
    assert after.fallbacks == before.fallbacks
    assert pair.captures == captures, "a decode step captured something"
    assert all(site.status == "replaced" for v in attached(pair.rewritten).account.variants for site in v.report.sites)


@pytest.mark.parametrize(("name", "form"), QUICK)
def test_generate_gives_the_same_tokens_and_only_its_prompt_is_captured(
    pairs: Callable[[str], Pair], name: str, form: str
) -> None:
    assert_generates_as_before(pairs(name), FORMS[form])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), OTHERS)
def test_generate_gives_the_same_tokens_in_every_form_too(pairs: Callable[[str], Pair], name: str, form: str) -> None:
    assert_generates_as_before(pairs(name), FORMS[form])


def test_prompts_of_many_lengths_share_the_graphs_of_two(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("qwen3")
    assert_generates_as_before(pair, FORMS["another_length"])
    captures = pair.captures
    for length in (24, 51, 88):
        form = Form(lambda length=length: prompt(1, length, seed=length), {})  # type: ignore[misc]
        assert torch.equal(generated(pair.rewritten, form), generated(pair.original, form))
    assert pair.captures == captures


def test_a_prompt_that_goes_on_from_a_filled_cache_runs_a_rewritten_graph(pairs: Callable[[str], Pair]) -> None:
    pair, ids = pairs("qwen3"), prompt()["input_ids"]

    def continued(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            filled = model(input_ids=ids[:, : LENGTH // 2], use_cache=True).past_key_values
        return generated(model, FORMS["greedy"], past_key_values=filled)

    continued(pair.rewritten)
    captures, before = pair.captures, kreg.report(pair.rewritten).calls
    assert torch.equal(continued(pair.rewritten), continued(pair.original))
    assert pair.captures == captures
    assert kreg.report(pair.rewritten).calls.rewritten == before.rewritten + 2  # the first half, and the second


def test_what_a_prompt_leaves_in_the_cache_is_what_the_original_code_leaves(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("gemma3")
    with torch.no_grad():
        got, want = (m(**prompt(), use_cache=True).past_key_values for m in (pair.rewritten, pair.original))
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert type(mine) is type(theirs)
        assert mine.get_seq_length() == theirs.get_seq_length() == LENGTH
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=2e-5, atol=2e-5)
