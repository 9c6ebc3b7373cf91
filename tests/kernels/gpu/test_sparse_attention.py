"""The Triton kernels of ``sparse_attention`` against its reference in float64: on a GPU, or interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kreg.kernels.gpu import Config, record
from kreg.kernels.sparse_attention import triton as kernels
from kreg.kernels.sparse_attention import triton_call, triton_gradients
from kreg.registry.ops import SPARSE_ATTENTION as OP
from kreg.registry.ops.sparse_attention import random_indices

BACKWARDS = {"atomic": kernels.backward, "in order": kernels.backward_in_order}
SAMPLES = 14


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On inputs this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def small_blocks(fused: bool = True) -> Iterator[None]:
    """Blocks of 16 rows and keys, softmaxes and gradients in parts, few queries at a time."""
    rows = {"BLOCK_M": 16, "BLOCK_N": 16, "UNCHAIN": False}
    metas: dict[str, dict[str, Any]] = {
        "forward_kernel": rows,
        "query_kernel": rows | {"FUSED": fused},
        "key_kernel": rows,
        "combine_kernel": {"BLOCK_R": 4, "BLOCK_C": 16},
        "delta_kernel": {"BLOCK_M": 4},
        "segment_kernel": {"BLOCK_P": 2, "BLOCK_C": 16},
    }

    def pick(kernel: str, *args: Any, **facts: Any) -> Config:
        return Config(metas[kernel], 4, 1)

    with ExitStack() as stack:
        stack.enter_context(patch.object(kernels.TABLE, "pick", pick))
        stack.enter_context(patch.object(triton_call, "INTERPRETED_PROCESSORS", 12))
        stack.enter_context(patch.object(triton_gradients, "PAIR_BYTES", 1 << 12))
        yield


def largest(x: torch.Tensor) -> float:
    """Largest absolute value; 0 of nothing."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on a device."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def check(device: str, arguments: dict[str, Any], way: str | None = "atomic", through_lse: bool = False) -> None:
    """Compare outputs and, unless ``way`` is None, all gradients with the reference's in float64."""
    arguments = on(device, arguments)
    tolerance = OP.tolerances[arguments["q"].dtype]
    names = [name for name in OP.differentiable if arguments.get(name) is not None]
    exact = {
        n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in arguments.items()
    }
    exact |= {name: exact[name].detach().requires_grad_() for name in names}
    want, want_lse = OP.reference(**exact)
    got = kernels.forward(**arguments)
    for mine, fake in zip(got, OP.fake(**arguments), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
    assert tolerance.accepts(largest(got[0].double() - want), largest(want))
    empty = want_lse.isneginf()
    assert torch.equal(got[1].isneginf(), empty)
    want_lse = want_lse.masked_fill(empty, 0.0)
    assert tolerance.accepts(largest(got[1].double().masked_fill(empty, 0.0) - want_lse), largest(want_lse))
    if way is None:
        return
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(arguments["q"].dtype).to(device)
    grad_lse = torch.randn(empty.shape, generator=generator).to(device) if through_lse else None
    loss = (want * grad.double()).sum()
    if grad_lse is not None:
        loss = loss + (want_lse * grad_lse.double()).sum()
    # The backward starts from the output as it was saved. What rounding changed in it passes on as through lse: the
    # scores' gradient is p * (grad @ k - rowsum(grad * out)), and that of lse is p.
    rounded = (grad.double() * (got[0].double() - want.detach())).sum(-1)
    (loss - (want_lse * rounded).sum()).backward()
    found = BACKWARDS[way]((grad, grad_lse), got, frozenset(names), **arguments)
    assert set(found) == set(names)
    for name in names:
        expected = exact[name].grad
        assert (found[name].shape, found[name].dtype) == (arguments[name].shape, arguments[name].dtype)
        error = largest(found[name].double() - expected)
        rounding = cancelled(exact, grad) if name == "q" else 0.0
        accepted = tolerance.accepts(error - rounding, largest(expected))
        assert accepted, f"gradient of {name} is off by {error}"


def cancelled(exact: dict[str, Any], grad: torch.Tensor) -> float:
    """What float32 leaves of a gradient of q that is none: where a query sees a single key, it is the difference of the
    gradient's products with that key and with the output, which is that key.
    """
    keys = torch.cat([x.detach() for x in (exact["kv"], exact.get("compressed")) if x is not None], dim=1)
    products = largest(grad.double() @ keys.unsqueeze(1).transpose(-1, -2)) * largest(keys)
    return 4 * torch.finfo(torch.float32).eps * abs(float(exact["scale"])) * products


def samples(dtype: torch.dtype) -> list[dict[str, Any]]:
    """The op's samples; of the queries, some at the end: each tile of them is a program, and where entries are
    selected each query is."""
    found = list(OP.samples(dtype, torch.Generator().manual_seed(0)))
    for call in found:
        most = 5 if call.get("indices") is not None else 12
        if call["q"].shape[2] > most:
            call["q"], call["offset"] = call["q"][:, :, -most:], call["kv"].shape[1] - most
            if "indices" in call:
                call["indices"] = call["indices"][:, -most:]
    return found


def test_no_sample_is_left_out() -> None:
    assert len(samples(torch.float32)) == SAMPLES


@pytest.mark.parametrize("number", range(SAMPLES))
def test_outputs_and_gradients_are_the_references_on_every_sample(number: int, device: str) -> None:
    check(device, samples((torch.bfloat16, torch.float16)[number % 2])[number])


@pytest.mark.parametrize("number", range(SAMPLES))
def test_many_small_blocks_and_parts_give_the_same(number: int, device: str) -> None:
    with small_blocks(fused=number % 2 == 0):
        check(device, samples(torch.float32)[number], "in order", through_lse=True)


def made(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def call_of(heads: int, dim: int, queries: int, selected: int | None, **rest: Any) -> dict[str, Any]:
    """Some queries at the end of 40 keys and 10 entries."""
    g = torch.Generator().manual_seed(0)
    make = partial(made, g, dtype=rest.pop("dtype", torch.float32))
    call = {"q": make(1, heads, queries, dim), "kv": make(1, 40, dim), "compressed": make(1, 10, dim)}
    call |= {"sinks": make(heads), "scale": dim**-0.5, "window": 18, "ratio": 4, "offset": 40 - queries}
    if selected is not None:
        call["indices"] = random_indices((1, queries, selected), torch.int64, g, call)
    return call | rest


@pytest.mark.parametrize("heads", [1, 8, 12, 40, 128])
def test_any_number_of_heads(heads: int, device: str) -> None:
    check(device, call_of(heads, 16, 2, 9))
    check(device, call_of(heads, 16, 2, None))


@pytest.mark.parametrize("dim", [1, 40, 192, 320])
def test_any_number_of_channels(dim: int, device: str) -> None:
    check(device, call_of(3, dim, 2, 9), "in order")
    check(device, call_of(3, dim, 2, None))


def test_the_sizes_of_deepseek_v4(device: str) -> None:
    check(device, call_of(64, 512, 1, 9, window=128, dtype=torch.bfloat16))


@pytest.mark.parametrize("selected", [9, None])
def test_the_widest_heads_in_float32(selected: int | None, device: str) -> None:
    check(device, call_of(18, 512, 2, selected), "in order", through_lse=True)


@pytest.mark.parametrize("queries", [0, 1])
@pytest.mark.parametrize("selected", [None, 0, 1])
def test_no_query_and_one(queries: int, selected: int | None, device: str) -> None:
    check(device, call_of(2, 16, queries, selected))


@pytest.mark.parametrize("sinks", [None, float("-inf")])
def test_a_query_that_sees_nothing_gives_zero(sinks: float | None, device: str) -> None:
    sink = None if sinks is None else torch.full((2,), sinks)
    nothing = torch.zeros(1, 40, dtype=torch.bool)
    check(device, call_of(2, 16, 3, 4, indices=torch.full((1, 3, 4), -1), sinks=sink, padding=nothing), way=None)
    call = on(device, call_of(2, 16, 3, 4, indices=torch.full((1, 3, 4), -1), sinks=sink, padding=nothing))
    got = kernels.forward(**call)
    assert not got[0].any() and got[1].isneginf().all()
    names = frozenset(n for n in OP.differentiable if call[n] is not None)
    found = kernels.backward((torch.ones_like(got[0]), None), got, names, **call)
    assert all(not x.any() for x in found.values())


def test_keys_are_none_before_the_first_position(device: str) -> None:
    check(device, call_of(2, 16, 5, None, offset=-3))
    check(device, call_of(2, 16, 5, 6, offset=-3))


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger tensor with its dimensions reversed."""
    wide = x.new_zeros(*(2 * n for n in reversed(x.shape)))
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@pytest.mark.parametrize("number", [3, 6, 11])
def test_inputs_may_have_any_strides(number: int, device: str) -> None:
    call = samples(torch.float32)[number]
    check(device, call | {name: strided(x) for name, x in call.items() if isinstance(x, torch.Tensor)})


def test_a_broadcast_gradient_is_taken_as_it_is(device: str) -> None:
    call = on(device, samples(torch.float32)[3])
    got = kernels.forward(**call)
    needs = frozenset(("q", "kv", "compressed"))
    wide = kernels.backward((torch.ones((), device=device).expand(got[0].shape), None), got, needs, **call)
    dense = kernels.backward((torch.ones_like(got[0]), None), got, needs, **call)
    assert all(torch.equal(wide[name], dense[name]) for name in needs)


@pytest.mark.parametrize("number", [3, 6])
@pytest.mark.parametrize("way", BACKWARDS)
def test_only_the_gradients_that_are_needed_are_computed(number: int, way: str, device: str) -> None:
    call = on(device, samples(torch.float32)[number])
    got = kernels.forward(**call)
    grads = (torch.ones_like(got[0]), None)
    everything = BACKWARDS[way](grads, got, frozenset(OP.differentiable), **call)
    for name in OP.differentiable:
        found = BACKWARDS[way](grads, got, frozenset((name,)), **call)
        assert set(found) == {name}
        torch.testing.assert_close(found[name], everything[name], rtol=1e-5, atol=1e-5)


def test_without_a_gradient_of_the_output_that_of_lse_is_used(device: str) -> None:
    call = on(device, samples(torch.float32)[6])
    got = kernels.forward(**call)
    ones = torch.ones_like(got[1])
    alone = kernels.backward((None, ones), got, frozenset(OP.differentiable), **call)
    both = kernels.backward((torch.zeros_like(got[0]), ones), got, frozenset(OP.differentiable), **call)
    assert all(torch.allclose(alone[name], both[name], atol=1e-6) for name in alone) and alone["sinks"].any()
    none = kernels.backward((None, None), got, frozenset(("q",)), **call)
    assert not none["q"].any()


def scatters(target: str, way: str) -> set[str]:
    """How the gradients of selected entries are written on a target."""
    call = kernels.example("selected", torch.bfloat16, 64, 512, 1, 64)
    out = torch.empty(1, 64, 64, 512, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    lse = torch.empty(1, 64, 64, device="meta")
    launches = record(target, BACKWARDS[way], (out, None), (out, lse), frozenset(("q", "compressed")), **call)
    return {launch.arguments["SCATTER"] for launch in launches if "SCATTER" in launch.arguments}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_the_deterministic_backward_adds_nothing_atomically(target: str) -> None:
    assert "add" in scatters(target, "atomic")
    assert scatters(target, "in order") <= {"", "store"}
    torch.use_deterministic_algorithms(True)
    try:
        assert scatters(target, "atomic") == scatters(target, "in order")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_long_softmax_of_few_queries_is_split(device: str) -> None:
    call = on(device, call_of(4, 16, 1, 9))
    whole = kernels.forward(**call)
    with small_blocks():
        parts = kernels.forward(**call)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    make = partial(made, g, dtype=dtype)
    batch, queries = draw(st.integers(1, 2)), draw(st.integers(0, 9))
    heads, dim = draw(st.sampled_from([1, 2, 3, 8, 20])), draw(st.sampled_from([1, 8, 16, 24, 40, 64]))
    offset, ratio = draw(st.sampled_from([0, 0, 7, 40, -2])), draw(st.sampled_from([0, 1, 2, 4, 16]))
    keys = max(0, queries + offset)
    entries = draw(st.sampled_from([0, 1, 9, 33]))
    call = {
        "q": make(batch, heads, queries, dim),
        "kv": make(batch, keys, dim),
        "sinks": make(heads) if draw(st.booleans()) else None,
        "padding": torch.rand(batch, keys, generator=g) < 0.7 if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([0.4, -0.3])),
        "window": draw(st.sampled_from([1, 3, 8, 64])),
        "ratio": ratio,
        "offset": offset,
    }
    if draw(st.booleans()):
        call["compressed"] = make(batch, entries, dim)
        if draw(st.booleans()):
            shape = (batch, queries, draw(st.sampled_from([0, 1, 3, 12, entries])))
            kind = draw(st.sampled_from([torch.int32, torch.int64]))
            call["indices"] = random_indices(shape, kind, g, call)
    return call


@pytest.mark.parametrize("examples", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_shape_and_any_mix_of_arguments_gives_the_references_result(examples: int, device: str) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(arguments=calls(), way=st.sampled_from(sorted(BACKWARDS)), small=st.booleans(), through_lse=st.booleans())
    def holds(arguments: dict[str, Any], way: str, small: bool, through_lse: bool) -> None:
        with small_blocks(fused=through_lse) if small else ExitStack():
            check(device, arguments, way, through_lse)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", BACKWARDS)
def test_the_whole_samples_in_every_dtype(dtype: torch.dtype, way: str, device: str) -> None:
    for arguments in OP.samples(dtype, torch.Generator().manual_seed(2)):
        check(device, arguments, way, through_lse=True)
