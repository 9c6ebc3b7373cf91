"""Repeated layers are one row: only what is equal but for the layer's number is folded."""

from __future__ import annotations

import pytest

from kreg.rewriters.report.fold import fold_near_misses, fold_sites, spelled, split_layer

from .samples import attention, mixed, report


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([0, 1], "0,1"),
        (range(24), "0..23"),
        ([0, 2, 4], "0,2,4"),
        (range(0, 24, 2), "0,2,..,22"),
        ([0, 1, 2, 5, 6, 7, 9], "0..2,5..7,9"),
        ([3, 0, 7], "0,3,7"),
        ([0, 3, 4, 8, 11, 15, 16, 20, 30], "0,3,4,8,..,30"),
    ],
)
def test_layer_numbers_are_spelled_in_few_words(numbers: list[int], words: str) -> None:
    assert spelled(list(numbers)) == words


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("model.layers.12.self_attn", ("model.layers", 12, "self_attn")),
        ("layers.0", ("layers", 0, "")),
        ("encoder.conv1d.attn", ("encoder.conv1d.attn", None, "")),
        ("", ("", None, "")),
    ],
)
def test_the_layer_is_the_first_part_that_is_a_number(module: str, parts: tuple[str, int | None, str]) -> None:
    assert split_layer(module) == parts


def test_forty_layers_of_three_kinds_are_four_rows() -> None:
    folds = fold_sites(report(40).sites)
    assert [(f.module, f.count) for f in folds] == [
        ("model.layers.{0,1}.self_attn", 2),
        ("model.layers.{2,4,..,38}.self_attn.compressor.indexer", 19),
        ("model.layers.{2,4,..,38}.self_attn", 19),
        ("model.layers.{3,5,..,39}.self_attn", 19),
    ]


@pytest.mark.parametrize(
    "change",
    [{"reason": "it is enabled"}, {"status": "kept"}, {"dtype": "bfloat16"}, {"mask": {"kind": "causal"}}],
)
def test_sites_that_differ_in_anything_but_their_layer_stay_apart(change: dict[str, object]) -> None:
    assert len(fold_sites([attention(0, "sliding"), attention(1, "sliding", **change)])) == 2


def test_errors_and_node_counts_do_not_keep_layers_apart() -> None:
    (fold,) = fold_sites([attention(0, "sliding"), attention(1, "sliding", nodes_replaced=3)])
    assert fold.count == 2


def test_near_misses_fold_by_reason() -> None:
    folds = fold_near_misses(mixed().near_misses)
    assert [(f.module, f.count) for f in folds] == [
        ("text.layers.{5..8}.cross_attn", 4),
        ("text.layers.9.attn.indexer", 1),
    ]
