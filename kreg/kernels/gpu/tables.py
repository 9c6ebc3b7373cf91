"""Tuning tables: which block sizes, warps and stages a kernel gets on a target, as data beside the kernel.

.. code-block:: yaml

    forward:                       # the kernel's function
      facts: [head_dim, heads]     # what `when` may ask of a launch
      targets:
        sm_90:                     # the first row that holds is taken
          - {when: head_dim > 256, BLOCK_H: 64, BLOCK_N: 32, num_warps: 8, num_stages: 2}
          - {BLOCK_H: 64, BLOCK_N: 64, num_warps: 4, num_stages: 3}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kreg.errors import SelectionError, SpecError
from kreg.kernels.gpu.targets import TARGETS, Target
from kreg.registry.constraints import Constraint
from kreg.registry.wording import did_you_mean, listing

Meta = int | bool | str


@dataclass(frozen=True)
class Config:
    """One row of a table: how a kernel is compiled and launched.

    Attributes:
        meta: the kernel's ``tl.constexpr`` parameters that are tuned.
        num_warps, num_stages: Triton's launch options.
        spills: why this configuration may spill registers; "": it may not.
        label: kernel, target and number of the row, "forward sm_90 #1"; "" where it is of no table.
    """

    meta: Mapping[str, Meta] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    spills: str = ""
    label: str = ""

    @cached_property
    def options(self) -> dict[str, Any]:
        """All keyword arguments of a launch that the configuration decides."""
        return {**self.meta, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, name: str) -> Any:
        return self.meta[name]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items())


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    __pydantic_extra__: dict[str, Meta] = Field(init=False)

    when: str = ""
    num_warps: int = Field(ge=1, le=32)
    num_stages: int = Field(ge=1, le=8)
    spills: str = ""


class _Kernel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    facts: list[str] = []
    targets: dict[str, list[_Row]]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True)

    kernels: dict[str, _Kernel]


@dataclass(frozen=True)
class Row:
    """A configuration and the condition that it is for; None: any launch."""

    when: Constraint | None
    config: Config


class Table:
    """The tuning tables of one op's kernels.

    Attributes:
        rows: by kernel function and target name, in the order in which they are tried.
    """

    def __init__(self, where: str, rows: Mapping[str, Mapping[str, tuple[Row, ...]]]) -> None:
        self.where = where
        self.rows = rows
        self._pick = lru_cache(maxsize=4096)(self._first)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Table:
        """A table from its YAML file.

        Raises:
            SpecError: the file cannot be read, a field is malformed, a target is not known, a condition asks for a
                fact that is not declared, or a row can never be reached.
        """
        path = Path(path)
        where = "/".join(path.parts[-3:])
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"{where}: cannot be read: {error.strerror or error}") from None
        except yaml.YAMLError as error:
            raise SpecError(f"{where}: is not YAML: {error}") from None
        try:
            file = _File(kernels=content)
        except ValidationError as error:
            raise SpecError("\n".join(_complaint(where, problem) for problem in error.errors())) from None
        return Table(where, {name: _rows(f"{where}, {name}", name, kernel) for name, kernel in file.kernels.items()})

    @property
    def targets(self) -> frozenset[str]:
        """The targets that some kernel has rows for."""
        return frozenset(name for targets in self.rows.values() for name in targets)

    def configs(self, target: Target) -> tuple[Config, ...]:
        """Every configuration of a target."""
        return tuple(row.config for targets in self.rows.values() for row in targets.get(target.name, ()))

    def pick(self, kernel: str, target: Target, **facts: Any) -> Config:
        """The first configuration of a kernel and target whose condition holds for these facts.

        Raises:
            SelectionError: the table has no such kernel, no row for the target, or none whose condition holds.
        """
        return self._pick(kernel, target, tuple(sorted(facts.items())))

    def _first(self, kernel: str, target: Target, facts: tuple[tuple[str, Any], ...]) -> Config:
        if kernel not in self.rows:
            hint = did_you_mean(kernel, self.rows)
            raise SelectionError(f"{self.where}: no kernel is called {kernel!r}{hint}; there are {listing(self.rows)}")
        targets = self.rows[kernel]
        rows = targets.get(target.name) or targets.get(target.tuned_as)
        if rows is None:
            raise SelectionError(
                f"{self.where}: {kernel} has no configuration for {target.name}; it has some for "
                f"{listing(targets)}. Add rows for {target.name}, with blocks that fit its "
                f"{target.shared_bytes // 1024} KiB of shared memory"
            )
        values = dict(facts)
        for row in rows:
            if row.when is None or row.when.holds(values):
                return row.config
        asked = listing(f"{name} = {value}" for name, value in facts)
        raise SelectionError(f"{self.where}: no row of {kernel} for {target.name} holds for {asked}")


def _rows(where: str, kernel: str, read: _Kernel) -> dict[str, tuple[Row, ...]]:
    found: dict[str, tuple[Row, ...]] = {}
    for name, rows in read.targets.items():
        if name not in TARGETS:
            hint = did_you_mean(name, TARGETS)
            raise SpecError(f"{where}: target {name!r} is not known{hint}; known: {listing(TARGETS)}")
        if not rows:
            raise SpecError(f"{where}: target {name} has no rows; leave it out where nothing fits it")
        for number, row in enumerate(rows[:-1], 1):
            if not row.when:
                raise SpecError(f"{where}: row {number} for {name} holds always, so those after it are never taken")
        found[name] = tuple(
            _row(f"{where}, {name}, row {number}", f"{kernel} {name} #{number}", row, read.facts)
            for number, row in enumerate(rows, 1)
        )
    return found


def _row(where: str, label: str, row: _Row, facts: list[str]) -> Row:
    if row.num_warps & (row.num_warps - 1):
        raise SpecError(f"{where}: num_warps is {row.num_warps}; allowed: a power of two")
    try:
        when = Constraint.parse(row.when, facts) if row.when else None
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    meta = dict(row.__pydantic_extra__)
    return Row(when, Config(meta, row.num_warps, row.num_stages, row.spills, label))


def _complaint(where: str, problem: Any) -> str:
    path = [str(part) for part in problem["loc"] if part != "kernels"]
    return f"{where}: {'.'.join(path) or 'the file'} is {problem['input']!r}: {problem['msg']}"
