"""What a twist sees of a program while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from tests.fuzz.forms import Program
from tests.fuzz.layouts import Layout


@dataclass
class Scene:
    """One run: its program, its inputs, what was computed so far, and what will be returned besides the result.

    Attributes:
        heads, rows: dimensions of an operand that hold heads (None: none does) and rows.
        bend: applies the twists of a stage; what a program computes at each stage goes through it.
    """

    program: Program
    module: nn.Module
    inputs: Mapping[str, Tensor]
    bend: Callable[[Scene, str, Tensor], Tensor]
    layout: Layout | None = None
    heads: int | None = None
    rows: int = -2
    held: dict[str, Tensor] = field(default_factory=dict)
    extra: list[Tensor] = field(default_factory=list)

    def at(self, stage: str, value: Tensor) -> Tensor:
        """The value after the twists of a stage, which later twists can read by the stage's name."""
        self.held[stage] = value
        self.held[stage] = self.bend(self, stage, value)
        return self.held[stage]
