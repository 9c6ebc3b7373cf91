"""The report as data: what was found, proven, replaced and kept, and why. Its JSON is a public contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Verification(_Value):
    """Old against new on random inputs: largest absolute errors of the result and of the gradients."""

    passed: bool
    max_error: float
    max_grad_error: float | None = None

    @field_validator("max_error", mode="before")
    @classmethod
    def _infinite(cls, value: Any) -> Any:
        return math.inf if value is None else value  # JSON has no infinity, and writes null


class Alternative(_Value):
    """A kernel that was not taken, and why."""

    kernel: str
    rejected: str


class SiteReport(_Value):
    """One site: what it is, what runs it now, and why.

    ``verified_at`` is the id of the site that was run for ``verify``: the site itself, or the first one of the same
    code. Repeated layers are run once.

    ``before`` and ``after`` are the lines of the graph that were replaced and their replacement; they are for
    people and not part of the JSON.
    """

    id: str
    op: str
    module: str
    status: Literal["replaced", "kept"]
    kernel: str | None
    reason: str
    mask: Mapping[str, Any] | None
    dims: Mapping[str, int | str]
    dtype: str
    trainable: bool
    verify: Verification | None
    verified_at: str | None = None
    alternatives: tuple[Alternative, ...] = ()
    nodes_replaced: int = 0
    before: tuple[str, ...] = Field(default=(), exclude=True)
    after: tuple[str, ...] = Field(default=(), exclude=True)


class NearbyNode(_Value):
    """A node around a near miss.

    Attributes:
        name: of the node.
        call: what it calls, with its arguments, as people write calls.
        value: dtype and shape of its result.
        source: the line of the model that made it, where known.
        anchor: it is what looked like the op.
        failed: it is where the obligation failed.
        read: it is only read there, and computed elsewhere.
    """

    name: str
    call: str
    value: str
    source: str = ""
    anchor: bool = False
    failed: bool = False
    read: bool = False


class NearMissReport(_Value):
    """Something that looked like an op and is none, with the obligation that failed.

    ``around`` are the nodes it stands among; they are for people and not part of the JSON.
    """

    op: str
    module: str
    node: str
    reason: str
    around: tuple[NearbyNode, ...] = Field(default=(), exclude=True, repr=False)


class Seconds(_Value):
    """Time spent in each stage."""

    capture: float = 0.0
    raise_: float = Field(default=0.0, alias="raise")
    plan: float = 0.0
    lower: float = 0.0
    verify: float = 0.0


class Calls(_Value):
    """How calls of a rewritten model were answered; ``fallbacks`` counts kernels replaced by the reference."""

    rewritten: int = 0
    original: int = 0
    fallbacks: Mapping[str, int] = Field(default_factory=dict)


class Report(_Value):
    """What a rewrite found and did; ``unused`` says why enabled kernels were not used at any site."""

    model: str
    device: str
    frontend: Literal["export", "dynamo"]
    nodes: int
    sites: tuple[SiteReport, ...] = ()
    near_misses: tuple[NearMissReport, ...] = ()
    unused: Mapping[str, str] = Field(default_factory=dict)
    seconds: Seconds = Seconds()
    calls: Calls = Calls()
    dry_run: bool = False

    @computed_field  # type: ignore[prop-decorator]
    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """Sites found and replaced, by op."""
        counts: dict[str, dict[str, int]] = {}
        for site in self.sites:
            row = counts.setdefault(site.op, {"found": 0, "replaced": 0})
            row["found"] += 1
            row["replaced"] += site.status == "replaced"
        return counts

    def print(self, console: Any = None) -> None:
        """Prints the report as a table, on ``console`` (a rich Console) or standard output."""
        from kreg.rewriters.report.table import print_report

        print_report(self, console)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON: the contract that other tools read."""
        return self.model_dump_json(indent=indent, by_alias=True)

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        from kreg.rewriters.report.page import render

        return render(self)
