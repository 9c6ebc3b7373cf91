"""The catalogue: what it loads, what it refuses, and that a refusal leaves it as it was."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kreg.errors import SelectionError, SpecError
from kreg.registry.catalogue import Catalogue, catalogue, register
from kreg.registry.op import Op
from kreg.registry.ops import BUILTIN_OPS
from kreg.registry.ops.attention import ATTENTION
from kreg.registry.sources import kernel
from kreg.registry.spec import KernelSpec


def fields(name: str = "acme.flash", **more: Any) -> dict[str, Any]:
    given = {"op": "attention", "name": name, "entry": "acme:f", "devices": ["cpu"], "dtypes": ["float32"]}
    return {**given, **more}


def spec(name: str = "acme.flash", **more: Any) -> KernelSpec:
    return KernelSpec(**fields(name, **more))


def scale_op(name: str = "acme_scale", **more: Any) -> Op:
    given: dict[str, Any] = {
        "name": name,
        "summary": "x times a factor",
        "schema": "(Tensor x, *, float factor) -> (Tensor out, Tensor doubled)",
        "tensors": {"x": "rows columns"},
        "differentiable": ("x",),
        "reference": lambda x, *, factor: (x * factor, x * (2 * factor)),
        "fake": lambda x, *, factor: (torch.empty_like(x), torch.empty_like(x)),
        "samples": lambda dtype, generator: iter(()),
        "work": lambda dims, attributes: (1.0, 1.0),
    }
    return Op(**{**given, **more})


@pytest.fixture
def known() -> Catalogue:
    """kreg's own ops and kernels, without other packages."""
    return Catalogue.builtin(packages=False)


@pytest.fixture
def process() -> Iterator[Catalogue]:
    """The catalogue of the process, put back afterwards."""
    shared = catalogue()
    before = shared._contents
    yield shared
    shared._contents = before


@pytest.fixture
def specs_file(tmp_path: Path) -> Any:
    def write(*specs: Any, name: str = "acme.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(list(specs)))
        return path

    return write


def test_kregs_own_ops_and_kernels_are_there(known: Catalogue) -> None:
    assert tuple(known.ops.values()) == BUILTIN_OPS
    assert {"mindspeed.sas", "mindspeed.li"} <= set(known.specs)
    assert known.where("mindspeed.sas") == "kreg/kernels/sparse_attention/npu.yaml"
    assert known.problems == ()


def test_sas_and_li_of_mindspeed_exclude_each_other(known: Catalogue) -> None:
    assert known.excluded_by("mindspeed.sas") == {"mindspeed.li"}
    assert known.excluded_by("mindspeed.li") == {"mindspeed.sas"}


def test_reading_the_specs_imports_no_kernel_package() -> None:
    code = (
        "import sys, torch._dynamo; before = set(sys.modules); "  # which imports triton where it is installed
        "from kreg.registry.catalogue import catalogue; catalogue(); parts = ('kreg.kernels.', 'triton', 'torch_npu', "
        "'mindspeed', 'transformers'); print([m for m in set(sys.modules) - before if m.startswith(parts)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_of_specs_is_loaded(known: Catalogue, specs_file: Any) -> None:
    path = specs_file(fields(), fields("acme.other"))
    assert [s.name for s in known.load(path)] == ["acme.flash", "acme.other"]
    assert known.kernel("acme.flash").op == "attention" and known.where("acme.flash") == str(path)
    assert known.kernel("acme.flash") in known.kernels_for("attention")


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (
            fields("acme.bad", op="atention"),
            "field 'op' is 'atention', not a registered op (did you mean 'attention'?)",
        ),
        (fields("acme.bad", dtypes=["float31"]), "field 'dtypes.0' is 'float31'"),
        (fields("acme.bad", colour="red"), "unknown field 'colour' with value 'red'"),
        (
            fields("acme.bad", constraints=["head_dim <= 256", "heads_dim > 3"]),
            "field 'constraints.1': constraint",
        ),
        (fields("acme.bad", constraints=["head_dim <="]), "field 'constraints.0': constraint 'head_dim <='"),
        (fields("acme.bad", constraints=["has_q"]), "'has_q' is not a known name"),
        (fields(), "kernel 'acme.flash' is registered already"),
        (
            fields("acme.bad", excludes=["acme.flsh"]),
            "'acme.flsh', which no kernel is called (did you mean 'acme.flash'?)",
        ),
        (
            fields("acme.bad", excludes=["tag:fastt"]),
            "'tag:fastt', a tag that no kernel has (did you mean 'fast'?)",
        ),
        (fields("acme.bad", excludes=["acme.bad"]), "field 'excludes' has 'acme.bad', itself"),
        ("attention", "a spec is a mapping of fields, found 'attention'"),
    ],
)
def test_a_bad_spec_is_named_with_its_file_and_adds_nothing(
    bad: Any, complaint: str, known: Catalogue, specs_file: Any
) -> None:
    before = dict(known.specs)
    path = specs_file(fields(tags=["fast"]), bad)
    with pytest.raises(SpecError) as caught:
        known.load(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value)
    assert dict(known.specs) == before


