"""Sets kreg up in .venv and runs it: ``python3.11 dev.py demo`` or ``python3.11 dev.py test``.

    setup   make .venv and install what constraints.txt pins; done once, and again when the pins change
    demo    set up; rewrite a small DeepSeek-V4 on the CPU, then export and reload it
    test    set up; ruff, mypy, pytest (further arguments go to pytest: -m slow runs the full sweeps)

It needs Python 3.11 or newer with venv and pip, and nothing else.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "kreg-setup"
PINS = ("constraints.txt", "pyproject.toml")


def run(*command: str) -> None:
    """Run a program of .venv in the project's folder; end with its exit code if it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    code = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT).returncode
    if code:
        print(f"dev.py: {command[0]} failed with exit code {code}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)


def setup() -> None:
    """Make .venv what the pins say."""
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in PINS)).hexdigest()
    done, place = STAMP.read_text() if STAMP.is_file() else "", f"{ROOT}\n"
    if done == place + wanted:
        return
    print(f"setting up {VENV}", flush=True)
    # Started anew if it was left half done, and after a move, which no virtual environment survives.
    venv.create(VENV, clear=not done.startswith(place), with_pip=True)
    # torch first and alone: a looser request than its pin may bring another build, of gigabytes.
    run("python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt", f"torch=={pinned('torch')}")
    run("python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[dev]")
    STAMP.write_text(place + wanted)


def pinned(package: str) -> str:
    """A package's version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def demo() -> None:
    """The main job."""
    run("python", "examples/deepseek_v4.py")
    run("python", "examples/export_and_reload.py")


def test(*arguments: str) -> None:
    """What has to pass before a change is merged."""
    run("ruff", "check", ".")
    run("mypy")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each of the processes
    run("pytest", "-n", str(os.cpu_count() or 1), "--dist", "worksteal", *arguments)


def main(command: str = "", *arguments: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs this may have another Python)
        raise SystemExit(f"dev.py: kreg needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if command not in ("setup", "demo", "test") or (arguments and command != "test"):
        raise SystemExit(__doc__)
    setup()
    if command == "demo":
        demo()
    elif command == "test":
        test(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
