"""Triton kernels are compiled for GPUs that are not here, and what they take is held against what those have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")

from kreg.errors import SelectionError, SpecError
from kreg.kernels.gpu import COMPILED, TARGETS, Config, Launch, Table, current_target, launch, record, records
from kreg.kernels.gpu.__main__ import compile_all
from kreg.kernels.gpu.build import Binary, BuildError, compile_for, misfits
from kreg.kernels.gpu.collect import (
    modules_with_builds,
    not_built,
    one_of_each,
    tables_of,
    targets_of,
    tasks,
    tuned_by,
)
from kreg.kernels.gpu.page import written
from kreg.kernels.gpu.records import Wanted, complaints, differing
from kreg.kernels.gpu.targets import assume, target_of
from kreg.registry.catalogue import catalogue
from kreg.registry.environment import Environment, EveryPackage, availability

MODULES = modules_with_builds()
PAGE = Path(__file__).parents[3] / "docs/performance.md"

TOY = """
import torch, triton, triton.language as tl
from kreg.kernels.gpu import Config, Table, launch, record

@triton.jit
def product(a, b, out, size, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    found = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(a + i * size + start + j)
        y = tl.load(b + (start + i) * size + j)
        found += tl.dot(x, y)
    tl.store(out + i * size + j, found.to(out.dtype.element_ty))

def call(a, config):
    launch(product, (1,), config, a=a, b=a, out=torch.empty_like(a), size=a.shape[0])

def builds(target):
    a = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")
    for warps, stages, spills in ((8, 2, ""), (8, 6, ""), (2, 2, ""), (2, 2, "a test")):
        yield from record(target, call, a, Config({"BLOCK": 128}, warps, stages, spills))
"""


DECODING = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from kreg.kernels.gpu import record
from kreg.kernels.lightning_indexer.triton import forward

backend, found = make_backend(GPUTarget("cuda", 90, 32)), {}
for context in range(9000, 9130):
    q, k = (torch.empty(1, *s, 128, dtype=torch.bfloat16, device="meta") for s in ((1, 64), (context // 4,)))
    for one in record("sm_90", forward, q, k, q[..., 0], scale=1.0, topk=512, ratio=4, offset=context - 1):
        bind = create_function_from_signature(one.kernel.signature, one.kernel.params, backend)
        found.setdefault(one.name, set()).add(str(bind(**one.arguments, **one.config.options, debug=False)[1]))
print(json.dumps({name: len(kinds) for name, kinds in found.items()}))
"""


def compiled(*arguments: str, path: Path | None = None) -> tuple[int, dict[str, Any], str]:
    """``python -m kreg.kernels.gpu`` in a process of its own: this one may be interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path or ""), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "kreg.kernels.gpu", "--json", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.fixture(scope="module")
def sampled() -> tuple[int, dict[str, Any], str]:
    """Every launch held against its record, and one build of each kernel function, in one process."""
    return compiled("--check", "--sample")


def test_everything_that_would_be_launched_was_compiled_as_it_is_now_and_fits_its_target(
    sampled: tuple[int, dict[str, Any], str],
) -> None:
    code, found, errors = sampled
    assert found.get("problems") == [], errors
    assert found["checked"] == sum(len(records.read(module)) for module in MODULES) > 500
    assert code == 0


def test_a_kernel_of_every_function_compiles_to_what_is_recorded(sampled: tuple[int, dict[str, Any], str]) -> None:
    _, found, errors = sampled
    wanted = {(task.kernel, task.target) for task in one_of_each(tasks(MODULES, targets_of(MODULES)))}
    assert {(binary["kernel"], binary["target"]) for binary in found["binaries"]} == wanted, errors
    recorded = [binary.as_dict() for module in MODULES for binary in records.read(module)]
    assert all(binary in recorded for binary in found["binaries"])


@pytest.mark.parametrize(
    "arguments",
    [("--record", "--target", "sm_90"), ("--record", "--check", "--sample"), ("--check", "--kernel", "forward")],
)
def test_what_is_of_all_builds_is_not_done_with_some(arguments: tuple[str, ...]) -> None:
    app = typer.Typer()
    app.command()(compile_all)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2 and "all builds" in done.output


def test_a_cache_that_grows_compiles_the_indexer_for_rows_that_are_aligned_and_for_others_and_no_more() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", DECODING], env=env, capture_output=True, text=True)
    assert json.loads(done.stdout or "null") == {"scores_kernel": 2, "select_kernel": 2}, done.stderr


@pytest.mark.slow
def test_every_kernel_compiles_with_every_configuration_for_every_target() -> None:
    code, found, errors = compiled()
    assert found.get("problems") == [], errors
    recorded = [binary.as_dict() for module in MODULES for binary in records.read(module)]
    assert found["binaries"] == recorded
    assert code == 0


def test_every_row_of_every_tuning_table_is_built_for_its_target() -> None:
    assert {module.split(".")[2] for module in MODULES} >= {"sparse_attention", "lightning_indexer"}
    tables = [table for module in MODULES for table in tables_of(module)]
    assert tables and all(table.configs(TARGETS[name]) for table in tables for name in COMPILED)
    assert not_built(MODULES, targets_of(MODULES)) == []


def test_a_kernel_claims_no_architecture_that_its_tables_have_no_rows_for() -> None:
    for spec in catalogue().specs.values():
        module = spec.entry.partition(":")[0]
        if module not in MODULES:
            continue
        assert spec.architectures, spec.name
        for target in TARGETS.values():
            here = Environment("cuda", target.name, packages=EveryPackage())
            for table in tuned_by(module) if not availability(spec, here) else ():
                assert table.rows, spec.name
                missing = [k for k, rows in table.rows.items() if not {target.name, target.tuned_as} & rows.keys()]
                assert not missing, f"{spec.name} claims {target.name}, for which {table.where} has no {missing}"


@pytest.mark.parametrize("architecture", ["sm_88", "sm_110", "sm_130", "gfx1100", "gfx1250"])
def test_no_kernel_claims_an_architecture_whose_limits_are_not_known(architecture: str) -> None:
    assert architecture not in TARGETS
    here = Environment("cuda", architecture, packages=EveryPackage())
    specs = [spec for spec in catalogue().specs.values() if spec.entry.partition(":")[0] in MODULES]
    assert specs and all(availability(spec, here) for spec in specs)


def test_the_page_has_the_table_of_the_records() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, MODULES, targets_of(MODULES)) == page, f"it is written by {records.COMMAND}"


@pytest.mark.parametrize("module", MODULES)
def test_a_record_says_which_triton_made_it(module: str) -> None:
    import triton

    assert records.written_by(module) == triton.__version__, f"compile everything with this version: {records.COMMAND}"


BUILD = Binary("sm_90", "product", "BLOCK=64", "bf16", "0123456789abcdef", 1024, 64, 0, 128)
WANTED = Wanted("sm_90", "product", "BLOCK=64", "0123456789abcdef")


@pytest.mark.parametrize(
    ("recorded", "wanted", "says"),
    [
        ([BUILD], [WANTED, WANTED], None),
        ([], [WANTED], "1 builds of product for sm_90 are not recorded as they would be compiled now: python -m"),
        ([BUILD], [replace(WANTED, digest="f" * 16)], "1 builds of product for sm_90 are not recorded as they would"),
        ([replace(BUILD, config="BLOCK=32")], [WANTED], "1 builds of product for sm_90 are not recorded as they"),
        ([BUILD, replace(BUILD, digest="f" * 16)], [WANTED], "1 recorded builds of product for sm_90 are of nothing"),
        ([BUILD, BUILD], [WANTED], "1 builds are recorded twice"),
    ],
)
def test_a_record_that_is_missing_stale_or_left_over_is_named(
    recorded: list[Binary], wanted: list[Wanted], says: str | None
) -> None:
    found = complaints("toys", recorded, wanted)
    assert not found if says is None else says in found[0]


def test_a_record_of_other_resources_than_the_binary_has_is_named() -> None:
    assert differing(BUILD, BUILD) == []
    (said,) = differing(replace(BUILD, registers=65), BUILD)
    assert "65 registers, and 64 are recorded" in said


def test_a_record_is_read_as_it_was_written_and_a_broken_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recorded_toys.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert records.read("recorded_toys") == () and records.written_by("recorded_toys") == ""
    other = replace(BUILD, digest="f" * 16, types="bf16 i64")
    records.write("recorded_toys", [BUILD, other, BUILD])
    assert records.read("recorded_toys") == (BUILD, other)
    path = records.path_of("recorded_toys")
    path.write_text(path.read_text().replace(",1024,64,", ",1024,many,", 1))
    with pytest.raises(SpecError, match=r"builds.csv, line 3: .*'many'"):
        records.read("recorded_toys")


DIGESTS = """
import importlib.util, json, sys
from pathlib import Path
from kreg.kernels.gpu.build import specialise
from kreg.kernels.gpu.targets import target_of

found = {}
for path in sorted(Path(sys.argv[1]).glob("toy_*.py")):
    spec = importlib.util.spec_from_file_location("toy", path)
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    found[path.stem] = [specialise(one, target_of(name)).digest for name in ("sm_90", "sm_80") for one in toy.builds()]
print(json.dumps(found))
"""

DIGESTED = """
import torch, triton, triton.language as tl
from kreg.kernels.gpu import Config, Launch
STEP = tl.constexpr(2)
@triton.jit
def more(x):
    return x + STEP
@triton.jit
def plain(x, size, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, more(tl.load(at)))
def builds():
    for dtype, size in ((torch.float32, 16), (torch.float32, 32), (torch.float32, 17), (torch.bfloat16, 16)):
        x = torch.empty(128, dtype=dtype, device="meta")
        yield Launch(plain, {"x": x, "size": size}, Config({"BLOCK": 64}))
    yield Launch(plain, {"x": x, "size": 16}, Config({"BLOCK": 128}))
"""


def test_a_digest_changes_with_what_the_compiler_sees_and_with_nothing_else(tmp_path: Path) -> None:
    changes = {
        "toy_as_it_is": ("", ""),
        "toy_comment": ("    at =", "    # a comment, and a line more\n\n    at ="),
        "toy_helper": ("return x + STEP", "return x - STEP"),
        "toy_constant": ("tl.constexpr(2)", "tl.constexpr(3)"),
        "toy_body": ("tl.arange(0, BLOCK)", "tl.arange(0, BLOCK) + size"),
        "toy_warps": ('Config({"BLOCK": 64})', 'Config({"BLOCK": 64}, 8)'),
    }
    for name, (before, after) in changes.items():
        (tmp_path / f"{name}.py").write_text(DIGESTED.replace(before, after) if before else DIGESTED)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", DIGESTS, str(tmp_path)], env=env, capture_output=True, text=True)
    found = json.loads(done.stdout or "{}")
    assert set(found) == set(changes), done.stderr
    of = found["toy_as_it_is"]
    assert of[0] == of[1]  # both sizes are divisible by 16, which is all that is known of them
    assert len(set(of)) == 8  # an odd size, another dtype, another block; and each for two targets
    assert found["toy_comment"] == of
    for name in ("toy_helper", "toy_constant", "toy_body"):
        assert not set(found[name]) & set(of), name
    assert found["toy_warps"][0] != of[0] and found["toy_warps"][4] == of[4]


def test_a_kernel_that_does_not_fit_or_spills_is_refused_unless_its_row_says_why(tmp_path: Path) -> None:
    (tmp_path / "toy_kernels.py").write_text(TOY)
    code, found, errors = compiled("--module", "toy_kernels", "--target", "sm_90", path=tmp_path)
    assert code == 1
    fits, deep, few, _ = found["binaries"]
    limit = TARGETS["sm_90"].shared_bytes
    assert 0 < fits["shared_bytes"] <= limit < deep["shared_bytes"]
    assert 0 < fits["registers"] < few["registers"] == 255
    assert fits["spilled_bytes"] == 0 < few["spilled_bytes"]
    too_deep, spilling = found["problems"]
    assert f"{deep['shared_bytes']:,} bytes of shared memory, at most {limit:,}" in too_deep
    assert f"{few['spilled_bytes']} bytes a thread are spilled, and the row does not say why" in spilling
    assert all(problem in " ".join(errors.split()) for problem in found["problems"])


def test_what_a_target_does_not_have_is_named() -> None:
    binary = Binary("gfx942", "forward", "BLOCK=64", "bf16", "", 70_000, 600, 0, 512)
    reasons = misfits(binary, TARGETS["gfx942"])
    assert reasons[0] == "forward on gfx942 with BLOCK=64: 70,000 bytes of shared memory, at most 65,536"
    assert "600 registers a thread, at most 512" in reasons[1]
    assert "512 threads of 600 registers, at most 131,072 registers a block" in reasons[2]
    fits = Binary("gfx950", "forward", "BLOCK=64", "bf16", "", 70_000, 256, 0, 512)
    assert misfits(fits, TARGETS["gfx950"]) == []


def test_a_kernel_of_the_interpreter_is_not_compiled() -> None:
    with pytest.raises(BuildError, match="start Python without TRITON_INTERPRET"):
        compile_for(Launch(lambda: None, {}, Config()), TARGETS["sm_90"])


def test_a_launch_is_recorded_with_the_target_it_is_for_and_nothing_runs() -> None:
    def host(size: int) -> None:
        blocks = {"sm_90": 64, "gfx942": 32}
        launch(host, (size,), Config({"BLOCK": blocks[current_target().name]}), size=size)

    for name, block in (("sm_90", 64), ("gfx942", 32)):
        (found,) = record(name, host, 7)
        assert (found.config["BLOCK"], dict(found.arguments)) == (block, {"size": 7})
    with pytest.raises(TypeError):
        host(7)  # outside, it is launched: a function is no kernel
    launch(host, (0, 3), Config(), size=7)  # but of no programs nothing is


def test_a_gpu_whose_limits_are_not_known_is_an_error() -> None:
    assert current_target("cpu").name == "sm_90"
    with assume("gfx950") as target:
        assert current_target("cpu") is target
    with pytest.raises(SelectionError, match=r"'sm_75'; known: sm_80"):
        target_of("sm_75")


# ---------------------------------------------------------------------------------------------- tuning tables

FILE = """
forward:
  facts: [head_dim]
  targets:
    sm_90:
      - {when: head_dim > 256, BLOCK: 32, num_warps: 8, num_stages: 2}
      - {BLOCK: 64, FAST: true, num_warps: 4, num_stages: 3, spills: too wide}
    sm_100:
      - {when: head_dim <= 64, BLOCK: 16, num_warps: 4, num_stages: 1}
"""


def table(tmp_path: Path, text: str = FILE) -> Table:
    path = tmp_path / "tuning.yaml"
    path.write_text(text)
    return Table.read(path)


def test_the_first_row_that_holds_is_taken(tmp_path: Path) -> None:
    read = table(tmp_path)
    wide = read.pick("forward", TARGETS["sm_90"], head_dim=512)
    assert (wide.options, wide.label) == ({"BLOCK": 32, "num_warps": 8, "num_stages": 2}, "forward sm_90 #1")
    narrow = read.pick("forward", TARGETS["sm_90"], head_dim=64)
    assert (narrow["BLOCK"], narrow["FAST"], narrow.spills) == (64, True, "too wide")
    assert read.pick("forward", TARGETS["sm_103"], head_dim=64)["BLOCK"] == 16  # tuned as sm_100 is
    assert len(read.configs(TARGETS["sm_90"])) == 2


@pytest.mark.parametrize(
    ("kernel", "target", "head_dim", "says"),
    [
        ("forwards", "sm_90", 64, r"no kernel is called 'forwards' \(did you mean 'forward'\?\)"),
        ("forward", "gfx942", 64, r"no configuration for gfx942.*64 KiB of shared memory"),
        ("forward", "sm_100", 128, r"no row of forward for sm_100 holds for head_dim = 128"),
    ],
)
def test_a_launch_that_no_row_is_for_is_an_error(
    tmp_path: Path, kernel: str, target: str, head_dim: int, says: str
) -> None:
    with pytest.raises(SelectionError, match=says):
        table(tmp_path).pick(kernel, TARGETS[target], head_dim=head_dim)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("head_dim > 256", "dim > 256", r"row 1.*dim"),
        ("num_warps: 8", "num_warps: 6", r"row 1: num_warps is 6; allowed: a power of two"),
        ("num_warps: 8", "num_warps: many", r"num_warps is 'many'"),
        ("sm_100:", "sm_99:", r"target 'sm_99' is not known"),
        ("when: head_dim > 256, ", "", r"row 1 for sm_90 holds always"),
        ("BLOCK: 32", "BLOCK: [32]", r"BLOCK.*\[32\]"),
        ("facts:", "fact:", r"fact is \['head_dim'\]"),
        (FILE, "- forward", r"the file is \['forward'\]"),
        (FILE, "a: b: c", r"is not YAML"),
    ],
)
def test_a_malformed_table_says_where(tmp_path: Path, before: str, after: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        table(tmp_path, FILE.replace(before, after))


def test_a_table_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        Table.read(tmp_path / "none.yaml")
