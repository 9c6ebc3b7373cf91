"""Pictures of masks show what was proven, and nothing that was not."""

from __future__ import annotations

from typing import Any

import pytest

from kreg.rewriters.report.drawing import CHOSEN, PADDED, SEEN, UNKNOWN, Panel, draw, icon, panels

DIMS = {"queries": 24, "keys": 24, "entries": 12, "selected": 3}


def grid(panel: Panel) -> list[list[str | None]]:
    return [[panel.cells(row, column) for column in range(panel.columns)] for row in range(panel.rows)]


def one(kind: str, dims: dict[str, Any] = DIMS, **facts: Any) -> list[list[str | None]]:
    (panel,) = panels({"kind": kind, **facts}, dims)
    return grid(panel)


def test_full_sees_every_key() -> None:
    assert {cell for row in one("full") for cell in row} == {SEEN}


def test_causal_sees_every_key_up_to_its_own() -> None:
    for row, cells in enumerate(one("causal")):
        assert cells == [SEEN] * (row + 1) + [None] * (23 - row)


def test_a_window_is_a_band_of_its_width() -> None:
    rows = one("sliding", window=5)
    assert rows[0] == [SEEN] + [None] * 23
    assert rows[23] == [None] * 19 + [SEEN] * 5


def test_a_window_wider_than_the_keys_is_a_triangle() -> None:
    assert one("sliding", window=4096) == one("causal")


def test_a_tiny_window_is_still_seen() -> None:
    rows = one("sliding", {"queries": 4096, "keys": 4096}, window=1)
    assert [sum(cell is not None for cell in row) for row in rows[1:]] == [2] * 23


def test_the_last_query_stands_at_the_last_key_of_a_cache() -> None:
    rows = one("causal", {"queries": 1, "keys": 24})
    assert rows == [[SEEN] * 24]


def test_padding_hides_keys_and_an_input_leaves_them_open() -> None:
    assert {cell for row in one("full+padding") for cell in row} == {SEEN, PADDED}
    assert {cell for row in one("causal+input") for cell in row} == {UNKNOWN, None}


def test_entries_are_seen_once_they_are_ready() -> None:
    keys, entries = panels({"kind": "sliding+block-causal", "window": 4, "ratio": 2}, DIMS)
    assert (keys.title, entries.title) == ("keys", "entries")
    seen = [sum(cell is not None for cell in row) for row in grid(entries)]
    assert seen == [(row + 1) // 2 for row in range(24)]


def test_no_more_entries_are_chosen_than_were_selected() -> None:
    _, entries = panels({"kind": "sliding+top-k", "window": 4, "ratio": 2}, DIMS)
    chosen = [sum(cell == CHOSEN for cell in row) for row in grid(entries)]
    assert chosen == [min(3, (row + 1) // 2) for row in range(24)]


@pytest.mark.parametrize("dims", [{}, {"queries": "s0", "keys": "s0 // 4"}, {"queries": 1, "keys": 1}])
@pytest.mark.parametrize(
    "kind",
    ["full", "causal", "sliding", "sliding+top-k", "sliding+block-causal+padding", "input", "block-causal"],
)
def test_any_mask_of_any_size_can_be_drawn(kind: str, dims: dict[str, Any]) -> None:
    assert draw({"kind": kind}, dims, "a mask", "m").count("<svg") == 1
    assert "<path" in icon({"kind": kind})


def test_an_unknown_kind_is_not_drawn() -> None:
    assert draw({"kind": "spiral"}, DIMS, "a mask", "m") == ""
