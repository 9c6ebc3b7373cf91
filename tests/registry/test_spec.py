"""Specs: what is accepted, and errors that name kernel, field, value and what is allowed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kreg.errors import SpecError
from kreg.registry.spec import Cost, KernelSpec

FIELDS: dict[str, Any] = {
    "op": "attention",
    "name": "acme.flash",
    "entry": "acme.kernels:flash",
    "devices": ["cuda", "npu"],
    "dtypes": ["float32", "bfloat16"],
}


def test_a_spec_needs_only_op_name_entry_devices_and_dtypes() -> None:
    spec = KernelSpec(**FIELDS)
    assert spec.provider == "acme" and spec.devices == ("cuda", "npu")
    assert spec.backward is None and not spec.trains and spec.deterministic
    assert spec.cost == Cost() and spec.backward_point() is None


def test_everything_can_be_declared() -> None:
    spec = KernelSpec(
        **FIELDS,
        backward="acme.kernels:Flash.backward",
        architectures=["sm_80+", "sm_90a", "gfx942", "Ascend910B*"],
        constraints=["head_dim <= 256"],
        trains=True,
        requires=["triton>=3.4,<4", "mindspeed @ git+https://example.org/mindspeed.git"],
        excludes=["acme.other", "tag:workspace"],
        tags=["fast"],
        deterministic=False,
        cost={"efficiency": 0.5, "overhead_us": 3},
        source="a paper",
    )
    assert spec.cost == Cost(efficiency=0.5, overhead_us=3.0)
    assert KernelSpec(**spec.model_dump()) == spec


def test_torch_dtypes_may_be_given_as_objects() -> None:
    assert KernelSpec(**{**FIELDS, "dtypes": (torch.half, torch.bfloat16)}).dtypes == ("float16", "bfloat16")


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        KernelSpec(**FIELDS).op = "other"


@pytest.mark.parametrize(
    ("change", "found", "allowed"),
    [
        ({"dtypez": ["float32"]}, "unknown field 'dtypez' with value ['float32']", "did you mean 'dtypes'?"),
        ({"dtypes": ["bfloat61"]}, "field 'dtypes.0' is 'bfloat61'", "did you mean 'bfloat16'?"),
        ({"dtypes": ["float32", "half"]}, "field 'dtypes.1' is 'half'", "write 'float16'"),
        ({"dtypes": "float32"}, "field 'dtypes' is 'float32'", "a valid list"),
        ({"dtypes": []}, "field 'dtypes' is []", "a list of at least one"),
        ({"devices": ["gpu"]}, "field 'devices.0' is 'gpu'", "torch calls it 'cuda'"),
        ({"devices": ["npuu"]}, "field 'devices.0' is 'npuu'", "did you mean 'npu'?"),
        ({"devices": ["cuda:0"]}, "field 'devices.0' is 'cuda:0'", "without an index"),
        ({"name": "flash"}, "field 'name' is 'flash'", "'provider.kernel'"),
        ({"provider": "other"}, "field 'provider' is 'other'", "'acme'"),
        (
            {"entry": "acme.kernels.flash"},
            "field 'entry' is 'acme.kernels.flash'",
            "'package.module:function'",
        ),
        ({"backward": "acme:"}, "field 'backward' is 'acme:'", "'package.module:function'"),
        ({"architectures": ["gfx942+"]}, "field 'architectures.0' is 'gfx942+'", "'sm_80+'"),
        ({"trains": "maybe"}, "field 'trains' is 'maybe'", "a valid boolean"),
        ({"requires": ["triton>>3"]}, "field 'requires.0' is 'triton>>3'", "'triton>=3.4,<4'"),
        ({"excludes": ["workspace"]}, "field 'excludes.0' is 'workspace'", "'tag:<tag>'"),
        ({"tags": ["two words"]}, "field 'tags.0' is 'two words'", "a word"),
        ({"cost": {"efficiency": 1.5}}, "field 'cost.efficiency' is 1.5", "less than or equal to 1"),
        ({"cost": {"efficiency": 0}}, "field 'cost.efficiency' is 0", "greater than 0"),
        ({"cost": {"overhead_us": -1}}, "field 'cost.overhead_us' is -1", "greater than or equal to 0"),
        ({"cost": {"speed": 3}}, "unknown field 'cost.speed' with value 3", "efficiency, overhead_us"),
    ],
)
def test_a_wrong_field_is_named_with_file_kernel_value_and_what_is_allowed(
    change: dict[str, Any], found: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        KernelSpec.read({**FIELDS, **change}, "specs/acme.yaml")
    message = str(caught.value)
    assert message.startswith("specs/acme.yaml: kernel ") and found in message and allowed in message
    assert "\n" not in message


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        KernelSpec(name="acme.flash", entry="x", devices=["cpu"], dtypes=["float1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith("kernel 'acme.flash': ") for line in lines)
    assert "field 'op' is missing" in lines[0]


def test_a_spec_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(SpecError, match=r"f\.yaml: a spec is a mapping of fields, found 'attention'"):
        KernelSpec.read("attention", "f.yaml")


def test_an_entry_is_imported_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_lazy.py").write_text("class Flash:\n    @staticmethod\n    def run(): return 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = KernelSpec(**{**FIELDS, "entry": "acme_lazy:Flash.run"})
    assert "acme_lazy" not in sys.modules
    assert spec.entry_point()() == 3
    assert spec.entry_point() is spec.entry_point()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("no_such_module_anywhere:f", "No module named 'no_such_module_anywhere'"),
        ("math:no_such_function", "no attribute 'no_such_function'"),
        ("math:pi", "pi is a float, not a function"),
    ],
)
def test_an_entry_that_cannot_be_used_says_why(entry: str, reason: str) -> None:
    spec = KernelSpec(**{**FIELDS, "entry": entry})
    with pytest.raises(SpecError, match=reason) as caught:
        spec.entry_point()
    assert "kernel 'acme.flash'" in str(caught.value) and entry in str(caught.value)