def test_constraints_may_use_dimensions_attributes_and_the_presence_of_tensors(known: Catalogue) -> None:
    known.add(spec(constraints=["head_dim % 8 == 0 and softcap == 0.0 and not has_mask and window <= keys"]))


def test_the_error_of_a_malformed_constraint_points_at_the_part(known: Catalogue) -> None:
    with pytest.raises(SpecError) as caught:
        known.add(spec(constraints=["heads % kvheads == 0"]), "acme.yaml")
    message = str(caught.value)
    assert message.startswith("acme.yaml: kernel 'acme.flash': field 'constraints.0'")
    assert "did you mean 'kv_heads'?" in message and "\n            ^^^^^^^\n" in message


def test_two_kernels_of_one_name_are_refused_with_both_sources(known: Catalogue, specs_file: Any) -> None:
    first, second = specs_file(fields()), specs_file(fields(), name="second.yaml")
    known.load(first)
    with pytest.raises(SpecError) as caught:
        known.load(second)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_specs_of_one_file_may_exclude_each_other_in_any_order(known: Catalogue, specs_file: Any) -> None:
    known.load(specs_file(fields("a.one", excludes=["a.two"]), fields("a.two", tags=["t"])))
    known.add(spec("a.three", excludes=["tag:t"]))
    assert known.excluded_by("a.two") == {"a.one", "a.three"}
    assert known.excluded_by("a.three") == {"a.two"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("op: attention", "a YAML list of specs is expected, found dict"),
        ("- [unclosed", "is not YAML"),
        ("- name: a.b\n  name: c.d", "'name' is given twice"),
        ("- !!python/object:os.system {}", "is not YAML"),
        ("", "a YAML list of specs is expected, found NoneType"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_that_holds_no_specs_is_refused(content: Any, complaint: str, known: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError, match=complaint):
        known.load(path)


def test_a_file_that_is_not_there_is_refused(known: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere\.yaml: cannot be read: No such file"):
        known.load(tmp_path / "nowhere.yaml")


def test_an_unknown_name_is_refused_with_the_nearest_one(known: Catalogue) -> None:
    with pytest.raises(SelectionError, match=r"no kernel is called 'mindspeed\.sa' \(did you mean 'mindspeed\.sas'"):
        known.kernel("mindspeed.sa")
    with pytest.raises(SelectionError, match=r"no op is called 'attension' \(did you mean 'attention'"):
        known.op("attension")


def test_an_op_can_be_added_once(known: Catalogue) -> None:
    op = scale_op()
    known.add_op(op)
    known.add_op(op)
    known.add(spec(op="acme_scale", constraints=["columns % 8 == 0 and factor > 0"]))
    with pytest.raises(SpecError, match="op 'acme_scale' is registered already"):
        known.add_op(scale_op())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tensors": {"y": "rows columns"}}, "field 'tensors' has 'y'"),
        ({"differentiable": ("z",)}, "field 'differentiable' has 'z'"),
        ({"schema": "(Tensor x"}, "torch rejects its schema"),
    ],
)
def test_an_op_whose_tables_do_not_fit_its_schema_is_refused(
    change: dict[str, Any], complaint: str, known: Catalogue
) -> None:
    with pytest.raises(SpecError, match=complaint):
        known.add_op(scale_op(**change))
    assert "acme_scale" not in known.ops


# ---- this process's own


def test_there_is_one_catalogue_of_the_process() -> None:
    found: list[Catalogue] = []
    threads = [threading.Thread(target=lambda: found.append(catalogue())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_register_takes_a_spec_its_fields_and_a_file(process: Catalogue, specs_file: Any) -> None:
    register(spec("acme.one"))
    register(fields("acme.two"))
    register(specs_file(fields("acme.three")))
    register(str(specs_file(fields("acme.four"))))
    assert {"acme.one", "acme.two", "acme.three", "acme.four"} <= set(process.specs)


def test_register_refuses_anything_else(process: Catalogue) -> None:
    with pytest.raises(SpecError, match="3 is not something to register"):
        register(3)  # type: ignore[arg-type]


def test_registering_an_op_makes_it_callable(process: Catalogue) -> None:
    register(scale_op("acme_scale_registered"))
    out, _ = torch.ops.kreg.acme_scale_registered(torch.ones(2, 3), factor=2.0)
    assert torch.equal(out, torch.full((2, 3), 2.0))


def test_an_op_that_torch_refuses_is_not_registered(process: Catalogue) -> None:
    with pytest.raises(SpecError):
        register(dataclasses.replace(ATTENTION, summary="another of the same name"))
    assert process.op("attention") is ATTENTION


def test_a_decorated_function_is_a_kernel_and_stays_a_function(process: Catalogue) -> None:
    def gradient() -> None: ...

    @kernel(op="attention", name="mine.nested", devices=("cpu",), dtypes=(torch.float32,), backward=gradient)
    def nested() -> int:
        return 3

    found = process.kernel("mine.nested")
    assert nested() == 3 and found.provider == "mine"
    assert found.entry_point() is nested and found.backward_point() is gradient
    assert "nested" in found.entry and "@kernel on" in process.where("mine.nested")


def test_functions_of_one_name_stay_apart(process: Catalogue) -> None:
    def make(result: int) -> Any:
        @kernel(op="attention", name=f"mine.made{result}", devices=("cpu",), dtypes=("float32",))
        def made() -> int:
            return result

        return made

    made = [make(1), make(2)]
    assert [process.kernel(f"mine.made{n}").entry_point() for n in (1, 2)] == made


def test_a_kernel_that_is_refused_is_not_registered(process: Catalogue) -> None:
    with pytest.raises(SpecError, match="'mine'"):
        kernel(op="attention", name="mine", devices=("cpu",), dtypes=("float32",))(lambda: None)
    with pytest.raises(SpecError, match="field 'op' is 'nothing'"):
        kernel(op="nothing", name="mine.lost", devices=("cpu",), dtypes=("float32",))(lambda: None)
    assert "mine.lost" not in process.specs


def test_a_kernel_of_the_main_module_can_be_called() -> None:
    code = (
        "from kreg.registry.sources import kernel; from kreg.registry.catalogue import catalogue\n"
        "@kernel(op='attention', name='mine.main', devices=('cpu',), dtypes=('float32',))\n"
        "def f(): return 3\n"
        "print(catalogue().kernel('mine.main').entry, catalogue().kernel('mine.main').entry_point()())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["__main__:f", "3"]


# ---- other packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package: a module and the entry points it declares."""

    def install(name: str, code: str, *points: str) -> Path:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[kreg.specs]", *points]))
        return tmp_path

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.startswith("kregtest_")]:
        del sys.modules[name]


SPEC = """
from kreg.registry.spec import KernelSpec
def make(name, op="attention", **more):
    return KernelSpec(op=op, name=name, entry="m:f", devices=["cpu"], dtypes=["float32"], **more)
"""


def test_a_package_contributes_specs_ops_and_files(package: Any) -> None:
    folder = package(
        "kregtest_good",
        SPEC + "ONE = make('good.one')\nMANY = [make('good.two'), make('good.three', excludes=['good.one'])]\n"
        "FILE = 'kregtest_specs.yaml'\n",
        "one = kregtest_good:ONE",
        "many = kregtest_good:MANY",
        "file = kregtest_good:FILE",
        "module = kregtest_good",
    )
    (folder / "kregtest_specs.yaml").write_text(yaml.safe_dump([fields("good.four")]))
    found = Catalogue.builtin()
    assert {"good.one", "good.two", "good.three", "good.four"} <= set(found.specs)
    assert found.problems == () and "of kregtest_good" in found.where("good.one")


def test_a_broken_package_is_left_out_whole_recorded_and_warned_about(package: Any) -> None:
    package(
        "kregtest_bad",
        SPEC + "FINE = make('bad.fine')\nNONSENSE = 3\n"
        "HALF = [make('half.one'), make('half.two', op='no_such_op')]\n"
        "DANGLING = make('bad.dangling', excludes=['no.kernel'])\n"
        "NEEDS = make('bad.needs', excludes=['bad.dangling'])\n"
        "def __getattr__(name): raise RuntimeError('no such thing')\n",
        "fine = kregtest_bad:FINE",
        "nonsense = kregtest_bad:NONSENSE",
        "half = kregtest_bad:HALF",
        "dangling = kregtest_bad:DANGLING",
        "needs = kregtest_bad:NEEDS",
        "raises = kregtest_bad:MISSING",
        "absent = kregtest_absent:X",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Catalogue.builtin()
    assert "bad.fine" in found.specs
    assert not {"half.one", "half.two", "bad.dangling", "bad.needs"} & set(found.specs)
    assert len(found.problems) == 6 and len(caught) == 6
    told = "\n".join(found.problems)
    for part in (
        "3 is not something",
        "'no_such_op'",
        "'no.kernel'",
        "'bad.dangling', which",
        "no such thing",
    ):
        assert part in told
    assert all("of kregtest_bad" in problem for problem in found.problems)


def test_a_package_may_register_kernels_while_it_is_imported(package: Any) -> None:
    folder = package(
        "kregtest_decorates",
        "from kreg.registry.sources import kernel\n"
        "@kernel(op='attention', name='decorates.one', devices=['cpu'], dtypes=['float32'])\n"
        "def f(): return 3\n",
        "module = kregtest_decorates",
    )
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from kreg.registry.catalogue import catalogue\n"
        "print(catalogue().kernel('decorates.one').entry_point()())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "3" and done.stderr == ""
