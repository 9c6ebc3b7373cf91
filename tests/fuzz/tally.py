"""Verdicts counted by form and by twist."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.fuzz.forms import Program
from tests.fuzz.judge import Verdict

KINDS = ("rewritten", "untouched", "wrong", "invalid", "uncaptured")


@dataclass
class Tally:
    """How many programs of each form, and with each twist, came to which verdict; plain ones apart."""

    plain: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    bent: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    twists: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, program: Program, verdict: Verdict) -> None:
        """Counts a program."""
        (self.bent if program.twists else self.plain)[program.form][verdict.kind] += 1
        for twist in program.twists:
            self.twists[twist][verdict.kind] += 1

    @property
    def total(self) -> Counter[str]:
        """All programs by verdict."""
        total: Counter[str] = Counter()
        for counts in (*self.plain.values(), *self.bent.values()):
            total += counts
        return total

    def table(self) -> str:
        """All of it, as text."""
        lines = [f"{'':44}" + "".join(f"{kind:>11}" for kind in KINDS)]
        for title, rows in (("untwisted", self.plain), ("twisted", self.bent), ("by twist", self.twists)):
            lines.append(title)
            lines += [f"  {name:42}" + "".join(f"{c[kind]:11}" for kind in KINDS) for name, c in sorted(rows.items())]
        lines.append(f"{'all':44}" + "".join(f"{self.total[kind]:11}" for kind in KINDS))
        return "\n".join(lines)
