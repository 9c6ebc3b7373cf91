"""Depth is free: what is captured and raised is the layers that differ, not the layers."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import kreg
from kreg.api import analyse
from kreg.rewriters.live import attached
from tests.models import CSA, HCA, SLIDING, VOCAB, deepseek_v4, llama


def tokens() -> dict[str, object]:
    ids = torch.randint(VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "use_cache": False}


def test_layers_that_are_alike_share_their_graphs_and_each_is_in_the_report() -> None:
    torch._dynamo.reset()
    model = deepseek_v4([SLIDING, *[CSA, HCA] * 4])
    kreg.rewrite(model, device="cpu", example_inputs=tokens())
    account = attached(model).account
    assert sum(variant.replaced for variant in account.variants) == 3  # one for each kind of layer
    report = kreg.report(model)
    assert report.summary["sparse_attention"] == {"found": 9, "replaced": 9}
    assert report.summary["lightning_indexer"] == {"found": 4, "replaced": 4}
    modules = [site.module for site in report.sites if site.op == "sparse_attention"]
    assert modules == [f"model.layers.{i}.self_attn" for i in range(9)]
    verified = {site.verified_at for site in report.sites if site.op == "sparse_attention"}
    assert len(verified) == 3 and all(at is not None and at.startswith("model.layers.") for at in verified)


def test_a_deeper_model_has_no_more_graphs() -> None:
    counts = []
    for layers in (2, 12):
        torch._dynamo.reset()
        model = llama(layers=layers)
        kreg.rewrite(model, device="cpu", example_inputs=tokens(), verify=False)
        counts.append(len(attached(model).account.variants))
        assert kreg.report(model).summary == {"attention": {"found": layers, "replaced": layers}}
    assert counts == [1, 1]


def test_a_model_of_fake_tensors_is_planned_for_another_device_layer_by_layer() -> None:
    torch._dynamo.reset()
    mode = FakeTensorMode()
    with mode:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            attn_implementation="eager",
        )
        model = LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(2, 48, dtype=torch.long), "use_cache": False}
    report = analyse(model, inputs, device="cuda", dry_run=True)
    assert report.dry_run and report.device == "cuda"
    assert [site.mask for site in report.sites] == [{"kind": "causal"}] * 3
    assert model._compiled_call_impl is None
