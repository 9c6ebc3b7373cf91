"""What has to compile: the launches and tuning tables that the catalogue's kernels offer.

The module of a kernel's entry may have ``builds(target)``, which yields `Launch`es, and ``TABLES``, the tuning tables
that its launches take their configurations from; ``BORROWED`` are tables of another module, whose builds take all
their rows. What was compiled is recorded: see `kreg.kernels.gpu.records`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from types import ModuleType

from kreg.errors import SpecError
from kreg.kernels.gpu import records
from kreg.kernels.gpu.build import Binary, BuildError, compile_for, misfits, specialise
from kreg.kernels.gpu.launch import Launch
from kreg.kernels.gpu.tables import Config, Table
from kreg.kernels.gpu.targets import COMPILED, target_of


@dataclass(frozen=True)
class Task:
    """One launch of one module for one target, by its place among those that ``builds`` yields."""

    module: str
    target: str
    place: int
    kernel: str
    config: Config


@dataclass(frozen=True)
class Outcome:
    """A task's binary, or why there is none; and why the target cannot hold it."""

    task: Task
    binary: Binary | None
    problems: tuple[str, ...]


def modules_with_builds() -> tuple[str, ...]:
    """Names of the modules of the catalogue's CUDA kernels that offer ``builds``.

    Raises:
        SpecError: the module of one of kreg's own kernels cannot be imported.
    """
    from kreg.registry.catalogue import catalogue

    entries = {
        entry.partition(":")[0]: spec
        for spec in catalogue().specs.values()
        if "cuda" in spec.devices
        for entry in (spec.entry, spec.backward)
        if entry is not None and entry.startswith("kreg.")
    }
    return tuple(name for name in sorted(entries) if hasattr(_module(name), "builds"))


def tables_of(module: str) -> tuple[Table, ...]:
    """The tuning tables of a module with builds."""
    return tuple(getattr(_module(module), "TABLES", ()))


def tuned_by(module: str) -> tuple[Table, ...]:
    """All tables that a module's launches take configurations from, its own and another's."""
    return (*tables_of(module), *getattr(_module(module), "BORROWED", ()))


def targets_of(modules: Iterable[str]) -> list[str]:
    """The targets that every kernel is compiled for, and those that some tuning table has rows for besides."""
    more = {name for module in modules for table in tuned_by(module) for name in table.targets}
    return [*COMPILED, *sorted(more - set(COMPILED))]


def tasks(modules: Iterable[str], targets: Sequence[str], kernel: str = "") -> Iterator[Task]:
    """Everything to compile for these targets, of kernels whose name contains ``kernel``."""
    for module in modules:
        for target in targets:
            for place, launch in enumerate(launches(module, target)):
                if kernel in launch.name or kernel in module:
                    yield Task(module, target, place, launch.name, launch.config)


def one_of_each(todo: Iterable[Task]) -> list[Task]:
    """One task for each kernel function, on targets that take turns: a sample for where all take too long."""
    by_kernel: dict[tuple[str, str], list[Task]] = {}
    for task in todo:
        by_kernel.setdefault((task.module, task.kernel), []).append(task)
    found = []
    for number, some in enumerate(by_kernel.values()):
        targets = list(dict.fromkeys(task.target for task in some))
        target = targets[number % len(targets)]
        found.append(next(task for task in some if task.target == target))
    return found


@lru_cache(maxsize=64)
def launches(module: str, target: str) -> tuple[Launch, ...]:
    """What a module would launch on a target; beyond `COMPILED`, only where it has a configuration for it."""
    if target not in COMPILED and not any(target in table.targets for table in tuned_by(module)):
        return ()
    return tuple(_module(module).builds(target_of(target)))


def digest_of(task: Task) -> str:
    """Of what the compiler would see of a task.

    Raises:
        BuildError: Triton rejects its arguments, or is interpreting.
    """
    return specialise(launches(task.module, task.target)[task.place], target_of(task.target)).digest


def distinct(todo: Iterable[Task]) -> list[Task]:
    """Tasks without those that are compiled to what an earlier one is, and may spill or may not as that one."""
    found: dict[tuple[str, bool], Task] = {}
    for task in todo:
        try:
            key = digest_of(task)
        except BuildError as error:  # compiling it says so again
            key = str(error)
        found.setdefault((key, bool(task.config.spills)), task)
    return list(found.values())


def run(task: Task) -> Outcome:
    """Compile one task."""
    target, launch = target_of(task.target), launches(task.module, task.target)[task.place]
    try:
        binary = compile_for(launch, target)
    except Exception as error:  # a child's exception may not survive the way to its parent
        return Outcome(task, None, (str(error),))
    return Outcome(task, binary, tuple(misfits(binary, target, task.config.spills)))


def unlike_records(outcomes: Iterable[Outcome]) -> list[str]:
    """Where a binary takes something else than what is recorded of it, in words."""
    known: dict[str, dict[str, Binary]] = {}
    found = []
    for outcome in outcomes:
        module, binary = outcome.task.module, outcome.binary
        if module not in known:
            known[module] = {binary.digest: binary for binary in records.read(module)}
        recorded = known[module].get(binary.digest) if binary is not None else None
        if binary is not None and recorded is not None:
            found += records.differing(binary, recorded)
    return found


def check(modules: Iterable[str]) -> tuple[int, list[str]]:
    """Whether everything that would be launched is recorded and fits its target; nothing is compiled.

    Returns:
        how many builds there are, and what is wrong, in words.
    """
    count, problems = 0, []
    for module in modules:
        recorded, allowed, wanted = records.read(module), dict[str, str](), []
        for task in tasks([module], targets_of([module])):
            try:
                digest = digest_of(task)
            except BuildError as error:
                problems.append(str(error))
                continue
            allowed[digest] = task.config.spills if allowed.get(digest, task.config.spills) else ""
            wanted.append(records.Wanted(task.target, task.kernel, str(task.config), digest))
        count += len(allowed)
        problems += records.complaints(module, recorded, wanted)
        for binary in recorded:
            problems += misfits(binary, target_of(binary.target), allowed.get(binary.digest, ""))
    return count, list(dict.fromkeys(problems))


def run_all(todo: Sequence[Task], processes: int = 2) -> Iterator[Outcome]:
    """Compile tasks in several processes, in their order."""
    if processes <= 1 or len(todo) <= 1:
        yield from map(run, todo)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, todo)


def not_built(modules: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Rows of tuning tables that no build of their target takes, in words."""
    missing = []
    for module in modules:
        for name in targets:
            built = {launch.config.label for launch in launches(module, name)}
            missing += [
                f"{module}: row {config.label} of {table.where} is taken by none of its builds"
                for table in tables_of(module)
                for config in table.configs(target_of(name))
                if config.label not in built
            ]
    return missing


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(f"the module {name} of a kernel cannot be imported: {error}") from error
