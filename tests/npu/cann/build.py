"""Compiles the stand-in for CANN: ``python tests/npu/cann/build.py FOLDER``, with torch_npu's Python.

What torch_npu's libraries need and nobody defines is asked of them with ``nm``; what of it has to answer something is
in answers.c. All of it goes into libascendcl; CANN's other libraries that torch_npu names are empty, and lead to it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAIN = "ascendcl"
OTHERS = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def build(folder: Path) -> None:
    """Make the libraries in a folder, which goes on LD_LIBRARY_PATH.

    Raises:
        RuntimeError: torch_npu is not installed here, or a C++ symbol that a C function cannot stand in for is missing.
        subprocess.CalledProcessError: ``cc`` or ``nm`` failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers = HERE / "answers.c"
    rest = sorted(missing() - defined(answers.read_text()))
    odd = [name for name in rest if not re.fullmatch(r"[A-Za-z]\w*", name)]
    if odd:
        raise RuntimeError(f"torch_npu needs C++ symbols that the stand-in does not have: {', '.join(odd)}")
    zeros = folder / "zeros.c"
    zeros.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in rest))
    cc(folder, MAIN, str(answers), str(zeros))
    for name in OTHERS:
        cc(folder, name, "-Wl,--no-as-needed", f"-L{folder}", f"-l{MAIN}")


def cc(folder: Path, name: str, *arguments: str) -> None:
    """Link lib<name>.so; one that a process has loaded is replaced, not written over."""
    made = folder / f"lib{name}.so.new"
    command = ["cc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,lib{name}.so", "-o", str(made)]
    subprocess.run([*command, *arguments], check=True)
    made.rename(folder / f"lib{name}.so")


def missing() -> set[str]:
    """What torch_npu's libraries need and neither they, torch's, the C library's nor Python's define."""
    npu, torch = package("torch_npu"), package("torch")
    own = [*sorted((npu / "lib").glob("lib*.so")), *npu.glob("_C.*.so")]
    own = [library for library in own if library.name != "libop_plugin_atb.so"]  # loaded on request, needs libatb
    libraries = [*own, *(torch / "lib").glob("lib*.so")]
    needed = symbols("--undefined-only", own) - symbols("--defined-only", libraries)
    here = ctypes.CDLL(None)  # this process: the C library and Python
    return {name for name in needed if not hasattr(here, name)}


def symbols(which: str, libraries: list[Path]) -> set[str]:
    """The dynamic symbols of libraries, without those of a version, which name their library, and the weak ones."""
    lines = subprocess.run(["nm", "-D", which, *map(str, libraries)], check=True, capture_output=True, text=True).stdout
    found = (line.split() for line in lines.splitlines())
    names = {words[-1] for words in found if len(words) >= 2 and words[-2] not in ("w", "v")}
    return {name.partition("@")[0] for name in names if which == "--defined-only" or "@" not in name}


def defined(source: str) -> set[str]:
    """The functions of a C file, each of which starts a line."""
    return set(re.findall(r"^(?!static)\w[\w ]*[ *](\w+)\(.*\) ?\{", source, re.M))


def package(name: str) -> Path:
    """The folder of an installed package; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed in {sys.prefix}")
    return Path(spec.origin).parent


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
