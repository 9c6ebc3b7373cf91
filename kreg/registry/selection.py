"""What a user asked for: kernels to enable and to disable, by name or pattern."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

from kreg.errors import SelectionError
from kreg.registry.catalogue import Catalogue
from kreg.registry.wording import did_you_mean, listing

ENABLE, DISABLE = "KREG_ENABLE", "KREG_DISABLE"
"""Environment variables: comma-separated kernel names or patterns."""


def selection_from_environment(
    enable: Iterable[str] = (), disable: Iterable[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to enable and disable, with ``KREG_ENABLE`` and ``KREG_DISABLE`` added."""
    added = [os.environ.get(name, "") for name in (ENABLE, DISABLE)]
    both = [(*_listed(given), *_listed(more)) for given, more in zip((enable, disable), added, strict=True)]
    return tuple(dict.fromkeys(both[0])), tuple(dict.fromkeys(both[1]))


def _listed(names: Iterable[str]) -> tuple[str, ...]:
    """Names from a list, or from one comma-separated string."""
    parts = names.split(",") if isinstance(names, str) else names
    return tuple(part.strip() for part in parts if part.strip())


def selected(
    catalogue: Catalogue, enable: Iterable[str], disable: Iterable[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the enabled kernels, and the disabled ones with the reason.

    Raises:
        SelectionError: an unknown name, a kernel both enabled and disabled, or two enabled that exclude each
            other.
    """
    enabled, disabled = _listed(enable), _listed(disable)
    both = set(enabled) & set(disabled)
    if both:
        raise SelectionError(f"{listing(sorted(both))} is both enabled and disabled: leave out one of them")
    off = dict.fromkeys(_matches(catalogue, disabled, "disable"), "it is disabled")
    wanted = tuple(name for name in _matches(catalogue, enabled, "enable") if name not in off)
    for number, first in enumerate(wanted):
        for second in wanted[:number]:
            if second in catalogue.excluded_by(first):
                raise SelectionError(
                    f"{second} and {first} are both enabled, and they exclude each other: enable only "
                    f"{second!r} or only {first!r}, disable one of them where a pattern enabled both, or "
                    "enable neither and let the plan weigh them"
                )
    return wanted, off


def _matches(catalogue: Catalogue, patterns: Iterable[str], argument: str) -> tuple[str, ...]:
    names = sorted(catalogue.specs)
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            hint = did_you_mean(pattern, names)
            raise SelectionError(f"{argument}: no kernel is called {pattern!r}{hint}. Known: {listing(names)}")
        found |= dict.fromkeys(matching)
    return tuple(found)
