"""Nodes of a graph as people write calls."""

from __future__ import annotations

import re
from dataclasses import dataclass

CALL = re.compile(
    r"%(?P<name>\S+) : (?:\[num_users=\d+\] )?= call_function\[target=(?P<target>[^\]]+)\]"
    r"\(args = \((?P<args>.*)\), kwargs = \{(?P<kwargs>.*)\}\)"
)
"""A node as torch.fx writes it."""


@dataclass(frozen=True)
class Line:
    """One node of a graph: its name, what it calls, and with which arguments."""

    name: str
    target: str
    arguments: str

    def __str__(self) -> str:
        return f"{self.name} = {self.target}{self.arguments}" if self.name else f"{self.target}{self.arguments}"


def line_of(text: str) -> Line:
    """A node as people write a call: ``%y = aten.add.Tensor(%x, 1)``."""
    found = CALL.fullmatch(text.strip())
    if found is None:
        name, equals, rest = text.strip().partition(" = ")
        return Line(name, "", rest) if equals and name.startswith("%") else Line("", "", text.strip())
    target = found["target"].removeprefix("torch.ops.").removesuffix(".default")
    arguments = found["args"].removesuffix(",")
    named = re.sub(r"(^|, )(\w+): ", r"\1\2=", found["kwargs"])
    return Line(f"%{found['name']}", target, f"({', '.join(part for part in (arguments, named) if part)})")
