"""Phrases that kreg's messages share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def listing(names: Iterable[object], none: str = "none") -> str:
    """Names in a row, or a word for their absence."""
    return ", ".join(str(name) for name in names) or none


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest known name, "" where none is near."""
    by_lower = {k.lower(): k for k in known}
    near = get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
