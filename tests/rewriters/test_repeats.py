"""Sites that are the same code are verified once; whatever differs in anything that counts is verified itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kreg
from kreg.api import analyse, settings_for
from kreg.registry.catalogue import catalogue
from kreg.registry.ops import ATTENTION
from kreg.rewriters import pipeline
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find
from kreg.rewriters.program import functional
from kreg.rewriters.repeats import Repeats
from kreg.rewriters.report import Report, SiteReport
from kreg.rewriters.site import Site


@dataclass(frozen=True)
class Form:
    """How one layer's attention is written."""

    heads: int = 2
    scale: float = 0.25
    diagonal: int = 1
    hidden: float = -math.inf
    order: str = "scale first"
    tied: bool = False
    bias: float | None = None
    frozen: bool = False


class Layer(nn.Module):
    """Attention in one of its forms."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(32, 96)
        self.qkv.requires_grad_(not form.frozen)
        if form.bias is not None:
            self.register_buffer("table", torch.linspace(-1, form.bias, 400).reshape(20, 20), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        form, (batch, length, _) = self.form, x.shape
        x = x.detach() if form.frozen else x
        q, k, v = self.qkv(x).view(batch, length, 3, form.heads, 32 // form.heads).permute(2, 0, 3, 1, 4)
        v = k if form.tied else v
        ahead = torch.ones(length, length, dtype=torch.bool).triu(form.diagonal)
        scores = q @ k.transpose(-1, -2)
        if form.order == "scale first":
            scores = scores * form.scale
        if form.bias is not None:
            scores = scores + self.table  # type: ignore[operator]
        weights = scores.masked_fill(ahead, form.hidden)
        if form.order == "scale last":
            weights = weights * form.scale
        return (weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, 32)


class Stack(nn.Module):
    """Layers one after the other, with residuals."""

    def __init__(self, *forms: Form) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(form) for form in forms)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


INPUTS = (torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0)),)
PLAIN = Form()


def report_of(*forms: Form) -> Report:
    """The report of a stack."""
    torch.manual_seed(0)
    return analyse(Stack(*forms), INPUTS, device="cpu")


def sites_of(*forms: Form) -> tuple[SiteReport, ...]:
    """Its sites, one for each layer."""
    sites = report_of(*forms).sites
    assert len(sites) == len(forms)
    return sites


def run_at(*forms: Form) -> list[int]:
    """For each layer, the layer whose attention was run for its verification."""
    sites = sites_of(*forms)
    ids = [site.id for site in sites]
    return [ids.index(site.verified_at or "") for site in sites]


def test_layers_that_differ_in_weights_and_names_alone_are_verified_once() -> None:
    assert run_at(PLAIN, PLAIN, PLAIN, PLAIN) == [0, 0, 0, 0]


def test_layers_of_two_kinds_are_verified_once_each() -> None:
    other = replace(PLAIN, heads=4)
    assert run_at(PLAIN, other, PLAIN, other, other) == [0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 4},
        {"scale": 0.125},
        {"scale": -0.25},
        {"diagonal": 2},
        {"hidden": -1e9},
        {"order": "scale last"},
        {"tied": True},
        {"bias": 1.0},
        {"frozen": True},
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_a_layer_that_differs_in_anything_else_is_verified_itself(change: dict[str, Any]) -> None:
    assert run_at(PLAIN, replace(PLAIN, **change), PLAIN) == [0, 1, 0]


def test_stored_tensors_are_compared_by_their_values() -> None:
    """Each layer holds a tensor of its own."""
    one, other = replace(PLAIN, bias=1.0), replace(PLAIN, bias=2.0)
    assert run_at(one, other, one) == [0, 1, 0]


def test_zero_and_minus_zero_are_two_numbers_and_so_are_1_and_true() -> None:
    def first_two(*scales: Any) -> bool:
        found = [site_with(scale) for scale in scales]
        repeats = Repeats()
        return len({repeats.first(site) for site in found}) == 1

    def site_with(scale: Any) -> Site:
        return replace(captured, attributes={**captured.attributes, "scale": scale})

    (captured,) = find(functional(export_model(Stack(PLAIN), INPUTS)).module.graph).sites
    assert first_two(0.5, 0.5)
    assert not first_two(0.0, -0.0) and not first_two(1, True) and not first_two(1, 1.0)
    assert first_two(math.nan, math.nan)


def test_the_kernel_and_whether_it_trains_are_part_of_what_is_equal() -> None:
    (site,) = find(functional(export_model(Stack(PLAIN), INPUTS)).module.graph).sites
    again, repeats = replace(site), Repeats()
    assert repeats.first(site, "kreg.a", True) is site and repeats.first(again, "kreg.a", True) is site
    assert repeats.first(again, "kreg.b", True) is again and repeats.first(again, "kreg.a", False) is again


def test_a_shared_outcome_is_what_a_run_of_its_own_would_have_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: the random inputs come from the same seed."""
    forms = [PLAIN, replace(PLAIN, bias=1.0), PLAIN, replace(PLAIN, heads=4), replace(PLAIN, bias=1.0)]
    shared = sites_of(*forms)
    monkeypatch.setattr(pipeline.Repeats, "first", lambda self, site, *context: site)
    alone = sites_of(*forms)
    assert [site.verified_at for site in alone] == [site.id for site in alone]
    assert [site.verify for site in shared] == [site.verify for site in alone]
    assert [site.reason for site in shared] == [site.reason for site in alone]


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., bool]], str]:
    """A kernel that is wrong where told, so dear that it is chosen only when enabled."""
    monkeypatch.setattr(catalogue(), "_contents", catalogue()._contents)  # put back afterwards

    def made(is_wrong: Callable[..., bool]) -> str:
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            wrong = is_wrong(**kwargs)
            return tuple(result + 1 if wrong else result for result in ATTENTION.reference(*args, **kwargs))

        fields: dict[str, Any] = {"devices": ["cpu"], "dtypes": ["float32"], "trains": True}
        kreg.kernel(op="attention", name="tests.wrong", cost={"overhead_us": 1e6}, **fields)(run)
        return "tests.wrong"

    return made


