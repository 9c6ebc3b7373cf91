"""Masks are proven, whatever their kind, form and spelling; what depends on data is passed on."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import kreg
from kreg.registry.calls import bind
from kreg.registry.ops.attention import band
from kreg.rewriters.facts import op_nodes
from kreg.rewriters.report import SiteReport
from tests.handwritten.case import KINDS as NAMES
from tests.handwritten.case import Sizes, dynamic_shapes, heads
from tests.handwritten.masks import CAUSAL_ADDED, CAUSAL_BY_VALUE, CAUSAL_KEPT, FORMS, HARD, KINDS, Kind, Plain, Written
from tests.handwritten.test_handwritten import assert_same

SIZES, RESIZED = Sizes(2, 12, 7), Sizes(3, 15, 9)
SAMPLED_FORMS = ("where -inf", "added min")
SAMPLED_KINDS = ("full", "causal", "sliding", "chunked", "padding", "causal and padding")
"""Each kind is tried in one hard form and one soft form, each form on a few kinds; the whole product is slow."""

WRITINGS = CAUSAL_KEPT | CAUSAL_ADDED | CAUSAL_BY_VALUE
ARGUMENTS = ("full", "causal", "sliding", "chunked", "prefix")
"""Kinds that the op has arguments for: nothing of them is left in a tensor."""


def drawn(kind: Kind, sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
    """Queries, keys, values, and what the mask is made from."""
    of = "memory" if kind.memory else "length"
    generator = torch.Generator().manual_seed(seed)
    makers = (heads(2, 8), heads(2, 8, of), heads(2, 8, of), *kind.data)
    return tuple(make(sizes, generator) for make in makers)


def site_of(program: ExportedProgram) -> SiteReport:
    """The one site of a program, replaced."""
    report = kreg.program_report(program)
    assert report is not None, "nothing was replaced"
    (site,) = report.sites
    assert site.status == "replaced", site.reason
    return site


def assert_claim(program: ExportedProgram, keep: Tensor, pure: bool) -> None:
    """What the op is told never hides what the mask keeps, and is the mask where no tensor says the rest."""
    told = inspect.signature(band).parameters
    for node, op in op_nodes(program.graph):
        given = bind(op, node.args, node.kwargs)
        tensors = [name for name in op.tensors if name not in ("q", "k", "v") and given.get(name) is not None]
        flags = {name: value for name, value in given.items() if name in told}
        claimed = band(*keep.shape[-2:], **flags, device=keep.device)
        claimed = torch.ones_like(keep) if claimed is None else claimed
        assert not (keep & ~claimed).any(), "a key is hidden that the mask keeps"
        assert not pure or not tensors, "a proven mask is passed on as a tensor"
        assert tensors or torch.equal(claimed.expand_as(keep), keep)


def exported(module: nn.Module, inputs: tuple[Tensor, ...], resized: tuple[Tensor, ...] | None) -> ExportedProgram:
    shapes = None if resized is None else dynamic_shapes(module, inputs, resized)
    return kreg.export(module, inputs, dynamic_shapes=shapes, verify=resized is None)


def check(name: str, form: str, dynamic: bool) -> None:
    kind = KINDS[name]
    module = Plain(kind, FORMS[form])
    inputs, resized = drawn(kind, SIZES, seed=0), drawn(kind, RESIZED, seed=1)
    program = exported(module, inputs, resized if dynamic else None)
    if form == "multiplied and added" and kind.data:
        # The scores of masked keys are one number: a query without keys gives what no argument says.
        assert not list(op_nodes(program.graph)) and kreg.analyse(module, inputs).near_misses
        return
    site = site_of(program)
    truth = kind.truth if form in HARD else kind.soft or kind.truth
    assert site.mask is not None and site.mask["kind"] in NAMES[truth], site.mask
    if site.mask["kind"] != "input":
        assert {fact: site.mask.get(fact) for fact in kind.facts} == kind.facts
    if not dynamic:
        assert site.verify is not None and site.verify.passed
        n, past = SIZES.length, SIZES.memory if kind.memory else 0
        keep = kind.keep(torch.arange(past, past + n)[:, None], torch.arange(past + n), *inputs[3:])
        assert_claim(program, keep.expand(*keep.shape[:-2], n, past + n), truth in ARGUMENTS)
    assert_same(module, program, inputs)
    assert_same(module, program, resized if dynamic else drawn(kind, SIZES, seed=2))


PRODUCT = [
    pytest.param(name, form, marks=() if name in SAMPLED_KINDS or form in SAMPLED_FORMS else pytest.mark.slow)
    for name in KINDS
    for form in FORMS
]


@pytest.mark.parametrize(("name", "form"), PRODUCT)
def test_a_mask_of_any_kind_is_proven_in_any_form(name: str, form: str) -> None:
    check(name, form, dynamic=False)


@pytest.mark.parametrize("form", SAMPLED_FORMS)
@pytest.mark.parametrize("name", [pytest.param(k, marks=() if k in SAMPLED_KINDS else pytest.mark.slow) for k in KINDS])
def test_a_mask_of_any_kind_is_proven_for_all_sizes(name: str, form: str) -> None:
    check(name, form, dynamic=True)


NOT_READ = frozenset(
    {
        *("triu minus one", "counted", "by linspace", "written into"),
    }
)
"""Writings that index notation has no words for: they are right, as the tensors that they are."""


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static"), pytest.param(True, id="dynamic", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", WRITINGS)
def test_a_causal_mask_is_causal_however_it_is_written(name: str, dynamic: bool) -> None:
    module = Written(WRITINGS[name])
    kind = KINDS["causal"]
    inputs, resized = drawn(kind, SIZES, seed=0), drawn(kind, RESIZED, seed=1)
    program = exported(module, inputs, resized if dynamic else None)
    site = site_of(program)
    truth = "stored causal" if name in CAUSAL_BY_VALUE or name in NOT_READ else "causal"
    assert site.mask is not None and site.mask["kind"] in NAMES[truth], site.mask
    if not dynamic:
        assert_claim(program, torch.ones(12, 12, dtype=torch.bool).tril(), pure=truth == "causal")
    assert_same(module, program, resized if dynamic else inputs)
