"""What the project promises about itself, read off its own files."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kreg
from kreg.registry.catalogue import Catalogue
from kreg.registry.ops.to_come import OPS_TO_COME

ROOT = Path(kreg.__file__).parents[1]
SOURCES = sorted((ROOT / "kreg").rglob("*.py"))
TEXTS = [
    path
    for path in ROOT.rglob("*")
    if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".j2"} or path.parent.name == ".ci"
    if not {".venv", ".venv-npu", ".git", ".hypothesis", "build", "kreg.egg-info"} & set(path.relative_to(ROOT).parts)
    if path.is_file()
]

ROOMS = ("kreg.cli", "kreg.bench", "kreg.api", "kreg.rewriters", "kreg.registry")
"""Each may import those after it, and none before it."""

MODEL_NAMES = re.compile("deepseek|qwen|llama|gemma|mistral|gpt_oss|glm", re.IGNORECASE)


def name_of(path: Path) -> str:
    """The module that a file is."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> int | None:
    """The place of a module's room in `ROOMS`."""
    return next((i for i, room in enumerate(ROOMS) if module == room or module.startswith(f"{room}.")), None)


def prose(tree: ast.AST) -> set[int]:
    """The ids of the strings that are docstrings, of modules, classes, functions and variables."""
    lines = (node.body for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list))
    return {
        id(line.value)
        for body in lines
        for line in body
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    own = room_of(name_of(path))
    for module in imports(path):
        other = room_of(module)
        if own is not None and other is not None:
            assert other >= own, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_kernels_are_reached_by_their_entries_only(path: Path) -> None:
    if name_of(path).startswith("kreg.kernels"):
        allowed = ("kreg.kernels.", "kreg.registry.", "kreg.errors")
        for module in imports(path):
            assert not module.startswith("kreg.") or module.startswith(allowed), f"{path} imports {module}"
    else:
        for module in imports(path):
            assert not module.startswith("kreg.kernels"), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_code_names_a_model(path: Path) -> None:
    """Docstrings, comments and where an op comes from may; what decides may not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    sources = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "source"}
    passed_over = prose(tree) | sources
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed_over:
            assert not MODEL_NAMES.search(node.value), f"{path}:{node.lineno}: {node.value!r}"
        for field in ("id", "attr", "name", "arg", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                assert not MODEL_NAMES.search(value), f"{path}: {value!r}"


def test_no_file_has_an_absolute_path_of_a_machine() -> None:
    places = re.compile(r"(?<![\w.])/(work|home|root|Users|tmp|opt|mnt)/\w")
    for path in TEXTS:
        found = places.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"


def test_every_public_name_is_explained() -> None:
    for name in kreg.__all__:
        thing = getattr(kreg, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), name
            own = [m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")]
            assert all(inspect.getdoc(m) for m in own), name


def test_importing_kreg_imports_no_model_library_and_no_device_library() -> None:
    heavy = ("transformers", "triton", "torch_npu", "mindspeed", "kreg.cli", "kreg.kernels.gpu", "rich", "jinja2")
    # PyTorch's Dynamo imports triton where it is installed.
    code = "import sys, torch._dynamo; own = set(sys.modules); import kreg; new = set(sys.modules) - own; "
    code += f"print(*[m for m in {heavy!r} if m in new])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("spec", Catalogue.builtin(packages=False).specs.values(), ids=lambda spec: spec.name)
def test_the_entries_of_kernels_for_the_cpu_can_be_called(spec: kreg.KernelSpec) -> None:
    if "cpu" in spec.devices:
        assert callable(spec.entry_point())
        assert spec.backward is None or callable(spec.backward_point())


def test_every_folder_of_kernels_is_named_after_an_op() -> None:
    catalogue = Catalogue.builtin(packages=False)
    folders = {p.name for p in (ROOT / "kreg" / "kernels").iterdir() if (p / "__init__.py").is_file()}
    assert folders - {"gpu"} <= {*catalogue.ops, *OPS_TO_COME}  # gpu: what those for GPUs share
    for spec in catalogue.specs.values():
        assert catalogue.where(spec.name).startswith(f"kreg/kernels/{spec.op}/")
