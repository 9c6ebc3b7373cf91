"""``kreg list``, ``kreg show`` and ``kreg doctor``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kreg.registry.catalogue import catalogue
from kreg.registry.spec import KernelSpec

from .conftest import Kreg


def test_list_has_every_kernel_with_its_exclusions_and_why_it_cannot_be_used(kreg: Kreg) -> None:
    ended = kreg("list", "--json")
    assert ended.code == 0 and not ended.err
    kernels = {k["name"]: k for k in ended.json["kernels"]}
    assert set(kernels) == set(catalogue().specs)
    sas = kernels["mindspeed.sas"]
    assert sas["excluded_kernels"] == ["mindspeed.li"] and not sas["available"]
    assert "there is no npu device here" in sas["reasons"]
    assert kernels["kreg.tiled_attention"]["available"] and not kernels["kreg.tiled_attention"]["reasons"]


def test_list_shows_the_columns_and_the_reason(kreg: Kreg) -> None:
    ended = kreg("list")
    for word in ("kernel", "provider", "device", "dtypes", "trains", "excludes", "available", "bf16"):
        assert word in ended.out
    assert "1 there is no" in ended.words and "no 1" in ended.words


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--op", "attention"], {"kreg.tiled_attention", "torch.sdpa"}),
        (["--op", "lightning_indexer", "--device", "npu"], {"mindspeed.li"}),
        (["--device", "npu", "--available"], set()),
        (["--op", "sparse_attention", "--unavailable"], {"mindspeed.sas"}),
        (["--op", "sparse_attention", "--available"], {"kreg.tiled_sparse_attention"}),
    ],
)
def test_filters_combine(kreg: Kreg, options: list[str], expected: set[str]) -> None:
    found = {k["name"] for k in kreg("list", "--json", *options).json["kernels"]}
    assert expected <= found and (expected or not found)
    assert found - expected <= {name for name in catalogue().specs if not name.startswith("mindspeed.")}


def test_an_empty_list_says_so(kreg: Kreg) -> None:
    assert "No kernel matches" in kreg("list", "--device", "npu", "--available").out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "--op", "atention"], "did you mean 'attention'"),
        (["list", "--device", "gpu"], "torch calls it 'cuda'"),
        (["show", "mindspeed.saz"], "did you mean 'mindspeed.sas'"),
        (["show", "attention"], "is an op, not a kernel: kreg list --op attention"),
    ],
)
def test_an_unknown_name_is_bad_input_with_a_hint(kreg: Kreg, arguments: list[str], told: str) -> None:
    ended = kreg(*arguments)
    assert ended.code == 2 and told in ended.words and not ended.out and "Traceback" not in ended.err


def test_an_error_is_json_too(kreg: Kreg) -> None:
    ended = kreg("show", "nobody.nothing", "--json")
    assert ended.code == 2
    error = ended.json["error"]
    assert error["type"] == "SelectionError" and error["exit_code"] == 2 and "nobody.nothing" in error["message"]


def test_show_tells_what_is_declared_and_where(kreg: Kreg) -> None:
    facts = kreg("show", "mindspeed.sas", "--json").json
    assert facts["declared_in"] == "kreg/kernels/sparse_attention/npu.yaml"
    assert "window == 128" in facts["constraints"] and facts["requires"]
    text = kreg("show", "mindspeed.sas").words
    for part in ("Ascend910_93*", "window == 128", "mindspeed.li", 'pip install "torch_npu>=2.13"'):
        assert part in text


def test_doctor_tells_versions_devices_and_how_to_install_what_is_missing(kreg: Kreg) -> None:
    facts = kreg("doctor", "--json").json
    assert facts["versions"]["torch"] and facts["versions"]["python"].count(".") == 2
    devices = {d["device"]: d for d in facts["devices"]}
    assert devices["cpu"]["present"] and devices["cpu"]["usable"] >= 3
    assert not devices["npu"]["present"] and devices["npu"]["usable"] == 0
    missing = {m["command"]: m["needed_by"] for m in facts["missing"]}
    ops = catalogue().ops  # not those to come: no package would bring them
    for_npu = sorted(n for n, kernel in catalogue().specs.items() if kernel.devices == ("npu",) and kernel.op in ops)
    assert sorted(missing['pip install "torch_npu>=2.13"']) == for_npu and len(for_npu) > 2
    text = kreg("doctor").words
    assert 'pip install "torch_npu>=2.13"' in text and "there is no npu device here" in text


def test_a_users_kernel_of_another_package_is_told_with_its_command(
    kreg: Kreg, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = catalogue()
    monkeypatch.setattr(known, "_contents", known._contents)  # put back afterwards
    known.add(
        KernelSpec(
            op="attention",
            name="acme.flash",
            entry="acme:flash",
            devices=["cpu"],
            dtypes=["float32"],
            requires=["acme-flash>=2"],
        )
    )
    missing = kreg("doctor", "--json").json["missing"]
    assert {"acme.flash"} in [set(m["needed_by"]) for m in missing]
    assert 'pip install "acme-flash>=2"' in kreg("show", "acme.flash").words


def test_version_and_help_name_the_version_and_the_exit_codes(kreg: Kreg) -> None:
    assert kreg("--version").out.startswith("kreg ")
    text = kreg("--help").words
    assert "3 nothing was replaced" in text and "config.json" in text
    for command in ("list", "show", "rewrite", "explain", "verify", "doctor"):
        assert kreg(command, "--help").code == 0 and command in text


def test_list_and_help_do_not_import_transformers() -> None:
    code = (
        "import sys\n"
        "from kreg.cli import app\n"
        "for arguments in (['--help'], ['list', '--json'], ['doctor', '--json']):\n"
        "    app(arguments, standalone_mode=False)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
