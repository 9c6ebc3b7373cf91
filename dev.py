"""Sets kreg up in .venv and runs it: ``python3.11 dev.py demo`` or ``python3.11 dev.py test``.

    setup   make .venv and install what constraints.txt pins; done once, and again when the pins change
    demo    set up; rewrite a small DeepSeek-V4 on the CPU, then export and reload it
    test    set up; ruff, mypy, pytest, then the tests of `npu`; with further arguments, which go to pytest
            (-m slow runs the full sweeps), without the tests of `npu`
    npu     set up, and .venv-npu beside it: the real torch_npu on a stand-in for CANN; pytest of tests/npu there
            (further arguments go to pytest)

It needs Python 3.11 or newer with venv and pip, and nothing else; `npu` needs Linux, and a C compiler.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "kreg-setup"
PINS = ("constraints.txt", "pyproject.toml")

NPU = ROOT / ".venv-npu"
NPU_STAMP = NPU / "kreg-setup"
NPU_TESTS = "tests/npu"
CANN = "tests/npu/cann"
NPU_PINS = (*PINS, f"{CANN}/answers.c", f"{CANN}/build.py")
NPU_MACHINES = ("x86_64", "aarch64")
NPU_PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
"""What torch_npu has wheels for, besides Python 3.10."""
NPU_ENVIRONMENT = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # `import torch` alone does not import torch_npu: a test says when
    "LD_LIBRARY_PATH": str(NPU / "cann"),
}

PARALLEL = ("-n", str(os.cpu_count() or 1), "--dist", "worksteal")
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
"""Of each of these processes."""


def run(*command: str, place: Path = BIN, **environment: str) -> None:
    """Run a program of .venv in the project's folder; end with its exit code if it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    known = {**os.environ, **environment}
    code = subprocess.run([str(place / command[0]), *command[1:]], cwd=ROOT, env=known).returncode
    if code:
        print(f"dev.py: {command[0]} failed with exit code {code}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)


def setup() -> None:
    """Make .venv what the pins say."""
    wanted = digest(PINS)
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


def digest(names: tuple[str, ...]) -> str:
    """What stands for the contents of files."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def no_npu() -> str:
    """Why .venv-npu cannot be had here; "" where it can."""
    pythons, libc, machine = [p.name for p in (VENV / "lib").glob("py*")], platform.libc_ver()[0], platform.machine()
    if libc != "glibc" or machine not in NPU_MACHINES or not set(pythons) & set(NPU_PYTHONS):
        found = f"{sys.platform} {libc}, {machine}, {' '.join(pythons)}"
        return f"torch_npu {pinned('torch_npu')} has no wheel for this platform ({found})"
    missing = [name for name in ("cc", "nm") if shutil.which(name) is None]
    return f"the stand-in for CANN is compiled, and there is no {' and no '.join(missing)} here" if missing else ""


def setup_npu() -> None:
    """Make .venv-npu: torch_npu, the packages of .venv, and a stand-in for CANN."""
    (base,) = (VENV / "lib").glob("py*/site-packages")
    wanted = f"{base}\n{digest(NPU_PINS)}"
    if NPU_STAMP.is_file() and NPU_STAMP.read_text() == wanted:
        return
    print(f"setting up {NPU}", flush=True)
    run("python", "-m", "venv", "--clear", "--without-pip", str(NPU))
    package = f"torch_npu=={pinned('torch_npu')}"  # what it needs besides, torch above all, is in .venv
    target = str(NPU / "bin" / "python")
    run("python", "-m", "pip", "--python", target, "install", "--quiet", "--no-deps", package)
    (ours,) = (NPU / "lib").glob("py*/site-packages")
    (ours / "kreg-base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    run("python", f"{CANN}/build.py", str(NPU / "cann"), place=NPU / "bin", **NPU_ENVIRONMENT)
    NPU_STAMP.write_text(wanted)


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
    run("pytest", *PARALLEL, *arguments, OMP_NUM_THREADS=THREADS)
    if arguments:
        print(f"dev.py: {NPU_TESTS} was not run in .venv-npu: `dev.py npu` does", flush=True)
    else:
        npu()


def npu(*arguments: str) -> None:
    """The tests that need torch_npu, where it can be had."""
    reason = no_npu()
    if reason:
        print(f"dev.py: {NPU_TESTS} is skipped: {reason}", flush=True)
        return
    setup_npu()
    tests = arguments if any(NPU_TESTS in argument for argument in arguments) else (NPU_TESTS, *arguments)
    environment = {**NPU_ENVIRONMENT, "OMP_NUM_THREADS": THREADS}
    run("python", "-m", "pytest", *PARALLEL, *tests, place=NPU / "bin", **environment)


def main(command: str = "", *arguments: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs this may have another Python)
        raise SystemExit(f"dev.py: kreg needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if command not in ("setup", "demo", "test", "npu") or (arguments and command not in ("test", "npu")):
        raise SystemExit(__doc__)
    setup()
    if command == "demo":
        demo()
    elif command == "test":
        test(*arguments)
    elif command == "npu":
        npu(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
