"""SAS, LI or neither, as users choose: on the graph of a DeepSeek-V4, planned for an Ascend device that is not here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from typer.testing import CliRunner

import kreg
from kreg.api import settings_for
from kreg.cli import app
from kreg.registry.catalogue import catalogue
from kreg.registry.environment import Environment
from kreg.registry.plan import Plan, SiteFacts, make_plan
from kreg.rewriters import program
from kreg.rewriters.capture import export_model
from kreg.rewriters.facts import facts_of, op_nodes
from kreg.rewriters.find import find
from kreg.rewriters.pipeline import Clock, rewrite_graph
from kreg.rewriters.raising import raise_sites
from kreg.rewriters.report import Report, SiteReport
from tests.models import CSA, HCA, SLIDING, deepseek_v4, tokens

SAS, LI = "mindspeed.sas", "mindspeed.li"
BOTH = (SAS, LI)
TOKENS = 256
INDEXER, ATTENTION = "lightning_indexer", "sparse_attention"


@pytest.fixture(autouse=True)
def _no_choice_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KREG_ENABLE", "KREG_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    """A sliding layer and one with an indexer, with the head and index sizes that MindSpeed's functions take."""
    model = deepseek_v4(
        (SLIDING, CSA),
        torch.bfloat16,
        num_attention_heads=64,
        head_dim=512,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=64,
        compress_rates={CSA: 4, HCA: 128},
        hc_mult=1,
        hc_sinkhorn_iters=1,
    )
    return program.functional(export_model(model, {"input_ids": tokens(1, TOKENS)}, None)).module


@pytest.fixture(scope="module")
def sites(graph: GraphModule) -> tuple[SiteFacts, ...]:
    """What planning knows of its sites: an indexer and two attentions."""
    raised = raise_sites(graph, find(graph.graph).sites)
    return tuple(facts_of(node, op) for node, op in op_nodes(raised.module.graph))


Planned = Callable[..., Report]


@pytest.fixture(scope="module")
def planned(graph: GraphModule) -> Planned:
    """The report of a dry run for an Ascend device, by choice of kernels."""

    def report(**choice: Any) -> Report:
        settings = settings_for("npu", None, dry_run=True, **choice)
        return rewrite_graph(graph, settings, model="DeepSeek-V4", frontend="export", clock=Clock()).report

    return report


def kernels(report: Report) -> dict[str, set[str | None]]:
    """The kernels that indexers and attentions got."""
    return {op: {site.kernel for site in of(report, op)} for op in (INDEXER, ATTENTION)}


def of(report: Report, op: str) -> list[SiteReport]:
    return [site for site in report.sites if site.op == op]


def why_not(site: SiteReport, kernel: str) -> str:
    return next(other.rejected for other in site.alternatives if other.kernel == kernel)


# ---- neither forced


def with_layers_like_the_first(sites: tuple[SiteFacts, ...], more: int) -> tuple[SiteFacts, ...]:
    """The sites of a deeper model, with so many sliding layers more."""
    sliding = next(site for site in sites if not site.attributes.get("has_compressed", True))
    return (*sites, *(replace(sliding, id=f"{sliding.id}_{i}") for i in range(more)))


def cost(plan: Plan) -> float:
    return sum(choice.cost_us for choice in plan.choices.values() if choice.cost_us is not None)


def plan_of(sites: tuple[SiteFacts, ...], *off: str) -> Plan:
    return make_plan(sites, catalogue(), Environment.supposed("npu"), disable=off)


@pytest.mark.parametrize(("more", "taken", "given_up"), [(0, LI, SAS), (8, SAS, LI)])
def test_neither_forced_the_better_for_the_whole_graph_is_taken(
    sites: tuple[SiteFacts, ...], more: int, taken: str, given_up: str
) -> None:
    deeper = with_layers_like_the_first(sites, more)
    found, other = plan_of(deeper), plan_of(deeper, taken)
    assert taken in found.kernels and given_up not in found.kernels
    assert given_up in other.kernels and taken not in other.kernels
    assert cost(found) == pytest.approx(cost(plan_of(deeper, given_up))) and cost(found) < cost(other)


def test_neither_forced_the_report_gives_the_reason_and_both_estimates(planned: Planned) -> None:
    report = planned()
    (indexer,) = of(report, INDEXER)
    assert indexer.kernel == LI and SAS not in kernels(report)[ATTENTION]
    assert f"it excludes {SAS}, given up at" in indexer.reason
    for site in of(report, ATTENTION):
        told = why_not(site, SAS)
        assert told.startswith(f"it and {LI} exclude each other, and {LI} is used at {indexer.id}")
        so, without = (float(n.replace(",", "")) for n in re.findall(r"([\d,]+\.\d) us", told))
        assert so < without


