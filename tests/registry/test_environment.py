"""The environment: what is here, what is supposed, and why a kernel is not available."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kreg.errors import SelectionError
from kreg.registry.environment import (
    UNKNOWN_VERSION,
    Environment,
    InstalledPackages,
    availability,
)
from kreg.registry.spec import KernelSpec


class Versions(dict[str, str]):
    """Packages from a table."""

    def version(self, package: str) -> str | None:
        return self.get(package)


def spec(**fields: Any) -> KernelSpec:
    given = {
        "op": "attention",
        "name": "acme.flash",
        "entry": "acme:f",
        "devices": ["cuda"],
        "dtypes": ["float32"],
    }
    return KernelSpec(**{**given, **fields})


def test_the_cpu_is_always_there() -> None:
    found = Environment.detect("cpu")
    assert found.present and not found.assumed
    assert found.architecture == torch.backends.cpu.get_cpu_capability()


def test_no_device_given_means_torchs_default() -> None:
    assert Environment.detect(None).device == torch.get_default_device().type


@pytest.mark.parametrize(
    ("device", "hint"),
    [("cdua", "did you mean 'cuda'?"), ("gpu", "torch calls it 'cuda'"), ("cuda:first", "cuda")],
)
def test_an_unknown_device_is_refused_with_those_there_are(device: str, hint: str) -> None:
    for make in (Environment.detect, Environment.supposed):
        with pytest.raises(SelectionError) as caught:
            make(device)
        assert repr(device) in str(caught.value) and hint in str(caught.value)
        assert "cpu, cuda, npu" in str(caught.value)


def test_a_device_of_an_absent_backend_is_known_and_not_present() -> None:
    if hasattr(torch, "npu"):
        pytest.skip("torch_npu is loaded")
    found = Environment.detect("npu:0")
    assert found.device == "npu" and not found.present
    assert availability(spec(devices=["npu"]), found) == ["there is no npu device here"]


@pytest.mark.parametrize(
    ("properties", "hip", "architecture"),
    [
        (SimpleNamespace(major=9, minor=0, name="H"), None, "sm_90"),
        (SimpleNamespace(gcnArchName="gfx942:sramecc+", name="MI"), "6.4", "gfx942"),
    ],
)
def test_a_gpu_is_described_by_its_architecture(
    properties: SimpleNamespace, hip: str | None, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = Environment.detect(torch.device("cuda", 1))
    assert (found.architecture, found.name, found.present) == (architecture, properties.name, True)
    with pytest.raises(SelectionError, match="cuda:2 was asked for; there are 2: 0 to 1"):
        Environment.detect("cuda:2")


def test_an_npu_is_described_by_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda index: "Ascend910B1"
    )
    monkeypatch.setattr(torch, "npu", module, raising=False)
    assert Environment.detect("npu").architecture == "Ascend910B1"


def test_a_supposed_device_has_every_package_and_any_architecture() -> None:
    supposed = Environment.supposed("npu")
    wanted = spec(devices=["npu"], requires=["torch_npu>=99"], architectures=["Ascend910B*"])
    assert supposed.assumed and availability(wanted, supposed) == []


def test_a_supposed_architecture_still_has_to_fit() -> None:
    supposed = Environment.supposed("cuda", "sm_75")
    assert availability(spec(architectures=["sm_80+"]), supposed) == ["it needs sm_80+, the cuda device is sm_75"]


@pytest.mark.parametrize(
    ("conditions", "architecture", "fits"),
    [
        ((), "anything", True),
        (("sm_80+",), "sm_80", True),
        (("sm_80+",), "sm_100", True),
        (("sm_90+",), "sm_86", False),
        (("sm_90",), "sm_100", False),
        (("sm_80+",), "gfx942", False),
        (("sm_90", "gfx942"), "gfx942", True),
        (("gfx942",), "gfx950", False),
        (("Ascend910B*",), "Ascend910B1", True),
        (("ascend910b*",), "Ascend910B1", True),
        (("Ascend910B*",), "Ascend310P3", False),
        (("sm_80+",), None, False),
    ],
)
def test_one_architecture_condition_has_to_hold(
    conditions: tuple[str, ...], architecture: str | None, fits: bool
) -> None:
    environment = Environment("cuda", architecture, packages=Versions())
    assert (availability(spec(architectures=conditions), environment) == []) is fits


@pytest.mark.parametrize(
    ("requirement", "versions", "reason"),
    [
        ("triton>=3.4,<4", {"triton": "3.4.1"}, None),
        ("triton>=3.4", {"triton": "3.5.0rc1"}, None),
        (
            "triton>=3.4",
            {"triton": "3.3"},
            'package triton is 3.3, and it needs >=3.4: pip install "triton>=3.4"',
        ),
        ("triton>=3.4", {}, 'package triton is not installed: pip install "triton>=3.4"'),
        ("triton>=3.4", {"triton": UNKNOWN_VERSION}, None),
        ("triton>=3.4", {"triton": "a vendor's own"}, None),
        ("triton; python_version < '3'", {}, None),
        (
            "mindspeed @ git+https://example.org/m.git",
            {},
            'package mindspeed is not installed: pip install "mindspeed @ git+https://example.org/m.git"',
        ),
    ],
)
def test_a_missing_or_old_package_is_named_with_the_command_that_installs_it(
    requirement: str, versions: dict[str, str], reason: str | None
) -> None:
    environment = Environment("cuda", packages=Versions(versions))
    assert availability(spec(requires=[requirement]), environment) == ([] if reason is None else [reason])


def test_installed_packages_are_looked_up_without_importing_them(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checked_out.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = InstalledPackages()
    assert packages.version("torch") is not None
    assert packages.version("checked-out") == UNKNOWN_VERSION
    assert packages.version("no-such-package-anywhere") is None


def test_another_device_is_the_only_reason_given_for_it() -> None:
    assert availability(spec(requires=["nothing-here"]), Environment.detect("cpu")) == ["it runs on cuda, not on cpu"]


def test_an_adapter_that_this_version_lacks_is_said_so() -> None:
    missing = spec(devices=["cpu"], entry="kreg.kernels.no_such_op.no_such_adapter:forward")
    reason = "its adapter module kreg.kernels.no_such_op.no_such_adapter is not part of this version of kreg"
    assert availability(missing, Environment.detect("cpu")) == [reason]
    assert availability(missing, Environment.supposed("cpu")) == []


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu", "xpu"])
def test_every_device_has_peak_rates(device: str) -> None:
    for architecture in (None, "sm_90", "unheard-of"):
        peaks = Environment(device, architecture).peaks
        assert peaks.flops > peaks.bandwidth > 0
