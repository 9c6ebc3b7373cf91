"""``docs/coverage.md``: a page that says what a run's records say, and nothing else."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.zoo.families import FAMILIES
from tests.zoo.measure import Record
from tests.zoo.run import jobs, records
from tests.zoo.score import Score, is_attention, is_exported, is_verified, score

IMPLEMENTATIONS = ("eager", "sdpa")
NO_FORM = "it has no SDPA form"

KEPT = "## Other runs"
"""What other commands found: written by hand, below the rest of the page."""


def write(results: Path, page: Path) -> None:
    """Writes the page from a file of records; what stands under the heading `KEPT` stays as it is."""
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    kept = before[before.index(KEPT) :] if KEPT in before else ""
    written = "\n".join(_page(records(results), results)) + "\n"
    page.write_text(f"{written}\n{kept}" if kept else written, encoding="utf-8")


def _not_run(found: Sequence[Record]) -> Iterator[str]:
    """How many of the architectures that there are have no record, by family and form."""
    there = {(record["id"], record["implementation"]) for record in found}
    left = Counter(f"{s.family} {form}" for s, form in jobs() if (s.id, form) not in there)
    if left:
        yield f"Without a record, and so not in these tables: {', '.join(f'{n} {name}' for name, n in left.items())}."
        yield ""


def _page(found: Sequence[Record], results: Path) -> Iterator[str]:
    if not found:
        raise SystemExit(f"no records in {results}: run `python -m tests.zoo run --results {results}` first")
    versions = Counter(str(sorted(record["versions"].items())) for record in found)
    told = "; ".join(
        ", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items()))
        for record in {str(sorted(r["versions"].items())): r for r in found}.values()
    )
    yield "# Coverage"
    yield ""
    yield (
        f"Written by `python -m tests.zoo table` from {len(found)} records of `python -m tests.zoo run` with {told}."
        + (" The records are of several versions." if len(versions) > 1 else "")
    )
    yield ""
    yield from _definitions()
    yield from _not_run(found)
    scored = [(record, score(record)) for record in found if is_exported(record)]
    for section in (_summary, _masks, _indexers, _peers, _cost):
        yield from section(found, scored)
        yield ""
    yield from _left(scored)
    yield ""
    yield from _failures(found)
    yield ""
    yield from _table(found, scored)


Scored = list[tuple[Record, Score]]


def _definitions() -> Iterator[str]:
    yield (
        "Every architecture of transformers' auto classes is built small with random weights (`tests/zoo/build.py`), "
        "run once in eager Python while the attentions that it computes are counted without kreg's rules "
        "(`tests/zoo/oracle.py`), exported, and rewritten, with every site run old against new, forward and backward. "
        "An architecture is *complete* if every attention that was counted has a site, and *verified* if every one of "
        "these sites came out equal. Names that share both model and configuration class with another count once."
    )
    yield ""


def _summary(found: Sequence[Record], scored: Scored) -> Iterator[str]:
    yield "## Summary"
    yield ""
    rows = []
    for family in FAMILIES:
        for implementation in IMPLEMENTATIONS:
            here = [r for r in _once(found) if r["family"] == family and r["implementation"] == implementation]
            if implementation == "sdpa":
                here = [r for r in here if NO_FORM not in r.get("failed", "")]
            if not here:
                continue
            mine = [s for r, s in scored if r in here]
            some = [s for s in mine if s.attentions]
            sites = sum(s.attentions for s in mine)
            rows.append(
                (
                    family,
                    implementation,
                    len(here),
                    sum("parameters" in r for r in here),
                    len(mine),
                    len(some),
                    _share(sum(s.complete for s in some), len(some)),
                    _share(sum(s.right for s in some), len(some)),
                    sites,
                    _share(sum(s.raised for s in mine), sites),
                    _share(sum(s.verified for s in mine), sites),
                )
            )
    head = ("family", "form", "architectures", "built", "exported", "with attention", "complete", "verified")
    yield from _markdown((*head, "attentions", "raised", "verified"), rows)


def _masks(found: Sequence[Record], scored: Scored) -> Iterator[str]:
    yield "## Masks"
    yield ""
    counts: dict[str, Counter[str]] = {implementation: Counter() for implementation in IMPLEMENTATIONS}
    for record, told in scored:
        counts[record["implementation"]].update(told.masks)
    kinds = sorted({kind for counter in counts.values() for kind in counter})
    rows = [(kind, *(counts[implementation][kind] for implementation in IMPLEMENTATIONS)) for kind in kinds]
    yield from _markdown(("kind", *(f"sites, {implementation}" for implementation in IMPLEMENTATIONS)), rows)
    yield ""
    sites = sum(sum(told.masks.values()) for _, told in scored)
    yield f"Of all sites, {_share(sum(told.proven for _, told in scored), sites)} keep no part of a mask as a tensor."


def _indexers(found: Sequence[Record], scored: Scored) -> Iterator[str]:
    yield "## Indexers"
    yield ""
    yield (
        "Modules that take a top-k of scores which derive from a product of two things that depend on the input; "
        "raised is as an op of their own, beside the ops that the attentions of the same model were raised as."
    )
    yield ""
    rows = []
    for record, told in scored:
        if told.indexers:
            ops = Counter(site["op"] for site in record.get("sites", ()))
            raised = ", ".join(f"{count} {op}" for op, count in sorted(ops.items()))
            rows.append((_named(record), record["implementation"], told.indexers, told.indexers_raised, raised))
    yield from _markdown(("architecture", "form", "indexers", "raised", "all sites"), sorted(rows))


def _peers(found: Sequence[Record], scored: Scored) -> Iterator[str]:
    yield "## Beside PyTorch Inductor"
    yield ""
    yield (
        "Inductor's attention patterns on the same exported graphs, decomposed as it does for inference; its own code "
        "generation is not run. Graphs in SDPA form hold the fused call already and leave its patterns nothing to find."
    )
    yield ""
    rows = []
    for family in FAMILIES:
        mine = [
            (r, s)
            for r, s in scored
            if r["family"] == family and r["implementation"] == "eager" and "inductor" in r and s.attentions
        ]
        mine = [(r, s) for r, s in mine if not r["alias_of"]]
        if not mine:
            continue
        fused = [r["name"] for r, _ in mine if r["inductor"]]
        rows.append(
            (
                family,
                len(mine),
                len(fused),
                sum(s.raised > 0 for _, s in mine),
                sum(s.attentions for _, s in mine),
                sum(r["inductor"] for r, _ in mine),
                sum(s.raised for _, s in mine),
                ", ".join(fused),
            )
        )
    head = ("family", "architectures, eager", "with some fused by Inductor", "raised by kreg")
    yield from _markdown((*head, "attentions", "fused by Inductor", "raised by kreg", "those of Inductor"), rows)


def _cost(found: Sequence[Record], scored: Scored) -> Iterator[str]:
    yield "## Cost"
    yield ""
    shares = {}
    for record in (record for record, _ in scored if "kreg" in record["seconds"]):
        spent = record["seconds"]["kreg"]
        capture = record["seconds"]["export"] + spent["capture"]
        shares[record["id"], record["implementation"]] = (spent["raise"] + spent["plan"] + spent["lower"]) / capture
    nodes = [record["nodes"] for record, _ in scored if "nodes" in record]
    dearest = max(shares, key=lambda key: shares[key])
    yield (
        f"Raise, plan and lower take {100 * statistics.median(shares.values()):.1f}% of the time of capture in the "
        f"median over {len(shares)} graphs of {min(nodes)} to {max(nodes)} nodes, and {100 * shares[dearest]:.0f}% at "
        f"most ({', '.join(dearest)})."
    )


def _left(scored: Scored) -> Iterator[str]:
    yield "## What is left"
    yield ""
    groups: dict[tuple[str, str], set[str]] = {}
    silent: list[str] = []
    for record, told in scored:
        if told.right:
            continue
        name = f"{_named(record)} ({record['implementation']})"
        if "failed" in record:
            groups.setdefault(("all", _general(record["failed"])), set()).add(name)
        near = [m for m in record.get("near_misses", ()) if is_attention(m["op"])]
        for miss in near:
            groups.setdefault((miss["op"], _general(miss["reason"])), set()).add(name)
        for site in record.get("sites", ()):
            if is_attention(site["op"]) and not is_verified(site):
                groups.setdefault((site["op"], _general(site["reason"]) or "not verified"), set()).add(name)
        if not near and not told.complete and "failed" not in record:
            silent.append(f"{name}: {', '.join(told.missed[:2])}")
    rows = [(op, reason, len(names), _some(names)) for (op, reason), names in groups.items()]
    rows.sort(key=lambda row: -row[2])
    yield from _markdown(("op", "reason", "graphs", "of"), rows)
    if silent:
        yield ""
        yield f"Attentions without a site and without a near miss: {'; '.join(silent)}."


def _failures(found: Sequence[Record]) -> Iterator[str]:
    yield "## What could not be built or exported"
    yield ""
    groups: dict[tuple[str, str], list[str]] = {}
    for record in found:
        if "failed" in record and not is_exported(record) and NO_FORM not in record["failed"]:
            reason = record["failed"].split("; ")[0][:220]
            groups.setdefault((record["stage"], reason), []).append(f"{_named(record)} ({record['implementation']})")
    rows = [(stage, _some(names, 8), reason) for (stage, reason), names in groups.items()]
    yield from _markdown(("stage", "architectures", "reason"), sorted(rows))
    yield ""
    text = {_named(r) for r in found if "with_images" in r}
    if text:
        yield f"Exported with text alone, since they do not export with images: {', '.join(sorted(text))}."
        yield ""
    ready = {_named(r) for r in found if "prepared" in r}
    if ready:
        yield (
            "Exported as `transformers.exporters` prepares them (sizes computed beforehand, one fused call for a loop "
            f"over images), since they do not export as they are: {', '.join(sorted(ready))}."
        )
        yield ""
    without = {_named(r) for r in found if NO_FORM in r.get("failed", "")}
    yield f"Without an SDPA form: {', '.join(sorted(without))}."


def _table(found: Sequence[Record], scored: Scored) -> Iterator[str]:
    yield "## By architecture"
    yield ""
    yield "Attentions by the oracle / raised / verified, masks by kind, and what Inductor fuses of the eager form."
    by = {(r["id"], r["implementation"]): (r, s) for r, s in scored}
    for family in FAMILIES:
        names = sorted({r["name"] for r in found if r["family"] == family and not r["alias_of"]})
        rows = []
        for name in names:
            cells: list[str] = []
            masks: Counter[str] = Counter()
            fused = ""
            for implementation in IMPLEMENTATIONS:
                entry = by.get((f"{family}/{name}", implementation))
                if entry is None:
                    cells.append("–")
                    continue
                record, told = entry
                cells.append(f"{told.attentions} / {told.raised} / {told.verified}")
                masks.update(told.masks)
                if implementation == "eager":
                    fused = str(record.get("inductor", ""))
            if cells != ["–", "–"]:
                rows.append((name, *cells, ", ".join(sorted(masks)), fused))
        if rows:
            yield ""
            yield f"### {family}"
            yield ""
            yield from _markdown(("architecture", *IMPLEMENTATIONS, "masks", "Inductor"), rows)


def _once(found: Iterable[Record]) -> list[Record]:
    return [record for record in found if not record["alias_of"]]


def _named(record: Record) -> str:
    return record["name"] if record["family"] == "causal" else record["id"]


def _general(reason: str) -> str:
    """A reason without the place, the names of nodes and the numbers that make it one graph's own."""
    reason = re.sub(r" \(\w+\.py:.*", "", reason)
    return re.sub(r"\d+", "#", re.sub(r"\b[a-z]+(_[a-z0-9]+)*_\d+\b", "…", reason))[:200]


def _some(names: Iterable[str], most: int = 6) -> str:
    names = sorted(set(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f}%)" if whole else "0"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
