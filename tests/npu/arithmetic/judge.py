"""A kernel's results and gradients against the op's reference in float64, and its declaration read from YAML."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kreg.kernels
from kreg.registry.calls import call_facts, facts_names, recompute, results
from kreg.registry.constraints import Constraint
from kreg.registry.op import Op
from kreg.registry.ops import BUILTIN_OPS
from kreg.registry.ops.lightning_indexer import all_scores
from kreg.registry.ops.to_come import OPS_TO_COME
from kreg.registry.spec import KernelSpec

from .meaning import registered

pytest.importorskip("torch_npu", reason="torch_npu cannot be imported here", exc_type=ImportError)
mindspeed = importlib.import_module("mindspeed.readings")
"""The stand-in's readings; it is on the path where torch_npu is."""
registered()

OPS = {op.name: op for op in BUILTIN_OPS}
SPECS = {
    spec.name: spec
    for path in sorted(Path(kreg.kernels.__file__).parent.glob("*/npu.yaml"))
    for spec in (KernelSpec.read(fields, path.name) for fields in yaml.safe_load(path.read_text()))
    if spec.op not in OPS_TO_COME
}
WITHOUT_LSE = ("mindspeed.sas",)
"""Kernels that keep the lse for themselves, and give NaN."""

Outputs = tuple[torch.Tensor, ...]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bound(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every argument of a call, as the library passes them."""
    return dict.fromkeys(op.optional) | dict(op.defaults) | arguments


def takes(spec: KernelSpec, arguments: dict[str, Any]) -> bool:
    """Whether the spec's constraints hold for these arguments."""
    op = OPS[spec.op]
    facts, names = call_facts(op, bound(op, arguments)), facts_names(op)
    return all(Constraint.parse(text, names).holds(facts) for text in spec.constraints)


def samples(spec: KernelSpec, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The op's own samples that the spec takes."""
    for arguments in OPS[spec.op].samples(dtype, generator()):
        if takes(spec, arguments):
            yield arguments


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger tensor with its dimensions reversed."""
    wide = x.new_zeros(*(2 * n for n in reversed(x.shape)))
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    return view.copy_(x)


def largest(x: torch.Tensor) -> float:
    """Largest finite absolute value."""
    x = x.detach().abs().double()
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def exact(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, the differentiable ones as leaves."""
    return {
        name: value.detach().double().requires_grad_(name in op.differentiable)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def gradients(
    spec: KernelSpec, op: Op, grads: Outputs, got: Outputs, names: list[str], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """By the kernel's own backward; without one, as the library does it."""
    run = spec.backward_point() or recompute(spec.entry_point())
    return dict(run(grads, got, frozenset(names), **bound(op, arguments)))


def check(spec: KernelSpec, arguments: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    """Results, strides and gradients of one call. Raises AssertionError, or what the kernel raises."""
    op = OPS[spec.op]
    first = arguments[next(iter(op.tensors))]
    tolerance, want_at = op.tolerances[dtype or first.dtype], exact(op, arguments)
    want = op.reference(**want_at)
    with torch.no_grad():
        got = results(spec.entry_point()(**bound(op, arguments)))
        for mine, fake in zip(got, results(op.fake(**arguments)), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
    plain = tuple(x.detach() for x in want)
    if op.name == "lightning_indexer":
        judge_picks(op, arguments, want_at, got, plain, tolerance)
        if not arguments.get("scored"):
            return
        scores = all_scores(want_at["q"], want_at["k"], want_at["weights"], want_at["scale"])
        place, output = 1, scores.gather(-1, got[0].clamp(min=0))
        keep = got[1].isfinite()
    else:
        place, output, keep = 0, want[0], torch.ones_like(want[0], dtype=torch.bool)
        error, size = op.error(arguments, got, plain), largest(plain[0])
        assert tolerance.accepts(error, size), f"off by {error} of {size}"
        judge_lse(spec, got, plain, tolerance)
    grad = torch.randn(output.shape, dtype=torch.float64).to(got[place].dtype).masked_fill(~keep, 0.0)
    names = [name for name in op.differentiable if arguments.get(name) is not None]
    (output.masked_fill(~keep, 0.0) * grad.double()).sum().backward()
    grads = tuple(strided(grad) if i == place else None for i in range(len(got)))  # of any strides, as autograd's are
    found = gradients(spec, op, grads, got, names, arguments)
    assert set(found) == set(names)
    for name in names:
        expected = want_at[name].grad
        mine = found[name].to(arguments[name].dtype)
        assert mine.shape == arguments[name].shape
        assert torch.equal(mine.isnan(), expected.isnan()), f"gradient of {name} is NaN elsewhere"
        error, size = largest((mine.double() - expected).nan_to_num(nan=0.0)), largest(expected)
        assert tolerance.accepts(error, size), f"gradient of {name} is off by {error} of {size}"


def judge_lse(spec: KernelSpec, got: Outputs, want: Outputs, tolerance: Any) -> None:
    """The second result, where there is one."""
    if len(got) < 2:
        return
    if spec.name in WITHOUT_LSE:
        assert got[1].isnan().all()
        return
    assert torch.equal(got[1].isneginf(), want[1].isneginf())
    difference = (got[1].double() - want[1]).nan_to_num(nan=0.0)
    assert tolerance.accepts(largest(difference), largest(want[1]))


def judge_picks(
    op: Op, arguments: dict[str, Any], want_at: dict[str, Any], got: Outputs, want: Outputs, tolerance: Any
) -> None:
    """An indexer's two results."""
    scores = all_scores(*(want_at[name].detach() for name in ("q", "k", "weights")), want_at["scale"])
    assert tolerance.accepts(op.error(arguments, got, want), 1.0)
    if arguments.get("scored"):
        assert torch.equal(got[1].isneginf().sum(-1), want[1].isneginf().sum(-1))
        picked = scores.gather(-1, got[0].clamp(min=0)).masked_fill(got[1].isneginf(), 0.0)
        error = largest(picked - got[1].double().masked_fill(got[1].isneginf(), 0.0))
        assert tolerance.accepts(error, largest(scores)), f"scores are off by {error}"
