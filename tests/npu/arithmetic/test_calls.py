"""Every kernel for Ascend on fake NPU tensors, and called as a graph calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kreg.kernels.attention import npu_varlen
from kreg.registry import library
from kreg.registry.calls import fallbacks, judged, recompute, results
from kreg.registry.environment import Environment, EveryPackage, availability
from kreg.registry.spec import KernelSpec

from .calls import indexer, sparse
from .judge import OPS, SPECS, bound, largest, samples, takes

BF16 = torch.bfloat16


def calls_of(spec: KernelSpec) -> list[dict[str, Any]]:
    """Calls in bfloat16 that the spec takes: the op's samples, and those of the sizes that some kernels ask for."""
    large: list[dict[str, Any]] = []
    if spec.op == "sparse_attention" and not list(samples(spec, BF16)):
        large = [sparse(9, dtype=BF16), sparse(12, 4, selected=3, dtype=BF16, batch=2), sparse(128, 128, dtype=BF16)]
    if spec.op == "lightning_indexer":
        large = [indexer(9, 9, 4, dtype=BF16), indexer(20, 5, 3, 4, dtype=BF16), indexer(4, 9, 3, 0, dtype=BF16)]
        large.append(indexer(2, 2048, 2048, heads=64, offset=2046, dtype=BF16, scored=True))
    return [*samples(spec, BF16), *(call for call in large if takes(spec, call))]


def on_npu(arguments: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """The same arguments as fake tensors on the NPU, with the same strides."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu")

    return {name: fake(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def described(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.stride(), x.device.type


def a_document_a_row(documents: torch.Tensor) -> list[int]:
    """What `npu_varlen.ends` could give for tensors that hold no documents."""
    return [(row + 1) * documents.shape[1] for row in range(documents.shape[0])]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_on_fake_npu_tensors_it_gives_what_the_ops_shape_rule_says(
    spec: KernelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu_varlen, "ends", a_document_a_row)
    op, calls = OPS[spec.op], calls_of(spec)
    assert calls
    fallbacks.clear()
    for arguments in calls:
        mode = FakeTensorMode()
        there = bound(op, on_npu(arguments, mode))
        with mode, torch.no_grad():
            got = results(spec.entry_point()(**there))
            want = results(op.fake(**there))
            assert [described(x) for x in got] == [described(x) for x in want]
            names = [name for name in op.differentiable if there[name] is not None]
            grads = tuple(torch.empty_like(x) if x.is_floating_point() else None for x in got)
            run = spec.backward_point() or recompute(spec.entry_point())
            found = run(grads, got, frozenset(names), **there)
            assert set(found) == set(names)
            assert all(found[n].shape == there[n].shape and found[n].device.type == "npu" for n in names)
    assert not fallbacks


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_operator_in_a_graph_runs_it_forward_and_backward(spec: KernelSpec) -> None:
    op = OPS[spec.op]
    operator = library.overload(op)
    fallbacks.clear()
    for arguments in calls_of(spec):
        if arguments.get("ratio") == 128:
            continue  # nothing new, and large
        names = [name for name in op.differentiable if arguments.get(name) is not None]
        leaves = {name: arguments[name].clone().requires_grad_() for name in names}
        results = {}
        for kernel in (f"{spec.name}?", ""):
            with judged():
                out = operator(**(arguments | leaves), kernel=kernel)
            out = out if isinstance(out, torch.Tensor) else out[0]
            if not out.is_floating_point():
                break
            results[kernel] = [out, *torch.autograd.grad(out.float().sum(), list(leaves.values()), allow_unused=True)]
        for mine, reference in zip(*results.values(), strict=True) if len(results) == 2 else ():
            known = ~reference.isnan()
            assert torch.equal(known, ~mine.isnan())
            error = largest((mine.float() - reference.float())[known])
            assert op.tolerances[BF16].accepts(error, 2 * largest(reference[known]))
    assert not fallbacks


class ByTorchNpusRule(TorchDispatchMode):
    """Holds each operator of torch_npu, as it is computed here, against torch_npu's own rule for its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "npu":
            self.seen.add(func._schema.name.removeprefix("npu::"))
            there = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs or {}))
            for mine, rule in zip(found, func(*there[0], **there[1]), strict=True):
                if isinstance(rule, torch.Tensor):
                    assert (mine.shape, mine.dtype) == (rule.shape, rule.dtype), func
        return found


def test_what_is_computed_here_for_each_operator_has_the_shapes_of_torch_npus_own_rule() -> None:
    with ByTorchNpusRule() as rule, torch.no_grad():
        for spec in SPECS.values():
            op = OPS[spec.op]
            for arguments in calls_of(spec)[-8:] if spec.provider == "torch_npu" else ():
                there = bound(op, arguments)
                got = results(spec.entry_point()(**there))
                grads = tuple(torch.ones_like(x) if x.is_floating_point() else None for x in got)
                names = frozenset(name for name in op.differentiable if there[name] is not None)
                backward = spec.backward_point()
                assert backward is not None
                backward(grads, got, names, **there)
    assert rule.seen == {
        "npu_fusion_attention",
        "npu_fusion_attention_grad",
        "npu_sparse_flash_attention",
        "npu_sparse_flash_attention_grad",
        "npu_lightning_indexer",
        "npu_lightning_indexer_grad",
        "npu_grouped_matmul",
        "npu_grouped_matmul_add",
    }


def test_every_kernel_is_for_the_boards_that_its_operator_is_documented_for() -> None:
    for name, spec in SPECS.items():
        assert spec.devices == ("npu",) and spec.trains
        for board in ("Ascend910B1", "Ascend910B4-1", "Ascend910B2C", "Ascend910_9391"):
            assert not availability(spec, Environment("npu", board, packages=EveryPackage())), name
        for board in ("Ascend910A", "Ascend910B", "Ascend910ProB", "Ascend310P3"):
            assert availability(spec, Environment("npu", board, packages=EveryPackage())), name
