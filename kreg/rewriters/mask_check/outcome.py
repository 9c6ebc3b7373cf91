"""What a check of a mask finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A key of a query about which model and op disagree: whether it is kept, or, as numbers, what it weighs."""

    batch: int
    head: int
    query: int
    key: int
    model: float | bool
    op: float | bool
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        if isinstance(self.op, bool):
            model = str(self.model) if isinstance(self.model, float) else _word(self.model)
            said = f"is {model} in the model and {_word(self.op)} by the op"
        else:
            said = f"has a weight of {self.model:.3g} by what the model adds and {self.op:.3g} by what the op does"
        return f"key {self.key} of query {self.query} {said} (batch {self.batch}, head {self.head}, of {sizes})"


def _word(kept: bool) -> str:
    return "kept" if kept else "masked"


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        passed: None where it was not run.
        reason: why it was not run, or what is wrong.
        shapes: [batch, heads, queries, keys] that were compared.
        difference: the first one found.
        partial: some of the model's masks have no tensor; only what the others mask was compared.
    """

    passed: bool | None
    reason: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    difference: Difference | None = None
    partial: bool = False


class NotRun(Exception):
    """Why a mask cannot be checked, in words."""


class Misfit(Exception):
    """Sizes or inputs that the captured code does not take."""
