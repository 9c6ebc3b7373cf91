"""The command line as a user meets it, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kreg.cli import app


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which holds one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """Both streams without line breaks, to look for sentences in."""
        return " ".join(f"{self.out} {self.err}".split())


Kreg = Callable[..., Ended]


@pytest.fixture
def kreg(monkeypatch: pytest.MonkeyPatch) -> Kreg:
    """Runs ``kreg`` with arguments; ``toys:...`` names the functions of toys.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ("KREG_DEBUG", "KREG_ENABLE", "KREG_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Ended:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        return Ended(done.exit_code, done.stdout, done.stderr)

    return run
