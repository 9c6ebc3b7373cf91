"""Records of builds, as data beside the tuning tables: what was compiled, and what it takes of a GPU.

Compiling everything takes longer than a test may. So what was compiled is recorded once, by
``python -m kreg.kernels.gpu --record``, with a digest of all that the compiler saw. Whether everything that would be
launched has a record, with the digest that it has now, is told in seconds, without compiling anything.
"""

from __future__ import annotations

import csv
import importlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kreg.errors import SpecError
from kreg.kernels.gpu.build import Binary

COMMAND = "python -m kreg.kernels.gpu --write docs/performance.md"
RESOURCES = ("shared_bytes", "registers", "spilled_bytes", "threads")
_FIELDS = tuple(field.name for field in fields(Binary))


@dataclass(frozen=True)
class Wanted:
    """A build that the launches of now need."""

    target: str
    kernel: str
    config: str
    digest: str


def path_of(module: str) -> Path:
    """Where the builds of a module are recorded: ``tuning/builds.csv`` beside it."""
    file = importlib.import_module(module).__file__
    assert file is not None
    return Path(file).parent / "tuning/builds.csv"


def read(module: str) -> tuple[Binary, ...]:
    """The recorded builds of a module; none where there is no record.

    Raises:
        SpecError: a line of the record is malformed.
    """
    path = path_of(module)
    where = "/".join(path.parts[-3:])
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(csv.reader(path.read_text(encoding="utf-8").splitlines()), 1):
        if line[0].startswith("#"):
            continue
        try:
            given = dict(zip(_FIELDS, line, strict=True))
            if line != list(_FIELDS):
                found.append(Binary(**given | {name: int(given[name]) for name in RESOURCES}))  # type: ignore[arg-type]
        except ValueError as error:
            raise SpecError(f"{where}, line {number}: {error}; write it anew: {COMMAND}") from None
    return tuple(found)


def written_by(module: str) -> str:
    """The version of Triton that a module's builds were recorded with; "" where there is no record."""
    path = path_of(module)
    return path.read_text(encoding="utf-8").partition("\n")[0].rpartition(" ")[2] if path.is_file() else ""


def write(module: str, binaries: Iterable[Binary]) -> None:
    """Record the builds of a module, each digest once, in their order."""
    import triton

    path = path_of(module)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# by {COMMAND}, with Triton {triton.__version__}\n")
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(_FIELDS)
        for binary in {binary.digest: binary for binary in binaries}.values():
            lines.writerow(str(getattr(binary, name)) for name in _FIELDS)


def complaints(module: str, recorded: Sequence[Binary], wanted: Sequence[Wanted]) -> list[str]:
    """What is launched without a record, recorded without being launched, or recorded twice: sentences."""
    have = {binary.digest: binary for binary in recorded}
    missing = Counter(
        (want.kernel, want.target)
        for want in {want.digest: want for want in wanted}.values()
        if want.digest not in have or _names(have[want.digest]) != _names(want)
    )
    found = [
        f"{module}: {count} builds of {kernel} for {target} are not recorded as they would be compiled now: {COMMAND}"
        for (kernel, target), count in missing.items()
    ]
    needed = {want.digest for want in wanted}
    left = Counter((binary.kernel, binary.target) for binary in recorded if binary.digest not in needed)
    found += [
        f"{module}: {count} recorded builds of {kernel} for {target} are of nothing that is launched now: {COMMAND}"
        for (kernel, target), count in left.items()
    ]
    if len(have) < len(recorded):
        found.append(f"{module}: {len(recorded) - len(have)} builds are recorded twice: {COMMAND}")
    return found


def differing(binary: Binary, recorded: Binary) -> list[str]:
    """Where a binary takes something else than the record of its digest says: sentences."""
    return [
        f"{binary.kernel} on {binary.target} with {binary.config}: {getattr(binary, name):,} {name.replace('_', ' ')}, "
        f"and {getattr(recorded, name):,} are recorded: {COMMAND}"
        for name in RESOURCES
        if getattr(binary, name) != getattr(recorded, name)
    ]


def _names(one: Binary | Wanted) -> tuple[str, str, str]:
    return one.target, one.kernel, one.config
