"""The JSON report is a contract: exactly these keys."""

from __future__ import annotations

import json

from kreg.rewriters.report import NearbyNode, NearMissReport

from .samples import mixed

REPORT = {"model", "device", "frontend", "nodes", "sites", "near_misses", "summary", "seconds"}
SITE = {"id", "op", "module", "status", "kernel", "reason", "mask", "dims", "dtype", "trainable", "verify"}
SITE |= {"alternatives", "nodes_replaced", "verified_at"}


def test_the_keys_are_those_of_the_schema() -> None:
    facts = json.loads(mixed().to_json())
    assert set(facts) == REPORT | {"calls", "dry_run", "unused"}
    assert all(set(site) == SITE for site in facts["sites"])
    assert {key for s in facts["sites"] for key in s["verify"] or ()} == {
        "passed",
        "max_error",
        "max_grad_error",
    }
    assert {key for s in facts["sites"] for a in s["alternatives"] for key in a} == {"kernel", "rejected"}
    assert all(set(miss) == {"op", "module", "node", "reason"} for miss in facts["near_misses"])
    assert list(facts["seconds"]) == ["capture", "raise", "plan", "lower", "verify"]


def test_the_summary_counts_by_op() -> None:
    assert json.loads(mixed().to_json())["summary"] == {
        "attention": {"found": 25, "replaced": 24},
        "sparse_attention": {"found": 7, "replaced": 6},
        "lightning_indexer": {"found": 6, "replaced": 6},
    }


def test_the_nodes_around_a_near_miss_are_for_people_and_stay_out_of_the_contract() -> None:
    node = NearbyNode(name="softmax", call="aten.softmax.int(%add, -1)", value="float32[2, 8, 8]", anchor=True)
    miss = NearMissReport(op="attention", module="layers.0", node="softmax", reason="it fails", around=(node,))
    report = mixed().model_copy(update={"near_misses": (miss,)})
    (written,) = json.loads(report.to_json())["near_misses"]
    assert set(written) == {"op", "module", "node", "reason"}
    assert report.near_misses[0].around == (node,)
