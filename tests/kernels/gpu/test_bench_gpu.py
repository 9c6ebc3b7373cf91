"""``kreg bench --device cuda``, but for the GPU: what it counts, what it compares, what it says; on tiny sizes."""

from __future__ import annotations

import gc
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kreg.bench import gpu, gpu_baselines, gpu_eager
from kreg.bench.gpu import Run
from kreg.bench.gpu_case import FLASH, GROUPED, SMALL_HEADS, TINY, Case
from kreg.bench.gpu_cases import arguments, cases, pairs, work
from kreg.bench.gpu_check import check
from kreg.bench.gpu_table import facts, shown
from kreg.bench.gpu_timing import Ceilings, HostTimer, ceilings
from kreg.cli.app import app
from kreg.registry.catalogue import catalogue
from kreg.registry.ops.attention import band
from kreg.registry.ops.sparse_attention import ready
from kreg.registry.spec import KernelSpec, hold

CASES = [
    Case(op, layer, step, batch, context, TINY)
    for op, layer, step, batch, context in [
        ("sparse_attention", "sliding", "forward", 1, 5),
        ("sparse_attention", "sliding", "forward", 2, 37),
        ("sparse_attention", "selected", "forward", 2, 37),
        ("sparse_attention", "compressed", "forward", 1, 300),
        ("sparse_attention", "selected", "decode", 3, 67),
        ("sparse_attention", "compressed", "decode", 2, 300),
        ("lightning_indexer", "selected", "forward", 2, 37),
        ("lightning_indexer", "selected", "decode", 2, 130),
        ("attention", "causal", "forward", 2, 21),
        ("attention", "window", "forward", 1, 37),
        ("attention", "window", "forward", 1, 5),
        ("attention", "sinks", "forward", 1, 21),
        ("sparse_mqa_sink", "selected", "decode", 3, 130),
        ("indexer_topk", "selected", "decode", 3, 130),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_pairs_that_the_roofline_counts_are_those_that_the_op_keeps(case: Case) -> None:
    place = {"offset": case.context - case.queries, "device": torch.device("cpu")}
    kept = ready(case.queries, case.entries, ratio=max(1, case.ratio), **place)
    if case.op in ("lightning_indexer", "indexer_topk"):
        assert pairs(case) == int(kept.sum())
        return
    if case.op == "sparse_mqa_sink":
        chosen = arguments(case, torch.float32, "cpu")["topk_indices"]
        assert all(pairs(case) == len(set(row)) == len(row) for row in chosen.tolist())
        return
    if case.op == "attention":
        given = arguments(case, torch.float32, "cpu")
        seen = band(case.queries, case.context, causal=True, window=given.get("window", 0), **place)
        assert seen is not None and pairs(case) == int(seen.sum())
        return
    window = band(case.queries, case.context, causal=True, window=TINY.window, **place)
    assert window is not None
    chosen = arguments(case, torch.float32, "cpu").get("indices")
    entries = int(kept.sum()) if chosen is None else int((chosen[0] >= 0).sum())
    assert pairs(case) == int(window.sum()) + entries


def test_the_picks_of_a_query_are_distinct_and_ready() -> None:
    case = Case("sparse_attention", "selected", "forward", 2, 61, TINY)
    indices = arguments(case, torch.float32, "cpu")["indices"]
    assert indices.shape == (2, 61, TINY.topk)
    for batch, row in torch.cartesian_prod(torch.arange(2), torch.arange(61)).tolist():
        chosen = [i for i in indices[batch, row].tolist() if i >= 0]
        assert len(chosen) == len(set(chosen)) == min(TINY.topk, (row + 1) // 4)
        assert all((i + 1) * 4 <= row + 1 for i in chosen)


@pytest.mark.parametrize("case", [case for case in CASES if case.layer == "selected"], ids=lambda case: case.label)
def test_selected_entries_are_ready_by_the_arguments_themselves(case: Case) -> None:
    given = arguments(case, torch.float32, "cpu")
    if "indices" in given and given["ratio"]:
        position = torch.arange(case.queries)[:, None] + given["offset"]
        assert ((given["indices"] + 1) * given["ratio"] <= position + 1).all()


def test_the_work_of_the_real_size_is_what_one_counts_by_hand() -> None:
    decode = Case("sparse_attention", "selected", "decode", 64, 65536)
    operations, moved = work(decode, 2)
    assert operations == 2 * 2 * 64 * 64 * 512 * (128 + 512)
    assert moved == 64 * (2 * 64 * 512 * 2 + (128 + 512) * 512 * 2 + 512 * 8)
    prompt = Case("sparse_attention", "sliding", "forward", 1, 1024)
    assert work(prompt, 2)[0] == 4 * 64 * 512 * (sum(range(1, 128)) + 128 * (1024 - 127))
    assert work(Case("sparse_attention", "sliding", "backward", 1, 1024), 2)[0] == 2.5 * work(prompt, 2)[0]


def eager(case: Case, given: dict[str, Any]) -> torch.Tensor:
    return gpu.EAGER[case.op](case, given, False)()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_baseline_does_the_work_of_the_op(case: Case) -> None:
    given = arguments(case, torch.float32, "cpu")
    op = catalogue().op(case.op)
    want = op.reference(**given)
    if case.op in ("lightning_indexer", "indexer_topk"):
        assert op.error(given, (eager(case, given),), want) < 1e-5
        return
    expected = want[0] if case.op == "sparse_mqa_sink" else want[0].transpose(1, 2)
    torch.testing.assert_close(eager(case, given), expected, rtol=1e-5, atol=1e-6)
    if case.op not in gpu.NO_FLEX:
        with torch.no_grad():
            torch.testing.assert_close(gpu_baselines.flex(case, given)(), expected, rtol=1e-5, atol=1e-6)


def test_the_eager_forms_are_those_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    case = Case("sparse_attention", "selected", "forward", 2, 37, TINY)
    given = arguments(case, torch.float32, "cpu")
    keys, mask = gpu_baselines.keys_and_mask(case, given)
    module = SimpleNamespace(num_key_value_groups=TINY.heads, sinks=given["sinks"], training=False)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    kv = keys()[:, None]
    want, _ = modeling.eager_attention_forward(module, given["q"], kv, kv, bias, given["scale"])
    torch.testing.assert_close(gpu_baselines.eager(case, given)(), want)

    config = SimpleNamespace(index_head_dim=TINY.index_dim, index_n_heads=TINY.index_heads, hidden_size=1)
    scorer = modeling.DeepseekV4IndexerScorer(config)
    scorer.weights_proj = torch.nn.Identity()
    case = Case("lightning_indexer", "selected", "forward", 2, 37, TINY)
    given = arguments(case, torch.float32, "cpu")
    scores = scorer(given["q"], given["k"], given["weights"] / scorer.weights_scaling)
    kept = ready(37, case.entries, ratio=4, offset=0, device=torch.device("cpu"))
    best = scores.masked_fill(~kept, float("-inf")).topk(case.selected, dim=-1)
    want = best.indices.masked_fill(best.values.isneginf(), -1)
    assert torch.equal(gpu_baselines.eager(case, given)(), want)


@pytest.mark.parametrize(("family", "layer"), [("llama", "window"), ("gpt_oss", "sinks")])
def test_the_eager_forms_of_attention_are_those_of_transformers(family: str, layer: str) -> None:
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    case = Case("attention", layer, "forward", 2, 21, TINY)
    given = arguments(case, torch.bfloat16, "cpu")
    seen = band(21, 21, causal=True, window=given.get("window", 0), offset=0, device=torch.device("cpu"))
    assert seen is not None
    bias = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    module = SimpleNamespace(num_key_value_groups=2, sinks=given.get("sinks"), training=False)
    want, _ = modeling.eager_attention_forward(module, given["q"], given["k"], given["v"], bias, given["scale"])
    torch.testing.assert_close(gpu_eager.attention(case, given)(), want, rtol=0, atol=0)


def some(case: Case) -> bool:
    return case.layer != "sliding" and case.layer != "compressed" and (case.batch == 1 or case.op in SERVING)


SERVING = ("sparse_mqa_sink", "indexer_topk")
SOME = [case for case in cases(TINY, (24,), (40,), (24,), {"causal": TINY, "sinks": TINY}) if some(case)]
MINE = {
    "lightning_indexer": "kreg.tiled_indexer",
    "sparse_attention": "kreg.tiled_sparse_attention",
    "attention": "kreg.tiled_attention",
    "sparse_mqa_sink": "kreg.tiled_sparse_mqa_sink",
    "indexer_topk": None,
}


def run_tiny(monkeypatch: pytest.MonkeyPatch, limit: float = 300.0) -> tuple[Run, list[gpu.Row]]:
    monkeypatch.setattr(gpu, "BASELINES", ("eager", "flex"))  # Inductor takes long to compile
    run = Run("cpu", torch.float32, HostTimer(), limit)
    gc.collect()
    gc.freeze()  # each row collects garbage: not among all that the other tests have imported
    try:
        return run, list(run.rows(SOME, ceiling_size=64, moved=2**16))
    finally:
        gc.unfreeze()


def test_every_kernel_and_baseline_has_a_row_for_every_case_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = run_tiny(monkeypatch)
    assert {check.kernel for check in run.checks} >= {name for name in MINE.values() if name}
    assert all(check.passed for check in run.checks), run.checks
    assert {case.op for case in SOME} == set(MINE) == set(gpu.EAGER)
    measured = {(row.case, row.variant) for row in rows if row.seconds is not None}
    for case in SOME:
        assert {(case, MINE[case.op] or "eager"), (case, "eager")} <= measured
    for row in rows:
        assert (row.seconds is None) == bool(row.skipped)
        assert row.seconds is None or row.reached == pytest.approx(row.roofline / row.seconds)

    assert json.loads(json.dumps(facts(run, rows, "a machine")))["rows"]
    page = io.StringIO()
    console = Console(file=page, width=140)
    for part in shown(run, rows, "a machine"):
        console.print(part)
    assert "sparse_attention selected backward, batch 1" in page.getvalue()
    assert "FlexAttention has no top-k" in page.getvalue()


def test_what_no_time_is_left_for_is_said_to_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = run_tiny(monkeypatch, limit=0.0)
    assert {row.skipped for row in rows} == {"no time is left"}


def test_a_kernel_that_is_wrong_is_found_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    op = catalogue().op("sparse_attention")

    def off(q: torch.Tensor, kv: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        out, lse = op.reference(q, kv, *rest, **more)
        return out * 1.001, lse

    def spec(function: Any, **fields: Any) -> KernelSpec:
        return KernelSpec(
            op=op.name, name="test.off", entry=hold(function), devices=["cpu"], dtypes=["float32"], **fields
        )

    found = check(spec(off), op, torch.float32, "cpu")
    assert not found.passed and "of the accepted error in its result" in found.failed
    assert check(spec(op.reference, trains=True), op, torch.float32, "cpu").passed
    taken = check(spec(op.reference, constraints=["head_dim > 4096"]), op, torch.float32, "cpu")
    assert taken.failed == "it takes none of the op's samples"

    monkeypatch.setattr(Run, "_kernels", lambda self, name: [spec(off)] if name == op.name else [])
    _, rows = run_tiny(monkeypatch, limit=0.0)
    assert rows and "test.off" not in {row.variant for row in rows}


def test_the_roofline_is_the_slower_of_a_product_and_a_copy() -> None:
    ceiling = Ceilings(flops=100.0, bandwidth=10.0)
    assert (ceiling.seconds(200.0, 10.0), ceiling.bound(200.0, 10.0)) == (2.0, "matmul")
    assert (ceiling.seconds(200.0, 50.0), ceiling.bound(200.0, 50.0)) == (5.0, "copy")
    measured = ceilings(torch.float32, "cpu", HostTimer(), size=64, moved=2**16)
    assert measured.flops > 0 and measured.bandwidth > 0


def test_the_cases_are_the_sizes_that_were_asked_for() -> None:
    asked = cases()
    assert (FLASH.heads, FLASH.head_dim, FLASH.window, FLASH.topk) == (64, 512, 128, 512)
    for step in ("forward", "backward"):
        lengths = {c.context for c in asked if c.step == step and c.op == "sparse_attention" and c.layer == "selected"}
        assert lengths == {1024, 4096, 16384, 65536}
    for op in ("sparse_attention", "lightning_indexer"):
        decoded = {(c.batch, c.context) for c in asked if c.step == "decode" and c.op == op and c.layer == "selected"}
        assert decoded == {(b, n) for b in (1, 64) for n in (4096, 65536, 1048576)}
    for op in SERVING:
        assert {(c.batch, c.context) for c in asked if c.op == op} == {(64, n) for n in (4096, 65536, 1048576)}
    widths = {"causal": GROUPED, "window": GROUPED, "sinks": SMALL_HEADS}
    dense = {(c.layer, c.step, c.context, c.sizes) for c in asked if c.op == "attention"}
    assert dense == {
        (layer, step, n, sizes)
        for layer, sizes in widths.items()
        for step in ("forward", "backward")
        for n in (4096, 16384)
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so_and_fails() -> None:
    done = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert done.exit_code == 2
    assert "there is no cuda device here" in " ".join(done.output.split())
    for arguments_given in ([], ["--device", "cpu"], ["--device", "cuda", "--step", "decode"]):
        assert CliRunner().invoke(app, ["bench", *arguments_given]).exit_code == 2
