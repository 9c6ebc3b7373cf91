"""The table in the terminal: everything that matters, at the width there is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kreg.rewriters.report import Calls, Report

from .samples import mixed, report


def printed(made: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    made.print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return str(text)


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_headline_counts_what_was_replaced_and_how_long_it_took() -> None:
    lines = printed(mixed()).splitlines()
    assert lines[0] == "Dots3ForCausalLM on cpu: 36 of 38 sites replaced"
    assert lines[1] == "8,412 nodes captured by export, 1,896 of them folded into 36 ops"
    assert lines[2].startswith("6.2 s: capture 3.4 s, raise 610 ms")


@pytest.mark.parametrize("width", [80, 100, 170])
def test_kernels_and_errors_are_whole_at_any_width(width: int) -> None:
    text = printed(report(40), width)
    for whole in ("kreg.tiled_sparse_attention", "kreg.tiled_indexer", "×19", "sparse_attention", "7.0e-07"):
        assert whole in text


def test_a_failed_verification_is_marked_and_its_reason_given() -> None:
    text = words(printed(mixed()))
    assert "✗ 3.1e-02" in text and "✗ 1.7e+00" in text and "verification failed" in text


def test_alternatives_are_told_where_there_was_a_choice_and_not_for_other_devices() -> None:
    text = words(printed(mixed()))
    assert "kreg.tiled_attention ×24: an estimated 912 us, against 604 us" in text
    assert "mindspeed" not in text


def test_where_no_kernel_is_for_the_device_every_refusal_is_told() -> None:
    made = mixed()
    site = made.sites[0].model_copy(
        update={"status": "kept", "kernel": None, "verify": None, "reason": "no kernel can be used here"}
    )
    refused = made.sites[-8].alternatives[0].model_copy(update={"rejected": "it runs on cpu, not on npu"})
    kept = site.model_copy(update={"alternatives": (refused,)})
    text = words(printed(made.model_copy(update={"sites": (kept,), "device": "npu"})))
    assert f"{refused.kernel}: it runs on cpu, not on npu" in text


def test_near_misses_say_where_and_why() -> None:
    text = words(printed(mixed()))
    assert "text.layers.{5..8}.cross_attn ×4 attention at softmax_45: dropout is applied" in text
    assert "modeling_x.py:212" in text


def test_a_model_without_sites_says_so() -> None:
    assert printed(report(0)).splitlines()[0] == "DeepseekV4ForCausalLM on cpu: nothing was found to replace"


def test_a_dry_run_says_that_nothing_was_replaced() -> None:
    text = printed(report(3, dry_run=True))
    assert "all 4 sites would be replaced" in text and "nothing was replaced" in text


def test_calls_are_counted_once_there_were_any() -> None:
    assert "Calls" not in printed(report(3))
    calls = Calls(rewritten=1200, original=3, fallbacks={"acme.flash: queries is 7": 2})
    text = words(printed(report(3, calls=calls)))
    assert "1,200 rewritten, 3 by the original code" in text
    assert "acme.flash: queries is 7: 2 by the reference" in text


def test_an_enabled_kernel_that_no_site_uses_is_told_with_the_reason() -> None:
    text = words(printed(report(3, unused={"mindspeed.li": "no site computes lightning_indexer"})))
    assert "Enabled, and used at no site mindspeed.li: no site computes lightning_indexer" in text
    assert "Enabled" not in printed(report(3))
