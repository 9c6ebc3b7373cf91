"""The table of compiled kernels, for the terminal, and from their records for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kreg.errors import SpecError
from kreg.kernels.gpu import records
from kreg.kernels.gpu.build import Binary
from kreg.kernels.gpu.targets import TARGETS

BEGIN, END = "<!-- compiled kernels: begin -->", "<!-- compiled kernels: end -->"


@dataclass
class Line:
    """One kernel with one configuration: its builds by target, for all dtypes and sizes that take it."""

    op: str
    kernel: str
    config: str
    builds: dict[str, list[Binary]] = field(default_factory=dict)

    def cell(self, target: str) -> str:
        """The most that a build takes of a target: KiB of shared memory, registers of a thread, bytes spilled."""
        builds = self.builds.get(target)
        if not builds:
            return ""
        shared = max(build.shared_bytes for build in builds) / 1024
        spilled = max(build.spilled_bytes for build in builds)
        registers = max(build.registers for build in builds)
        return f"{shared:.0f} KiB, {registers}" + (f", {spilled} B spilled" if spilled else "")


def op_of(module: str) -> str:
    """The op whose kernels a module has: kreg keeps the kernels of an op in a package of its name."""
    return module.split(".")[-2] if "." in module else module


def lines(builds: Iterable[tuple[str, Binary]]) -> list[Line]:
    """Binaries, each with its module, by op, kernel and configuration."""
    found: dict[tuple[str, str, str], Line] = {}
    for module, binary in builds:
        key = (op_of(module), binary.kernel, binary.config)
        line = found.setdefault(key, Line(*key))
        line.builds.setdefault(binary.target, []).append(binary)
    return list(found.values())


def header(targets: Sequence[str]) -> list[str]:
    """Names of the columns; under a target stands what it has."""
    return ["op", "kernel", "configuration", "builds", *targets]


def rows(builds: Iterable[tuple[str, Binary]], targets: Sequence[str]) -> Iterator[list[str]]:
    """The cells of every line."""
    for line in lines(builds):
        count = sum(len(builds) for builds in line.builds.values())
        yield [line.op, line.kernel, line.config, str(count), *(line.cell(target) for target in targets)]


def limits(targets: Sequence[str]) -> list[str]:
    """What each target has: a row of the table."""
    there = [f"{TARGETS[t].shared_bytes // 1024} KiB, {TARGETS[t].registers}" for t in targets]
    return ["", "", "at most", "", *there]


def written(page: str, modules: Iterable[str], targets: Sequence[str]) -> str:
    """A page with the table of the recorded builds between its markers.

    Raises:
        SpecError: the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SpecError(f"the page has no lines {BEGIN!r} and {END!r} to write the table between")
    recorded = ((module, binary) for module in modules for binary in records.read(module))
    body = [header(targets), ["---"] * (4 + len(targets)), limits(targets), *rows(recorded, targets)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in body)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