# ---- one forced


def test_sas_forced_li_is_off_and_the_report_says_why(planned: Planned) -> None:
    report = planned(enable=[SAS])
    assert kernels(report) == {INDEXER: {None}, ATTENTION: {SAS}}
    assert {site.reason for site in of(report, ATTENTION)} == {"it is enabled"}
    (indexer,) = of(report, INDEXER)
    assert why_not(indexer, LI) == f"it and {SAS} exclude each other, and {SAS} is enabled"


def test_li_forced_sas_is_off_and_other_kernels_take_the_attention(planned: Planned) -> None:
    report = planned(enable=[LI])
    assert kernels(report)[INDEXER] == {LI}
    for site in of(report, ATTENTION):
        assert site.kernel is not None and site.kernel.startswith("torch_npu.")
        assert why_not(site, SAS) == f"it and {LI} exclude each other, and {LI} is enabled"


@pytest.mark.parametrize(
    ("variables", "choice", "indexer", "attention"),
    [
        ({"KREG_ENABLE": LI}, {}, LI, "torch_npu."),
        ({"KREG_ENABLE": "mindspeed.*", "KREG_DISABLE": "*.sas"}, {}, LI, "torch_npu."),
        ({"KREG_DISABLE": "*.sas"}, {"enable": ["mindspeed.*"]}, LI, "torch_npu."),
        ({"KREG_DISABLE": "mindspeed.*"}, {}, None, "torch_npu."),
        ({"KREG_DISABLE": SAS}, {"disable": LI}, None, "torch_npu."),
        ({"KREG_ENABLE": " mindspeed.sas ,"}, {}, None, SAS),
        ({"KREG_DISABLE": "torch_npu.*,mindspeed.li"}, {}, None, SAS),
    ],
)
def test_environment_variables_and_arguments_choose_together_by_name_and_by_pattern(
    planned: Planned,
    monkeypatch: pytest.MonkeyPatch,
    variables: Mapping[str, str],
    choice: dict[str, Any],
    indexer: str | None,
    attention: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = kernels(planned(**choice))
    assert found[INDEXER] == {indexer}
    assert all(kernel is not None and kernel.startswith(attention) for kernel in found[ATTENTION])


def test_everything_disabled_the_original_code_stays_and_each_kernel_says_that_it_is_disabled(planned: Planned) -> None:
    report = planned(disable=["*"])
    assert {site.status for site in report.sites} == {"kept"}
    (indexer,) = of(report, INDEXER)
    assert why_not(indexer, LI) == "it is disabled"


# ---- both forced


class Attention(nn.Module):
    """Something to rewrite; that both are forced is an error whatever the model."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (0.3 * q @ k.mT).softmax(-1) @ v


QKV = tuple(torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0)))


def compiled(**choice: Any) -> None:
    torch._dynamo.reset()
    try:
        torch.compile(Attention(), backend="kreg", options=choice)(*QKV)
    except BackendCompilerFailed as error:  # PyTorch's wrapping of whatever a backend raises
        raise error.inner_exception from None


WAYS: dict[str, Callable[..., object]] = {
    "rewrite": lambda **choice: kreg.rewrite(Attention(), "cpu", QKV, **choice),
    "rewrite, captured by the first call": lambda **choice: kreg.rewrite(Attention(), "cpu", **choice),
    "export": lambda **choice: kreg.export(Attention(), QKV, device="npu", **choice),
    "lower": lambda **choice: kreg.lower(kreg.export(Attention(), QKV, portable=True), "npu", **choice),
    "analyse": lambda **choice: kreg.analyse(Attention(), QKV, device="npu", dry_run=True, **choice),
    "torch.compile": compiled,
}


@pytest.mark.parametrize("enable", [BOTH, ("mindspeed.*",), f"{LI}, {SAS}"], ids=["names", "pattern", "one string"])
@pytest.mark.parametrize("way", WAYS)
def test_both_forced_is_a_value_error_that_names_both_and_says_what_to_do(way: str, enable: Any) -> None:
    with pytest.raises(ValueError, match="exclude each other") as caught:
        WAYS[way](enable=enable)
    assert isinstance(caught.value, kreg.SelectionError)
    assert all(name in str(caught.value) for name in BOTH) and "enable only" in str(caught.value)


def _lowered_before_the_environment_is_set() -> Callable[..., object]:
    portable = kreg.export(Attention(), QKV, portable=True)
    return lambda **choice: kreg.lower(portable, "npu", **choice)


@pytest.mark.parametrize("way", WAYS)
def test_one_forced_by_the_environment_and_one_by_argument_is_the_same_error(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _lowered_before_the_environment_is_set() if way == "lower" else WAYS[way]
    monkeypatch.setenv("KREG_ENABLE", SAS)
    with pytest.raises(kreg.SelectionError, match="exclude each other"):
        run(enable=[LI])


@pytest.mark.parametrize("way", WAYS)
def test_a_misspelt_kernel_is_told_before_anything_is_captured(way: str) -> None:
    with pytest.raises(kreg.SelectionError, match=r"no kernel is called 'mindspeed\.saz' \(did you mean"):
        WAYS[way](enable=["mindspeed.saz"])


# ---- on the command line


def run(*arguments: str, width: int = 120) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})
    return done.exit_code, done.stdout, done.stderr


def test_on_the_command_line_both_forced_ends_with_exit_code_2_before_a_model_is_made() -> None:
    code, _, told = run("rewrite", "no/such/model", "--device", "npu", "--dry-run", "--enable", SAS, "--enable", LI)
    assert code == 2 and all(name in told for name in BOTH) and "enable only" in " ".join(told.split())


NO_DEVICE = "there is no npu device here"
TORCH_NPU = 'package torch_npu is not installed: pip install "torch_npu>=2.13"'
MINDSPEED = 'package mindspeed is not installed: pip install "mindspeed @ git+https://gitcode.com/Ascend/MindSpeed.git"'


@pytest.fixture
def without_torch_npu() -> Iterator[None]:
    if Environment.detect("npu").present or "torch_npu is not installed" not in str(reasons(SAS)):
        pytest.skip("torch_npu is here")
    yield


def reasons(kernel: str) -> list[str]:
    from kreg.cli.catalogue import reasons_of

    return reasons_of(catalogue().kernel(kernel), "npu")


def install(folder: Path, version: str, *modules: str) -> None:
    """A distribution called mindspeed whose modules may not be imported."""
    info = folder / f"mindspeed-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mindspeed\nVersion: {version}\n")
    for module in ("mindspeed/__init__", "mindspeed/ops/__init__", *modules):
        path = folder / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('looking for a package imported it')\n")


@pytest.mark.usefixtures("without_torch_npu")
def test_a_machine_with_nothing_is_told_of_the_device_and_of_each_package_with_its_command() -> None:
    assert reasons(SAS) == [NO_DEVICE, TORCH_NPU, MINDSPEED]
    assert reasons("torch_npu.sparse_flash_attention") == [NO_DEVICE, TORCH_NPU]


@pytest.mark.usefixtures("without_torch_npu")
def test_mindspeed_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "0.17.0", "mindspeed/ops/npu_sparse_attn_shared_kv", "mindspeed/ops/npu_lightning_indexer")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reasons(SAS) == reasons(LI) == [NO_DEVICE, TORCH_NPU]


@pytest.mark.usefixtures("without_torch_npu")
def test_a_package_called_mindspeed_without_the_function_is_no_mindspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "0.0.1", "mindspeed/ops/npu_lightning_indexer")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reasons(LI) == [NO_DEVICE, TORCH_NPU]
    (lacking,) = set(reasons(SAS)) - {NO_DEVICE, TORCH_NPU}
    assert "mindspeed.ops.npu_sparse_attn_shared_kv" in lacking and "git+https://gitcode.com" in lacking


@pytest.mark.usefixtures("without_torch_npu")
@pytest.mark.parametrize("width", [80, 120])
def test_the_list_says_each_reason_once_with_its_command_on_a_line_of_its_own(width: int) -> None:
    code, out, _ = run("list", "--device", "npu", width=width)
    lines = [line.rstrip() for line in out.splitlines()]
    assert code == 0 and max(map(len, lines)) <= width
    for reason in (NO_DEVICE, TORCH_NPU, MINDSPEED):
        sentence, _, command = reason.partition(": ")
        assert sum(sentence in line for line in lines) == 1
        assert not command or sum(line.strip() == command for line in lines) == 1
    rows = {cells[0]: cells for cells in map(str.split, lines) if "npu" in cells}
    assert rows[SAS][-4:] == ["no", "1", "2", "3"]
    assert rows["torch_npu.sparse_flash_attention"][-3:] == ["no", "1", "2"]
    assert f"{SAS} excludes {LI}" in out or LI in rows[SAS]
