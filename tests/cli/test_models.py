"""MODEL on the command line: each kind of model, and each way for one to be bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Kreg

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def folder(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    return path


def test_a_folder_with_a_config_is_built_with_random_weights(kreg: Kreg, tmp_path: Path) -> None:
    ended = kreg("rewrite", folder(tmp_path), "--seq-len", "24", "--json")
    assert ended.code == 0 and ended.json["model"] == "LlamaForCausalLM"
    assert {(s["dims"]["queries"], s["dims"]["batch"]) for s in ended.json["sites"]} == {(24, 1)}


def test_the_path_of_the_config_itself_is_fine_and_dynamic_makes_two_sequences(kreg: Kreg, tmp_path: Path) -> None:
    path = folder(tmp_path) / "config.json"
    ended = kreg("rewrite", path, "--dynamic", "--dry-run", "--dtype", "bfloat16", "--json")
    assert ended.code == 0 and {s["dtype"] for s in ended.json["sites"]} == {"bfloat16"}
    assert all(isinstance(s["dims"]["queries"], str) for s in ended.json["sites"])


def test_a_dry_run_needs_no_memory_for_weights(kreg: Kreg, tmp_path: Path) -> None:
    huge = folder(tmp_path, hidden_size=65536, intermediate_size=1 << 20, num_hidden_layers=3)
    assert kreg("rewrite", huge, "--dry-run", "--seq-len", "16", "--json").code == 0
    refused = kreg("rewrite", huge, "--seq-len", "16")
    assert refused.code == 2 and "GiB for its weights" in refused.words and "--dry-run" in refused.words


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "llamma"}, "cannot be used by transformers"),
        ({"hidden_size": "wide"}, "cannot be used by transformers"),
        ({"num_attention_heads": 5, "head_dim": None}, "config.json"),
    ],
)
def test_a_config_that_transformers_refuses_is_bad_input(
    kreg: Kreg, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    ended = kreg("rewrite", folder(tmp_path, **config), "--dry-run")
    assert ended.code == 2 and told in ended.words and "Traceback" not in ended.err


def test_a_config_that_is_not_json_is_bad_input(kreg: Kreg, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    ended = kreg("rewrite", tmp_path)
    assert ended.code == 2 and "config.json" in ended.words


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nowhere", "there is no model 'nowhere'"),
        ("deepseek-ai/DeepSeek-V4", "Nothing is downloaded: give a folder."),
        ("nowhere.pt2", "there is no file 'nowhere.pt2'"),
        ("nowhere.models:make", "module 'nowhere.models' cannot be imported: ModuleNotFoundError"),
        ("toys:atention", "did you mean 'attention'"),
        ("toys:CONSTANT", "is a int, not a function"),
        ("toys:alone", "should return (model, example_inputs)"),
        ("toys:swapped", "the model is a tuple of 1"),
        ("toys:wordy", "the inputs are a str"),
        ("toys:broken", "failed: RuntimeError: the weights are elsewhere"),
    ],
)
def test_each_kind_of_bad_model_is_told_apart(kreg: Kreg, model: str, told: str) -> None:
    ended = kreg("rewrite", model, "--json")
    assert ended.code == 2 and told in ended.json["error"]["message"] and "Traceback" not in ended.err


def test_a_folder_without_config_and_a_file_of_another_kind_are_bad_input(kreg: Kreg, tmp_path: Path) -> None:
    assert "has no config.json" in kreg("rewrite", tmp_path).words
    (tmp_path / "model.onnx").write_text("")
    ended = kreg("rewrite", tmp_path / "model.onnx")
    assert ended.code == 2 and "neither a config.json nor a .pt2 file" in ended.words


def test_a_pt2_that_is_none_is_bad_input(kreg: Kreg, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_text("not an archive")
    ended = kreg("rewrite", tmp_path / "x.pt2", "--json")
    assert ended.code == 2 and ended.json["error"]["type"] == "ArtifactError"


@pytest.mark.parametrize("option", [["--seq-len", "8"], ["--dtype", "float32"], ["--dynamic"], ["--batch", "2"]])
def test_a_pt2_has_its_inputs_already(kreg: Kreg, tmp_path: Path, option: list[str]) -> None:
    path = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),)), path)
    ended = kreg("rewrite", path, *option)
    assert ended.code == 2 and f"{option[0]} cannot be given with a .pt2 file" in ended.words
    portable = kreg("rewrite", path, "--portable", "--export", tmp_path / "p.pt2")
    assert portable.code == 2 and "--portable is for models" in portable.words
