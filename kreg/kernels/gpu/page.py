"""The table of compiled kernels, for the terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kreg.errors import SpecError
from kreg.kernels.gpu.build import Binary
from kreg.kernels.gpu.collect import Outcome
from kreg.kernels.gpu.targets import TARGETS

BEGIN, END = "<!-- compiled kernels: begin -->", "<!-- compiled kernels: end -->"


@dataclass
class Line:
    """One kernel with one configuration: its builds by target, for all dtypes and sizes that take it."""

    op: str
    kernel: str
    config: str
    builds: dict[str, list[Binary | None]] = field(default_factory=dict)

    def cell(self, target: str) -> str:
        """The most that a build takes of a target: KiB of shared memory, registers of a thread, bytes spilled."""
        builds = self.builds.get(target)
        if not builds:
            return ""
        made = [build for build in builds if build is not None]
        if len(made) < len(builds):
            return "does not compile"
        shared = max(build.shared_bytes for build in made) / 1024
        spilled = max(build.spilled_bytes for build in made)
        registers = max(build.registers for build in made)
        return f"{shared:.0f} KiB, {registers}" + (f", {spilled} B spilled" if spilled else "")


def lines(outcomes: Iterable[Outcome]) -> list[Line]:
    """Outcomes by op, kernel and configuration."""
    found: dict[tuple[str, str, str], Line] = {}
    for outcome in outcomes:
        task = outcome.task
        key = (task.op, task.kernel, str(task.config))
        line = found.setdefault(key, Line(*key))
        line.builds.setdefault(task.target, []).append(outcome.binary)
    return list(found.values())


def header(targets: Sequence[str]) -> list[str]:
    """Names of the columns; under a target stands what it has."""
    return ["op", "kernel", "configuration", "builds", *targets]


def rows(outcomes: Iterable[Outcome], targets: Sequence[str]) -> Iterator[list[str]]:
    """The cells of every line."""
    for line in lines(outcomes):
        count = sum(len(builds) for builds in line.builds.values())
        yield [line.op, line.kernel, line.config, str(count), *(line.cell(target) for target in targets)]


def limits(targets: Sequence[str]) -> list[str]:
    """What each target has: a row of the table."""
    there = [f"{TARGETS[t].shared_bytes // 1024} KiB, {TARGETS[t].registers}" for t in targets]
    return ["", "", "at most", "", *there]


def written(page: str, outcomes: Sequence[Outcome], targets: Sequence[str]) -> str:
    """A page with the table between its markers.

    Raises:
        SpecError: the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SpecError(f"the page has no lines {BEGIN!r} and {END!r} to write the table between")
    body = [header(targets), ["---"] * (4 + len(targets)), limits(targets), *rows(outcomes, targets)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in body)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
