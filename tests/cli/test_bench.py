"""``kreg bench``: what it measures and how it says so. How long things take is no test's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3Config

from tests.cli.conftest import Kreg

TOY = "tests.cli.toys:attention"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Qwen3's config."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_prefill_and_decode_are_measured_beside_eager_and_the_table_names_them(kreg: Kreg, folder: Path) -> None:
    options = ("--step", "prefill", "--step", "decode", "--baseline", "eager", "--rounds", "1", "--seq-len", "32")
    ended = kreg("bench", str(folder), *options, "--json")
    assert ended.code == 0, ended.words
    prefill, decode = ended.json
    assert [row["case"]["step"] for row in (prefill, decode)] == ["prefill", "decode"]
    for row in (prefill, decode):
        assert row["medians"].keys() == {"eager", "kreg"} and min(row["medians"].values()) > 0
        assert row["ratios"].keys() == row["processor_ratios"].keys() == {"eager"}
        assert not row["skipped"]  # no call of the prompt ran the original code
    assert any(share["name"] == "kreg::attention" for share in prefill["shares"])
    assert not any(share["name"].startswith("kreg::") for share in decode["shares"])
    shown = kreg("bench", str(folder), *options[2:])
    assert "decode" in shown.out and "x eager" in shown.out and "peak memory" in shown.out


def test_depth_is_measured_without_weights_and_every_layer_is_in_the_count(kreg: Kreg, folder: Path) -> None:
    ended = kreg("bench", str(folder), "--depth", "1", "--depth", "5", "--rounds", "1", "--seq-len", "32", "--json")
    assert ended.code == 0, ended.words
    shallow, deep = ended.json
    assert (shallow["layers"], shallow["sites"]) == (1, {"attention": 1})
    assert (deep["layers"], deep["sites"]) == (5, {"attention": 5})
    assert shallow["ratio"] == shallow["processor_ratio"] == 1.0
    assert deep["processor_seconds"] > 0


def test_layers_of_several_kinds_are_cut_or_go_round_again_with_the_depth(kreg: Kreg, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "use_sliding_window": True}
    (folder / "config.json").write_text(json.dumps(config))
    ended = kreg("bench", str(folder), "--depth", "1", "--depth", "3", "--rounds", "1", "--seq-len", "32", "--json")
    assert ended.code == 0, ended.words
    assert [row["sites"] for row in ended.json] == [{"attention": 1}, {"attention": 3}]


def test_a_function_brings_its_own_inputs(kreg: Kreg) -> None:
    ended = kreg("bench", TOY, "--step", "training", "--baseline", "none", "--rounds", "1")
    assert ended.code == 0, ended.words
    assert "training" in ended.out and "S=" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((TOY, "--step", "decode"), "needs a model that fills a cache"),
        ((TOY, "--step", "decoding"), "'decoding' is not known; known: forward, training, prefill, decode"),
        ((TOY, "--depth", "2"), "needs a folder with a config.json"),
        ((TOY, "--depth", "2", "--step", "prefill"), "with neither --step nor --baseline"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(kreg: Kreg, arguments: tuple[str, ...], said: str) -> None:
    ended = kreg("bench", *arguments, "--json")
    assert ended.code == 2
    assert said in ended.words
