"""How numbers, masks and modules are written for people, in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kreg.rewriters.report.model import Alternative, Report, Seconds, SiteReport

STAGES = ("capture", "raise", "plan", "lower", "verify")
"""The stages of a rewrite, in order."""


def plural(count: int, noun: str) -> str:
    """``1 site``, ``1,204 sites``."""
    ending = "es" if noun.endswith(("s", "sh", "ch")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def error(value: float | None) -> str:
    """An error in two digits: ``3.1e-07``, ``0`` where there is none, ``-`` where it was not measured."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)


def seconds(value: float) -> str:
    """A duration: ``3.4 s``, ``12 ms``."""
    if value >= 60:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value:.1f} s" if value >= 0.95 else f"{1000 * value:.0f} ms"


def stage_times(times: Seconds) -> list[tuple[str, float]]:
    """Each stage with its seconds."""
    return list(zip(STAGES, (times.capture, times.raise_, times.plan, times.lower, times.verify), strict=True))


def module(path: str) -> str:
    """A module's path; the root has no path of its own."""
    return path or "(model)"


def size(value: object) -> str:
    """A dimension: numbers with separators, symbols as they are."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def mask(facts: Mapping[str, Any] | None) -> str:
    """A mask in one line: ``sliding 128 + top-k of entries 1:4 + padding``."""
    if facts is None:
        return "-"
    window, ratio = facts.get("window"), facts.get("ratio")
    words = {
        "sliding": f"sliding {size(window)}" if window else "sliding",
        "block-causal": f"block-causal 1:{size(ratio)}" if ratio else "block-causal",
        "top-k": f"top-k 1:{size(ratio)}" if ratio else "top-k",
        "input": _listed(facts.get("input")) or "input",
    }
    return " + ".join(words.get(part, part) for part in str(facts.get("kind", "?")).split("+"))


def mask_caption(facts: Mapping[str, Any] | None, dims: Mapping[str, int | str]) -> str:
    """A mask in a sentence: what a query sees."""
    if facts is None:
        return ""
    window, ratio = facts.get("window"), facts.get("ratio")
    parts, phrases = str(facts.get("kind", "")).split("+"), []
    if "sliding" in parts:
        phrases.append(f"the last {size(window)} keys" if window else "a window of keys")
    if "causal" in parts:
        phrases.append("every key up to its own")
    if "full" in parts:
        phrases.append("every key")
    ready = f"compressed entries of {size(ratio)} keys each" if ratio else "compressed entries"
    if "top-k" in parts:
        number = dims.get("selected")
        chosen = f"the {size(number)} selected" if isinstance(number, int) else "those selected"
        phrases.append(f"{chosen} of the {ready} that are ready")
    if "block-causal" in parts:
        phrases.append(f"all {ready} that are ready")
    sentence = "A query sees " + " and ".join(phrases) if phrases else "What a query sees comes with the input"
    if phrases and "input" in parts:
        sentence += f", as far as the {_listed(facts.get('input')) or 'mask'} from the input lets it"
    if "padding" in parts:
        sentence += ", but none that the padding mask hides"
    return f"{sentence}."


def _listed(names: object) -> str:
    if isinstance(names, str):
        return names
    return " + ".join(map(str, names)) if isinstance(names, list | tuple) else ""


def worst(sites: tuple[SiteReport, ...]) -> tuple[float | None, float | None]:
    """The largest error of the results and of the gradients among sites; None where none was verified."""
    forward = [s.verify.max_error for s in sites if s.verify]
    backward = [s.verify.max_grad_error for s in sites if s.verify and s.verify.max_grad_error is not None]
    return max(forward, default=None), max(backward, default=None)


def worth_knowing(site: SiteReport, device: str) -> list[Alternative]:
    """The kernels not taken that are made for this device, or all where there is none.

    `kreg.registry.environment.availability` begins the reason of a kernel of other devices so.
    """
    here = [
        a for a in site.alternatives if not (a.rejected.startswith("it runs on ") and f"not on {device}" in a.rejected)
    ]
    return here or ([] if site.kernel or site.verify else list(site.alternatives))


def headline(report: Report) -> str:
    """What came of it, in one sentence."""
    found, done = len(report.sites), sum(site.status == "replaced" for site in report.sites)
    if not found:
        return "nothing was found to replace"
    would = "would be replaced" if report.dry_run else "replaced"
    return f"all {found:,} sites {would}" if 1 < found == done else f"{done} of {plural(found, 'site')} {would}"
