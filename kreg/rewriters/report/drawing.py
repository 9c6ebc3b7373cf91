"""Masks as pictures: which keys each query sees, drawn from what was proven about the mask.

A picture is a few panels side by side, one for the keys and one for compressed entries. Each panel is a
coarse grid: a row is a stretch of queries, a column a stretch of keys. Widths are to scale where a scale can
be seen at all: a window of 128 over 4,096 keys is drawn two columns wide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

ROWS = 24
"""Rows of a panel, and columns of the one for keys."""

ENTRY_COLUMNS = 12
"""Columns of the panel for compressed entries."""

CELL = 7
GAP = 18
TOP = 16

ICON = 8
"""Rows and columns of an icon."""

SEEN, CHOSEN, PADDED, UNKNOWN = "seen", "chosen", "padded", "unknown"
"""What a cell can be: visible, one of the selected, hidden by an input, visible if an input says so."""

Cells = Callable[[int, int], str | None]
"""The kind of a cell, by row and column; None for one that is never seen."""


@dataclass(frozen=True)
class Panel:
    """One grid of a picture."""

    title: str
    rows: int
    columns: int
    cells: Cells


def panels(mask: Mapping[str, Any], dims: Mapping[str, int | str]) -> list[Panel]:
    """What to draw for a mask."""
    parts = set(str(mask.get("kind", "")).split("+"))
    queries, keys = _count(dims.get("queries")), _count(dims.get("keys"))
    rows = min(ROWS, queries or ROWS)
    drawn: list[Panel] = []
    if parts & {"sliding", "causal", "full", "input"}:
        columns = min(ROWS, keys or ROWS)
        cells = _over_keys(parts, mask, rows, columns, queries, keys)
        drawn.append(Panel("keys", rows, columns, cells))
    if parts & {"top-k", "block-causal"}:
        entries = _count(dims.get("entries"))
        columns = min(ENTRY_COLUMNS, entries or ENTRY_COLUMNS)
        drawn.append(Panel("entries", rows, columns, _over_entries(parts, rows, columns, dims)))
    return drawn


def draw(mask: Mapping[str, Any], dims: Mapping[str, int | str], label: str, name: str) -> Markup:
    """A mask as SVG, coloured by the page's classes.

    Args:
        mask: what was proven about it.
        dims: the sizes of its site.
        label: its text, for those who cannot see it.
        name: unique on the page.
    """
    drawn = panels(mask, dims)
    if not drawn:
        return Markup("")
    parts, x = [_patterns(name)], 14
    for panel in drawn:
        parts.append(_panel(panel, x, name))
        x += panel.columns * CELL + GAP
    width, height = x - GAP + 2, TOP + max(p.rows for p in drawn) * CELL + 2
    middle = TOP + drawn[0].rows * CELL / 2
    turn = f'transform="translate(9 {middle:g}) rotate(-90)" text-anchor="middle"'
    side = f'<text class="axis" {turn}>queries</text>'
    return Markup(
        f'<svg class="mask" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{side}{"".join(parts)}</svg>'
    )


def icon(mask: Mapping[str, Any] | None, size: int = ICON) -> Markup:
    """A mask as a mark of a few cells, without labels, for a symbol that is drawn many times."""
    if mask is None:
        return Markup(f'<path d="M0 0h{size}v{size}h-{size}z" class="seen"/>')
    parts = set(str(mask.get("kind", "")).split("+"))
    if parts & {"sliding", "causal", "full", "input"}:
        extra = parts & {"top-k", "block-causal"}
        left = size - 3 if extra else size
        own = _over_keys(parts - {"padding"}, {"window": 2}, size, left, size, left if extra else size)
        paths = _paths(size, left, own)
        if extra:
            entries = _over_entries(parts, size, 3, {})
            paths += f'<g transform="translate({left} 0)">{_paths(size, 3, entries)}</g>'
        return Markup(paths)
    return Markup(_paths(size, size, _over_entries(parts, size, size, {})))


def _count(size: object) -> int | None:
    return size if isinstance(size, int) and size > 0 else None


def _over_keys(
    parts: set[str], mask: Mapping[str, Any], rows: int, columns: int, queries: int | None, keys: int | None
) -> Cells:
    """Keys: all, those before the query, or a band of them; a stretch of them hidden by a padding mask."""
    window, scale = _count(mask.get("window")), (keys or queries or 0) / columns
    band = columns
    if "sliding" in parts and window:
        band = max(2, round(window / scale)) if scale else columns // 4
    padding = max(1, columns // 8) if "padding" in parts else 0
    # Fewer queries than keys: a cache; the last query stands at the last key.
    first = columns - columns * (queries or 1) / keys if queries and keys and queries < keys else 0.0

    def cell(row: int, column: int) -> str | None:
        at = first + (row + 1) * (columns - first) / rows - 1
        seen = True
        if parts & {"causal", "sliding"}:
            seen = column <= at + 1e-9
        if "sliding" in parts:
            seen = seen and column > at - band
        if not seen:
            return None
        if column < padding:
            return PADDED
        return UNKNOWN if "input" in parts else SEEN

    return cell


def _over_entries(parts: set[str], rows: int, columns: int, dims: Mapping[str, int | str]) -> Cells:
    """Compressed entries, each ready once the queries have passed its block: all, or the selected."""
    entries, selected = _count(dims.get("entries")), _count(dims.get("selected"))
    share = min(1.0, selected / entries) if entries and selected else 0.4
    chosen = max(1, round(share * columns))

    def cell(row: int, column: int) -> str | None:
        ready = (row + 1) * columns // rows
        if column >= ready:
            return None
        if "top-k" not in parts or ready <= chosen:
            return SEEN if "top-k" not in parts else CHOSEN
        return CHOSEN if column in _some(ready, chosen, row) else SEEN

    return cell


def _some(count: int, chosen: int, seed: int) -> set[int]:
    """So many of the first numbers, scattered but the same every time: which ones the model decides."""
    return set(sorted(range(count), key=lambda i: (i * 2654435761 + seed * 40503 + i * i * 97) % 1009)[:chosen])


def _patterns(name: str) -> str:
    """Hatching and dots in the colour of the site: a pattern takes its colour from where it is defined."""
    return (
        f'<pattern id="{name}-{PADDED}" width=".5" height=".5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path class="ink" d="M0 0h.22v.5h-.22z"/></pattern>'
        f'<pattern id="{name}-{UNKNOWN}" width="1" height="1" patternUnits="userSpaceOnUse">'
        '<circle class="ink" cx=".5" cy=".5" r=".26"/></pattern>'
    )


def _panel(panel: Panel, x: int, name: str) -> str:
    width, height = panel.columns * CELL, panel.rows * CELL
    lines = "".join(f"M{i} 0v{panel.rows}" for i in range(1, panel.columns))
    lines += "".join(f"M0 {i}h{panel.columns}" for i in range(1, panel.rows))
    return (
        f'<text class="axis" x="{x}" y="{TOP - 5}">{escape(panel.title)}</text>'
        f'<g transform="translate({x} {TOP}) scale({CELL})">'
        f'<path class="ground" d="M0 0h{panel.columns}v{panel.rows}h-{panel.columns}z"/>'
        f"{_paths(panel.rows, panel.columns, panel.cells, name)}"
        f'<path class="lines" d="{lines}"/></g>'
        f'<path class="frame" d="M{x} {TOP}h{width}v{height}h-{width}z"/>'
    )


def _paths(rows: int, columns: int, cells: Cells, name: str = "") -> str:
    """One path for each kind of cell, made of runs along the rows; ``name`` is whose patterns to use."""
    runs: dict[str, list[str]] = {}
    for row in range(rows):
        for kind, group in groupby(range(columns), key=lambda column: cells(row, column)):
            members = list(group)
            if kind is not None:
                run = len(members)
                runs.setdefault(kind, []).append(f"M{members[0]} {row}h{run}v1h-{run}z")
    fills = {kind: f' fill="url(#{name}-{kind})"' for kind in (PADDED, UNKNOWN) if name}
    return "".join(
        f'<path class="{kind}"{fills.get(kind, "")} d="{"".join(parts)}"/>' for kind, parts in sorted(runs.items())
    )
