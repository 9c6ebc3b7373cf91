"""Attention as people write it: found, proven, replaced and equal; what only looks like it is left alone."""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import kreg
from kreg.registry.calls import bind
from kreg.rewriters.facts import op_nodes
from kreg.rewriters.report import Report, SiteReport
from tests.handwritten import models
from tests.handwritten.case import KINDS, Case, dynamic_shapes
from tests.models import randomized

CASES: dict[str, Case] = {
    f"{file.name}: {case.name}": case
    for file in pkgutil.iter_modules(models.__path__)
    for case in importlib.import_module(f"{models.__name__}.{file.name}").CASES
}
FOUND = [name for name, case in CASES.items() if case.sites]
LEFT = [name for name, case in CASES.items() if not case.sites]
RESIZABLE = [
    # Capture takes five times as long with dynamic shapes: a variety for every day, the rest in the full sweep.
    pytest.param(name, marks=() if name.startswith(("gpt:", "llama:", "masked:", "fused:")) else pytest.mark.slow)
    for name in FOUND
    if CASES[name].resized
]


@dataclass(frozen=True, repr=False)
class Exported:
    """A model and what kreg made of it."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    program: ExportedProgram
    report: Report

    @property
    def sites(self) -> list[SiteReport]:
        return [site for site in self.report.sites if site.op in ("attention", "sparse_attention")]

    def why(self) -> str:
        """What to read when a claim fails."""
        kept = [f"{site.id}: {site.reason}" for site in self.report.sites if site.status == "kept"]
        return "\n".join(kept + [f"{miss.node}: {miss.reason}" for miss in self.report.near_misses])


def built(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with weights that are neither zero nor one anywhere; buffers as they are."""
    torch.manual_seed(0)
    return randomized(case.build(), seed=1).to(dtype).train(case.training)


def cast(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)


@functools.cache
def exported(name: str, dynamic: bool = False, dtype: torch.dtype = torch.float32) -> Exported:
    """One export for all claims about a model."""
    case = CASES[name]
    model, inputs = built(case, dtype), cast(case.draw(case.sizes, seed=0), dtype)
    shapes = None
    if dynamic:
        assert case.resized is not None
        shapes = dynamic_shapes(model, inputs, case.draw(case.resized, seed=0))
    program = kreg.export(model, inputs, dynamic_shapes=shapes, verify=not dynamic)
    report = kreg.program_report(program) or kreg.analyse(model, inputs, dynamic_shapes=shapes, verify=not dynamic)
    return Exported(model, inputs, program, report)


def results(run: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of the inputs and of the parameters by name."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    wanted = {f"input {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    wanted |= {f"parameter {n}": p for n, p in run.named_parameters()}
    outputs = run(*leaves)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    loss = torch.zeros(())
    for i, out in enumerate(outputs):
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out.dtype)
        loss = loss + (out * weights).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return found | {name: g for name, g in zip(wanted, grads, strict=True) if g is not None and g.any()}


def assert_same(model: nn.Module, program: ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> None:
    """Equal outputs and gradients, to float32's rounding at the size of each tensor's largest element."""
    want, got = results(model, inputs), results(program.module(), inputs)
    assert want.keys() == got.keys()
    for name in want:
        close = 1e-5 * max(1.0, want[name].nan_to_num().abs().max().item())
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-4, atol=close, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_found(case: Case, done: Exported) -> None:
    """All sites and nothing else, replaced."""
    assert len(done.sites) == case.sites, done.why()
    for site in done.sites:
        assert site.status == "replaced", done.why()
        known = {dim: size for dim, size in site.dims.items() if isinstance(size, int)}
        assert {dim: known.get(dim, size) for dim, size in case.dims.items()} == case.dims
    assert not done.report.near_misses, done.why()


def assert_masks(case: Case, done: Exported) -> None:
    """The kinds, the facts, and the arguments of the op."""
    assert len(done.sites) == case.sites, done.why()
    for site, truth in zip(done.sites, case.masks, strict=True):
        assert site.mask is not None and site.mask["kind"] in KINDS[truth], (site.mask, done.why())
        assert {fact: site.mask[fact] for fact in case.facts} == case.facts
    for node, op in op_nodes(done.program.graph):
        given = bind(op, node.args, node.kwargs)
        for name, value in case.attributes.items():
            assert given[name] == pytest.approx(value), name


def skip_if_left_alone(case: Case, done: Exported) -> None:
    """For the few forms that may be either; that they are equal is claimed of them all the same."""
    if case.either and not any(site.status == "replaced" for site in done.sites):
        assert not list(op_nodes(done.program.graph))
        pytest.skip(f"left alone: {done.why() or 'not an anchor'}")


@pytest.mark.parametrize("name", FOUND)
def test_every_attention_is_found_verified_and_replaced(name: str) -> None:
    case, done = CASES[name], exported(name)
    skip_if_left_alone(case, done)
    assert_found(case, done)
    for site in done.sites:
        assert site.verify is not None and site.verify.passed
        assert site.trainable or not list(done.model.parameters())
        assert site.verify.max_grad_error is not None or not site.trainable


@pytest.mark.parametrize("name", FOUND)
def test_its_mask_is_what_it_is(name: str) -> None:
    case, done = CASES[name], exported(name)
    skip_if_left_alone(case, done)
    assert_masks(case, done)


@pytest.mark.parametrize("name", FOUND)
def test_the_program_equals_the_model_on_inputs_seen_and_unseen(name: str) -> None:
    case, done = CASES[name], exported(name)
    assert_same(done.model, done.program, done.inputs)
    assert_same(done.model, done.program, case.draw(case.sizes, seed=1))


@pytest.mark.parametrize("name", RESIZABLE)
def test_with_dynamic_shapes_the_same_holds_at_other_sizes(name: str) -> None:
    case, done = CASES[name], exported(name, dynamic=True)
    assert case.resized is not None
    assert_same(done.model, done.program, case.draw(case.resized, seed=2))
    skip_if_left_alone(case, done)
    assert_found(case, done)
    assert_masks(case, done)


@pytest.mark.parametrize("name", [name for name in FOUND if CASES[name].bfloat16])
def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_model(name: str) -> None:
    case, done = CASES[name], exported(name, dtype=torch.bfloat16)
    assert_found(case, done)
    truth = results(copy.deepcopy(done.model).float(), cast(done.inputs, torch.float32))
    want = results(done.model, done.inputs)
    got = results(done.program.module(), done.inputs)
    rounding = torch.finfo(torch.bfloat16).eps * max(exact.abs().max() for exact in truth.values())
    for key, exact in truth.items():
        model, program = ((r[key].float() - exact).abs().max() for r in (want, got))
        assert program <= 2 * model + rounding, key


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_attention_is_left_alone_with_a_reason(name: str) -> None:
    case, done = CASES[name], exported(name)
    assert not list(op_nodes(done.program.graph))
    reasons = [miss.reason for miss in done.report.near_misses] + [site.reason for site in done.sites]
    if case.reason is not None:
        assert reasons and all(case.reason in reason for reason in reasons), reasons
    assert not any("rule itself failed" in reason for reason in reasons), reasons
    for inputs in (done.inputs, case.draw(case.sizes, seed=1)):
        found = []
        for run in (done.model, done.program.module()):
            torch.manual_seed(0)  # for dropout that is on
            found.append(results(run, inputs))
        assert found[0].keys() == found[1].keys()
        for key in found[0]:
            torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-6, atol=1e-6, equal_nan=True)
