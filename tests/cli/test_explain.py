"""``kreg explain``: why a site got its kernel, what it does now, and why a near miss was left as it is."""

from __future__ import annotations

from typing import Any

import pytest

from kreg.cli.explain import inside

from .conftest import Kreg


def test_explain_gives_every_candidate_its_reason(kreg: Kreg) -> None:
    ended = kreg("explain", "toys:attention", "--json")
    assert ended.code == 0
    candidates = ended.json["sites"][0]["candidates"]
    assert {c["kernel"] for c in candidates} >= {"torch.sdpa", "kreg.tiled_attention"}
    assert sum(c["taken"] for c in candidates) == 1 and all(c["reason"] for c in candidates)
    text = kreg("explain", "toys:attention").words
    assert "A query sees every key up to its own." in text and "against" in text


def test_explain_narrows_to_a_module_or_a_site(kreg: Kreg) -> None:
    (site,) = kreg("explain", "toys:attention", "--module", "layers.1", "--json").json["sites"]
    assert site["module"] == "layers.1"
    shown = kreg("explain", "toys:attention", "--site", site["id"])
    assert shown.code == 0 and "before:" in shown.out and "softmax" in shown.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--module", "layer.1"], "there is no module 'layer.1' (did you mean 'layers.1'?)"),
        (["--module", "layer"], "did you mean 'layers'?"),
        (["--module", "layer"], "What looked like an op is in: layers.0, layers.1"),
        (["--module", "layers.1.qvk"], "did you mean 'layers.1.qkv'?"),
        (["--site", "nowhere"], "there is no site 'nowhere'"),
    ],
)
def test_explain_of_what_is_not_there_is_bad_input(kreg: Kreg, options: list[str], told: str) -> None:
    ended = kreg("explain", "toys:attention", *options)
    assert ended.code == 2 and told in ended.words


def test_explain_says_why_a_subgraph_was_not_raised(kreg: Kreg) -> None:
    ended = kreg("explain", "toys:dropout")
    assert ended.code == 0 and "dropout is on for the attention weights" in ended.words
    assert "toys.py:" in ended.words


def marked(nodes: list[dict[str, Any]], mark: str) -> list[str]:
    """Names of the nodes with a mark."""
    return [node["name"] for node in nodes if node[mark]]


def test_a_near_miss_stands_among_its_nodes_from_the_scores_product_to_the_values(kreg: Kreg) -> None:
    (miss,) = kreg("explain", "toys:dropout", "--json").json["near_misses"]
    assert {"op", "module", "node", "reason"} < set(miss)
    nodes = miss["around"]
    names = [node["name"] for node in nodes if not node["read"]]
    assert names[0] == "matmul" and names[-1] == "matmul_1"
    assert marked(nodes, "anchor") == ["softmax"] and marked(nodes, "failed") == ["dropout"] == [miss["node"]]
    assert "triu" in marked(nodes, "read")  # the mask, which is computed elsewhere
    shapes = {node["name"]: node["value"] for node in nodes}
    assert shapes["softmax"] == "float32[2, 2, 24, 24]" and shapes["triu"] == "bool[24, 24]"
    assert all("toys.py:" in node["source"] for node in nodes if not node["read"])


def test_the_node_at_which_an_obligation_failed_is_marked(kreg: Kreg) -> None:
    shown = kreg("explain", "toys:dropout").out
    lines = [line.split() for line in shown.splitlines() if "%" in line]
    failed = [line for line in lines if line[:1] == ["✗"]]
    assert [line[1] for line in failed] == ["%dropout"] and "float32[2," in failed[0]
    assert [line[1] for line in lines if line[:1] == ["▸"]] == ["%softmax"]


def test_symbolic_sizes_are_shown_by_their_names(kreg: Kreg) -> None:
    (miss,) = kreg("explain", "toys:dropout", "--dynamic", "--json").json["near_misses"]
    shape = next(node["value"] for node in miss["around"] if node["anchor"])
    assert shape.startswith("float32[") and "s" in shape.removeprefix("float32[")
    assert " ".join(shape.split()) in kreg("explain", "toys:dropout", "--dynamic").words


def test_a_path_means_a_module_and_those_within_it(kreg: Kreg) -> None:
    sites = kreg("explain", "toys:attention", "--module", "layers", "--json").json["sites"]
    assert [site["module"] for site in sites] == ["layers.0", "layers.1"]
    assert inside("layers.1.attention", "layers.1") and not inside("layers.10.attention", "layers.1")


def test_a_module_in_which_nothing_looked_like_an_op_is_no_error(kreg: Kreg) -> None:
    ended = kreg("explain", "toys:attention", "--module", "layers.1.qkv")
    assert ended.code == 0 and "nothing in module 'layers.1.qkv' looked like an op" in ended.words


def test_a_replaced_site_says_what_runs_now_and_a_kept_one_that_the_original_does(kreg: Kreg) -> None:
    site = kreg("explain", "toys:attention", "--module", "layers.0", "--json").json["sites"][0]
    shown = kreg("explain", "toys:attention", "--module", "layers.0").words
    assert f"in place of {site['nodes_replaced']} nodes: %attention" in shown
    assert "kreg.attention(" in shown and "causal=True" in shown
    assert "the original code runs, node for node" in kreg("explain", "toys:attention", "--device", "npu").words


def test_repeated_layers_are_verified_once_and_each_says_where(kreg: Kreg) -> None:
    sites = kreg("explain", "toys:attention", "--json").json["sites"]
    assert {site["verified_at"] for site in sites} == {sites[0]["id"]} and sites[1]["verify"] == sites[0]["verify"]
    assert f"run at {sites[0]['id']} for all that are the same code" in kreg("explain", "toys:attention").words


def test_a_dry_run_says_nothing_of_what_runs_now(kreg: Kreg) -> None:
    assert "in place of" not in kreg("explain", "toys:attention", "--dry-run", "--device", "npu").words
