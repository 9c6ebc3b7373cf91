"""Ops to come: kernels are declared for them and listed, and no plan, user's kernel or user's op can use the name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kreg.cli import app
from kreg.errors import SelectionError, SpecError
from kreg.registry.catalogue import Catalogue
from kreg.registry.contents import Contents
from kreg.registry.environment import Environment, availability
from kreg.registry.op import Op
from kreg.registry.ops.to_come import OPS_TO_COME, no_contract
from kreg.registry.plan import SiteFacts, make_plan
from kreg.registry.spec import KernelSpec

NORM = "torch_npu.rms_norm"


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue.builtin(packages=False)


def declared(known: Catalogue) -> list[KernelSpec]:
    return [spec for spec in known.specs.values() if spec.op in OPS_TO_COME]


def spec(**fields: Any) -> KernelSpec:
    return KernelSpec(**{"name": "acme.x", "entry": "acme:f", "devices": ["cpu"], "dtypes": ["float32"], **fields})


def listed(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_every_op_to_come_has_a_kernel_and_is_no_op_yet(known: Catalogue) -> None:
    assert {s.op for s in declared(known)} == set(OPS_TO_COME)
    assert not set(OPS_TO_COME) & set(known.ops)


def test_what_is_declared_for_one_claims_no_condition_that_nothing_could_check(known: Catalogue) -> None:
    assert [s.name for s in declared(known) if s.constraints or s.entry.startswith("kreg.")] == []


def test_no_kernel_of_one_can_be_used_even_where_its_device_and_packages_are(known: Catalogue) -> None:
    for there in declared(known):
        here = Environment.supposed("npu", "Ascend910B1")
        assert availability(there, here) == [no_contract(there.op)]
    assert "no contract for rms_norm yet" in str(no_contract("rms_norm")) and no_contract("attention") is None


def test_no_site_can_be_planned_for_one(known: Catalogue) -> None:
    site = SiteFacts("0", "rms_norm", {}, {}, torch.bfloat16, trainable=True)
    with pytest.raises(SelectionError, match="no op is called 'rms_norm'"):
        make_plan([site], known, Environment.supposed("npu"))


def test_enabling_one_says_in_the_plan_that_it_is_never_chosen(known: Catalogue) -> None:
    plan = make_plan([], known, Environment.supposed("npu"), enable=[NORM, "torch_npu.grouped_matmul"])
    assert plan.kernels == () and plan.unused[NORM] == no_contract("rms_norm")
    assert plan.unused["torch_npu.grouped_matmul"] == "no site computes grouped_matmul"


@pytest.mark.parametrize(("op", "hint"), [("rms_norm", ""), ("atention", " (did you mean 'attention'?)")])
def test_a_users_kernel_of_one_is_refused_as_of_any_op_that_is_not_there(known: Catalogue, op: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        known.add(spec(op=op))
    assert f"field 'op' is {op!r}, not a registered op{hint}. Known: " in str(caught.value)
    assert "acme.x" not in known.specs


def test_kregs_own_spec_with_a_misspelt_op_to_come_is_told_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"'rms_nrm', not a registered op \(did you mean 'rms_norm'\?\)"):
        Contents().plus([spec(op="rms_nrm")], "here", OPS_TO_COME)


def test_kregs_own_spec_of_one_may_have_no_constraint() -> None:
    with pytest.raises(SpecError, match=r"field 'constraints\.0'"):
        Contents().plus([spec(op="rms_norm", constraints=["rows > 0"])], "here", OPS_TO_COME)


def test_a_users_op_of_that_name_is_refused_since_kernels_are_declared_for_another(known: Catalogue) -> None:
    op = Op(
        name="rms_norm",
        summary="",
        schema="(Tensor x) -> Tensor",
        tensors={"x": "n"},
        differentiable=(),
        reference=lambda x: x,
        fake=lambda x: x,
        samples=lambda dtype, generator: iter(()),
        work=lambda dims, attributes: (1.0, 1.0),
    )
    with pytest.raises(SpecError, match="op 'rms_norm': kreg has kept this name for an op to come"):
        known.add_op(op)
    assert "rms_norm" not in known.ops


def test_list_and_show_have_them_with_the_reason_and_the_list_of_what_is_available_does_not() -> None:
    text = listed("list", "--op", "rms_norm", "--device", "npu")
    assert "rms_norm  op to come" in text and NORM in text and "no contract names its sizes yet" in text
    assert str(no_contract("rms_norm")) in text
    shown = json.loads(listed("show", NORM, "--json"))
    assert not shown["available"] and shown["reasons"] == [no_contract("rms_norm")]
    assert shown["declared_in"] == "kreg/kernels/rms_norm/npu.yaml"
    assert str(no_contract("rms_norm")) in listed("show", NORM)
    available = {k["op"] for k in json.loads(listed("list", "--available", "--json"))["kernels"]}
    assert "attention" in available and not available & set(OPS_TO_COME)


def test_an_op_to_come_is_told_apart_from_a_kernel_of_it() -> None:
    done = CliRunner().invoke(app, ["show", "rms_norm"])
    assert done.exit_code == 2 and "is an op, not a kernel" in " ".join(done.stderr.split())


def test_the_documentation_names_every_kernel_of_one(known: Catalogue) -> None:
    page = (Path(__file__).parents[2] / "docs" / "npu.md").read_text(encoding="utf-8")
    assert [s.name for s in declared(known) if f"`{s.name}`" not in page or f"`{s.op}`" not in page] == []
