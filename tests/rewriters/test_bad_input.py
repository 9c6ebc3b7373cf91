"""What cannot be done is said, by name and with the way out; what breaks leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import kreg
from kreg.registry.catalogue import catalogue
from kreg.rewriters.facts import op_nodes
from kreg.rewriters.report import Report
from tests.models import CSA, deepseek_v4, tokens

Q, K, V = (torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))


class Attention(nn.Module):
    """One plain attention."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q * self.scale) @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v


class Branching(nn.Module):
    """Goes one way or the other by what the data is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Holding(nn.Module):
    """Holds the branch two modules down."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Linear(4, 4), Branching())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_that_does_not_export_gives_the_exporters_reason_and_the_module() -> None:
    model, x = Holding().train(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    want = model(x)
    with pytest.raises(kreg.CaptureError) as caught:
        kreg.export(model, (x,))
    message = str(caught.value)
    assert "Holding could not be exported" in message and "in module 'blocks.1.1'" in message
    assert "data-dependent" in message and "The model is unchanged" in message
    assert caught.value.__cause__ is not None
    assert model.training and torch.equal(model(x), want)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_example_inputs_the_model_rejects_give_its_own_words() -> None:
    with pytest.raises(kreg.CaptureError, match=r"Attention could not be exported.*(missing|required)"):
        kreg.export(Attention(), (Q,))


@pytest.mark.parametrize("inputs", [3, "tokens", None])
def test_example_inputs_of_another_kind_are_refused(inputs: Any) -> None:
    with pytest.raises(kreg.CaptureError, match=r"example inputs should be"):
        kreg.export(Attention(), inputs)


def test_automatic_dynamic_shapes_need_inputs_of_one_kind() -> None:
    with pytest.raises(kreg.CaptureError, match=r"pass them all by keyword"):
        kreg.export(Attention(), ((Q,), {"k": K, "v": V}), dynamic_shapes="auto")


@pytest.mark.parametrize(("device", "hint"), [("gpu", "'cuda'"), ("cpuu", "cpu"), ("quantum", "Known")])
def test_an_unknown_device_is_refused_with_a_hint(device: str, hint: str) -> None:
    with pytest.raises(kreg.SelectionError, match=device) as caught:
        kreg.export(Attention(), (Q, K, V), device=device)
    assert hint in str(caught.value)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(kreg.SelectionError, match=r"no\.such"):
        kreg.export(Attention(), (Q, K, V), enable=["no.such"])


def test_on_a_device_without_a_usable_kernel_nothing_is_replaced_and_it_is_said() -> None:
    model = Attention()
    report = kreg.analyse(model, (Q, K, V), device="meta")
    (site,) = report.sites
    assert site.status == "kept" and site.kernel is None and site.reason
    assert site.alternatives and all(a.rejected for a in site.alternatives)
    exported = kreg.export(model, (Q, K, V), device="meta")
    assert not list(op_nodes(exported.graph))
    assert torch.equal(exported.module()(Q, K, V), model(Q, K, V))


def test_forcing_two_kernels_that_exclude_each_other_names_both() -> None:
    """MindSpeed's sparse attention and indexer, from their specs alone."""
    with pytest.raises(kreg.SelectionError) as caught:
        kreg.analyse(
            deepseek_v4((CSA,)),
            {"input_ids": tokens(2, 45)},
            device="npu",
            enable=["mindspeed.sas", "mindspeed.li"],
            dry_run=True,
        )
    message = str(caught.value)
    assert "mindspeed.sas" in message and "mindspeed.li" in message


@pytest.fixture
def added() -> Iterator[None]:
    """Kernels that a test adds, taken out again after it."""
    from kreg.registry.calls import resolve

    before = catalogue()._contents
    yield
    catalogue()._contents = before
    resolve.cache_clear()


def exported_with(name: str, **options: Any) -> tuple[nn.Module, Any, Report]:
    model = Attention()
    report = kreg.analyse(model, (Q, K, V), enable=[name], **options)
    return model, kreg.export(model, (Q, K, V), enable=[name], **options), report


def raising(q: torch.Tensor, *args: Any, **attributes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("the tile does not fit")


def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **rest: Any) -> tuple[torch.Tensor, ...]:
    from kreg.registry.ops import ATTENTION

    out, lse = ATTENTION.reference(q, k, v, *args, **rest)
    return out * 1.001, lse


def misshapen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **rest: Any) -> tuple[torch.Tensor, ...]:
    return q[:, :1], q[..., 0]


def forward_only(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **rest: Any
) -> tuple[torch.Tensor, ...]:
    from kreg.registry.ops import ATTENTION

    return ATTENTION.reference(q, k, v, *args, **rest)


def wrong_gradients(grads: Any, outputs: Any, needs: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(arguments[name]) for name in needs}


KERNELS = {
    "raising": ({}, raising, "the tile does not fit"),
    "wrong": ({}, wrong, "failed verification in float32: error"),
    "misshapen": ({}, misshapen, "failed verification"),
    "wrong_gradients": ({"backward": wrong_gradients}, forward_only, "gradients"),
}


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_of_the_users_that_fails_leaves_the_site_and_says_why(kind: str) -> None:
    options, function, reason = KERNELS[kind]
    name = f"test.{kind}"
    kreg.kernel(op="attention", name=name, devices=["cpu"], dtypes=["float32"], trains=True, **options)(function)
    model, exported, report = exported_with(name)
    (site,) = report.sites
    assert site.status == "kept" and site.kernel is None
    assert reason in site.reason
    assert site.verify is not None and not site.verify.passed
    assert not list(op_nodes(exported.graph))
    assert torch.equal(exported.module()(Q, K, V), model(Q, K, V))


@pytest.mark.usefixtures("added")
def test_a_kernel_of_the_users_that_is_right_is_taken() -> None:
    kreg.kernel(op="attention", name="test.right", devices=["cpu"], dtypes=["float32"], trains=True)(forward_only)
    model, exported, report = exported_with("test.right")
    assert [site.kernel for site in report.sites] == ["test.right"]
    torch.testing.assert_close(exported.module()(Q, K, V), model(Q, K, V), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("added")
def test_a_kernel_that_is_not_installed_is_computed_by_the_reference_and_counted() -> None:
    """A saved program may name a kernel that is not there where it is loaded."""
    from kreg.registry.calls import fallbacks, resolve

    resolve.cache_clear()
    out, _ = torch.ops.kreg.attention(Q, K, V, scale=0.3, kernel="nowhere.kernel")
    want, _ = torch.ops.kreg.attention(Q, K, V, scale=0.3)
    assert torch.equal(out, want)
    assert any(name == "nowhere.kernel" for name, _ in fallbacks)
