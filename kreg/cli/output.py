"""What a command writes, and how it ends: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import io
import json as json_
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console, RenderableType
from rich.status import Status
from rich.text import Text

from kreg.errors import CaptureError, KregError
from kreg.rewriters.report import Report


class ExitCode(IntEnum):
    """How a command ended; see `kreg.cli`."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    NOTHING_REPLACED = 3
    NOT_CAPTURED = 4


class BadInput(KregError):
    """An argument that cannot be used: says what was given, what was found, and what can be given."""


class Output:
    """Where one command writes.

    Attributes:
        json: whether the result is JSON, for programs.
        errors: the console for people, on standard error.
    """

    def __init__(self, json: bool, stdout: TextIO) -> None:
        self.json = json
        self.errors = Console(file=sys.stderr, highlight=False)
        self._stdout = stdout
        self._console = Console(file=stdout, highlight=False)
        self._status: Status | None = None
        self._stage = ""

    @property
    def width(self) -> int:
        """Characters in a line of the result."""
        return self._console.width

    def progress(self, step: str) -> None:
        """Say what is being done: a spinner in a terminal, a line for each kind of step in a log."""
        if self.errors.is_terminal:
            if self._status is None:
                self._status = self.errors.status("")
                self._status.start()
            self._status.update(Text(step, style="dim"))
        elif step.split(" ")[0] != self._stage:
            self._stage = step.split(" ")[0]
            self.errors.print(Text(f"{step} ...", style="dim"))

    def quiet(self) -> None:
        """End the spinner, if there is one."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def result(self, value: Any, *shown: RenderableType) -> None:
        """The result: JSON for programs, something to look at for people."""
        self.quiet()
        if self.json:
            self.text(json_.dumps(value, indent=2, ensure_ascii=False))
        else:
            for part in shown:
                self._console.print(part)

    def report(self, report: Report) -> None:
        """A report as the result."""
        self.quiet()
        if self.json:
            self.text(report.to_json())
        else:
            report.print(self._console)

    def text(self, text: str) -> None:
        """Text as it is, to standard output."""
        self._stdout.write(f"{text}\n")
        self._stdout.flush()

    def note(self, message: str) -> None:
        """Something to know beside the result."""
        self.quiet()
        self.errors.print(Text(message))

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """While a model is captured: what torch prints about a failure is left out, as the error says it."""
        held, keep = io.StringIO(), True
        logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
        level = logger.level
        try:
            if not os.environ.get("KREG_DEBUG"):
                logger.setLevel(logging.ERROR)
            with contextlib.redirect_stderr(held):
                yield
        except CaptureError:
            keep = bool(os.environ.get("KREG_DEBUG"))
            raise
        finally:
            logger.setLevel(level)
            if keep and held.getvalue():
                self.quiet()
                self.errors.file.write(held.getvalue())

    def end(self, code: ExitCode) -> NoReturn:
        """End the command."""
        self.quiet()
        raise typer.Exit(int(code))

    def fail(self, error: BaseException, code: ExitCode) -> NoReturn:
        """End the command with one clear message."""
        self.quiet()
        if os.environ.get("KREG_DEBUG"):
            self.errors.print(Text("".join(traceback.format_exception(error)), style="dim"))
        expected = isinstance(error, KregError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        kind = type(error).__name__ if expected else "InternalError"
        if self.json:
            self.text(json_.dumps({"error": {"type": kind, "message": message, "exit_code": int(code)}}, indent=2))
        self.errors.print(Text.assemble(("Error: ", "bold red"), message))
        if not expected:
            self.errors.print(Text("This is a fault of kreg or of the model's code. KREG_DEBUG=1 shows where.", "dim"))
        raise typer.Exit(int(code))


@contextlib.contextmanager
def running(json: bool) -> Iterator[Output]:
    """Runs a command: its errors become messages and exit codes, and standard output is for its result."""
    output = Output(json, sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a model's code may print: that is no result
            yield output
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        output.quiet()
        raise
    except CaptureError as error:
        output.fail(error, ExitCode.NOT_CAPTURED)
    except KregError as error:
        output.fail(error, ExitCode.BAD_INPUT)
    except Exception as error:  # the last resort: what is left is a fault, and a traceback helps only who asks
        output.fail(error, ExitCode.FAILED)


def code_of(report: Report) -> ExitCode:
    """The exit code that a report calls for."""
    if any(site.verify and not site.verify.passed for site in report.sites):
        return ExitCode.FAILED
    replaced = any(site.status == "replaced" for site in report.sites)
    return ExitCode.DONE if replaced else ExitCode.NOTHING_REPLACED