def test_a_kernel_that_is_wrong_for_one_kind_of_layer_is_kept_out_of_all_of_that_kind(
    wrong_kernel: Callable[[Callable[..., bool]], str],
) -> None:
    name = wrong_kernel(lambda *, scale, **rest: scale == 0.125)
    other = replace(PLAIN, scale=0.125)
    torch.manual_seed(0)
    stack = Stack(PLAIN, other, PLAIN, other)
    sites = analyse(stack, INPUTS, device="cpu", enable=[name]).sites
    assert [site.kernel for site in sites] == [name, None, name, None]
    assert [site.verify.passed for site in sites if site.verify] == [True, False, True, False]
    assert all("failed verification" in site.reason for site in sites[1::2])


def test_symbolic_sizes_are_compared_as_expressions() -> None:
    torch.manual_seed(0)
    sites = analyse(Stack(PLAIN, PLAIN), INPUTS, device="cpu", dynamic_shapes="auto").sites
    assert any(isinstance(size, str) for size in sites[0].dims.values())
    assert [site.verified_at for site in sites] == [sites[0].id] * 2


def test_without_verification_nothing_says_that_there_was_one() -> None:
    report = analyse(Stack(PLAIN, PLAIN), INPUTS, device="cpu", verify=False)
    assert [(site.verify, site.verified_at) for site in report.sites] == [(None, None)] * 2


def test_only_the_first_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    verify = pipeline.verification.verify

    def counted(module: Any, site: Site, *rest: Any, **options: Any) -> Any:
        ran.append(site.id)
        return verify(module, site, *rest, **options)

    monkeypatch.setattr(pipeline.verification, "verify", counted)
    report = pipeline.rewrite_graph(
        functional(export_model(Stack(*[PLAIN] * 5), INPUTS)).module,
        settings_for("cpu", None),
        model="stack",
        frontend="export",
        clock=pipeline.Clock(),
    ).report
    assert len(report.sites) == 5 and ran == [report.sites[0].id]


def test_a_site_that_cannot_be_described_stands_for_itself() -> None:
    (site,) = find(functional(export_model(Stack(PLAIN), INPUTS)).module.graph).sites
    strange, repeats = replace(site, attributes={**site.attributes, "scale": object()}), Repeats()
    again = replace(strange)
    assert repeats.first(strange) is strange and repeats.first(again) is again


class Distant(nn.Module):
    """Attention with a bias that every layer computes anew."""

    def __init__(self, scale: float = 0.125) -> None:
        super().__init__()
        self.qkv, self.scale = nn.Linear(32, 96), scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        place = torch.arange(x.shape[1], device=x.device)
        bias = (place[None] - place[:, None]).abs().to(x.dtype) * -0.5
        out: Tensor = (q @ k.transpose(-1, -2) * self.scale + bias).softmax(-1) @ v
        return out


def run_at_distant(*layers: Distant) -> list[int]:
    """As `run_at`."""
    sites = analyse(nn.Sequential(*layers), INPUTS, device="cpu").sites
    assert all(site.status == "replaced" for site in sites)
    ids = [site.id for site in sites]
    return [ids.index(site.verified_at or "") for site in sites]


def test_layers_that_compute_the_same_tensor_again_are_the_same_code() -> None:
    assert run_at_distant(Distant(), Distant(), Distant()) == [0, 0, 0]


def test_what_is_computed_again_tells_no_two_layers_apart_nor_makes_others_equal() -> None:
    assert run_at_distant(Distant(), Distant(0.25), Distant(), Distant(0.25)) == [0, 1, 0, 1]


def test_masks_that_are_proven_otherwise_are_two_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a mask reads on above the operands, where two sites of the same code may differ."""
    right = pipeline.mask_check.check

    def check(module: Any, site: Site) -> Any:
        found = right(module, site)
        return replace(found, passed=False, reason="the mask is wrong") if site.module == "layers.1" else found

    monkeypatch.setattr(pipeline.mask_check, "check", check)
    sites = sites_of(PLAIN, PLAIN, PLAIN)
    assert [site.status for site in sites] == ["replaced", "kept", "replaced"]
    assert sites[1].reason == "the mask is wrong" and sites[2].verified_at == sites[0].id
