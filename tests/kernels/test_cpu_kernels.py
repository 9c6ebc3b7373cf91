"""Every declared CPU kernel computes its op: outputs, gradients, strides, memory linear in the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kreg.kernels
from kreg.kernels import tiles
from kreg.kernels.attention import cpu as attention
from kreg.kernels.lightning_indexer import cpu as indexer
from kreg.kernels.sparse_attention import cpu as sparse_attention
from kreg.registry.constraints import Constraint
from kreg.registry.op import Op
from kreg.registry.ops import BUILTIN_OPS
from kreg.registry.ops.attention import EMPTY
from kreg.registry.ops.lightning_indexer import all_scores
from kreg.registry.ops.sparse_attention import random_indices
from kreg.registry.spec import KernelSpec

OPS = {op.name: op for op in BUILTIN_OPS if op.name in ("attention", "sparse_attention", "lightning_indexer")}
SPECS = {
    spec.name: spec
    for path in sorted(Path(kreg.kernels.__file__).parent.glob("*/cpu.yaml"))
    for spec in (KernelSpec.read(fields, path.name) for fields in yaml.safe_load(path.read_text()))
    if spec.op in OPS
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(spec, dtype, id=f"{spec.name}-{str(dtype).removeprefix('torch.')}")
    for spec in SPECS.values()
    for dtype in DTYPES
    if str(dtype).removeprefix("torch.") in spec.dtypes
]
Outputs = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On inputs this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def takes(spec: KernelSpec, arguments: dict[str, Any]) -> bool:
    """Whether the spec's constraints hold for these arguments."""
    op = OPS[spec.op]
    values = op.dims(arguments) | {name: arguments.get(name, op.defaults.get(name)) for name in op.attributes}
    values |= {f"has_{name}": arguments.get(name) is not None for name in op.optional}
    return all(Constraint.parse(text, values).holds(values) for text in spec.constraints)


def in_double(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64, the differentiable ones as leaves."""
    copies = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            copies[name] = value.detach().double().requires_grad_(name in op.differentiable)
    return copies


def differentiable_output(op: Op, exact: dict[str, Any], got: Outputs, want: Outputs) -> torch.Tensor:
    """The reference's output that has a gradient, in the order of the kernel's own selection."""
    if op.name != "lightning_indexer":
        return want[0]
    scores = all_scores(exact["q"], exact["k"], exact["weights"], exact["scale"])
    padded = torch.cat([scores, scores.new_zeros(*scores.shape[:2], 1)], dim=-1)
    return padded.gather(-1, torch.where(got[0] < 0, scores.shape[-1], got[0]))


def check(spec: KernelSpec, arguments: dict[str, Any], gradients: bool = True) -> None:
    """Compare a kernel's outputs and gradients with the reference's in float64."""
    op = OPS[spec.op]
    tolerance = op.tolerances[arguments["q"].dtype]
    exact = in_double(op, arguments)
    want = op.reference(**exact)
    with torch.no_grad():
        got = spec.entry_point()(**arguments)
        for mine, fake in zip(got, op.fake(**arguments), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (fake.shape, fake.dtype, fake.stride())
    plain = tuple(x.detach() for x in want)
    finite = want[0]
    if op.name == "lightning_indexer":
        finite = all_scores(exact["q"], exact["k"], exact["weights"], exact["scale"])
    assert tolerance.accepts(op.error(arguments, got, plain), largest(finite))
    if got[0].is_floating_point():
        assert torch.equal(got[1].isneginf(), plain[1].isneginf())
        assert tolerance.accepts(largest((got[1].double() - plain[1]).nan_to_num(nan=0.0)), largest(plain[1]))
    elif arguments.get("scored"):
        picked = differentiable_output(op, exact, got, want).detach()
        picked[got[0] < 0] = float("-inf")
        difference = (got[1].double() - picked).nan_to_num(nan=0.0)
        assert tolerance.accepts(largest(difference), largest(finite))
    if not gradients or (op.name == "lightning_indexer" and not arguments.get("scored")):
        return
    output = differentiable_output(op, exact, got, want)
    place = 1 if op.name == "lightning_indexer" else 0
    grad = torch.randn(output.shape, dtype=torch.float64).to(got[place].dtype)
    names = [name for name in op.differentiable if arguments.get(name) is not None]
    (output * grad.double()).sum().backward()
    backward = spec.backward_point()
    assert backward is not None
    grads = tuple(grad if i == place else None for i in range(len(got)))
    with torch.no_grad():
        found = backward(grads, got, frozenset(names), **arguments)
    assert set(found) == set(names)
    for name in names:
        expected = exact[name].grad
        assert (found[name].shape, found[name].dtype) == (arguments[name].shape, arguments[name].dtype)
        assert torch.equal(found[name].isnan(), expected.isnan()), f"gradient of {name} is NaN elsewhere"
        assert torch.equal(found[name].isinf(), expected.isinf()), f"gradient of {name} is infinite elsewhere"
        error = largest(found[name].double() - expected)
        assert tolerance.accepts(error, largest(expected)), f"gradient of {name} is off by {error}"


def largest(x: torch.Tensor) -> float:
    """Largest finite absolute value."""
    x = x.detach().abs()
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextmanager
def tiny_tiles() -> Iterator[None]:
    """Tiles and ranges of a few queries and keys, so that small inputs have many."""
    small = {"SCORES_PER_TILE": 256, "GATHERED_PER_TILE": 128, "PRODUCTS_PER_TILE": 256, "LONGEST_RANGE": 16}
    more = {"ROWS_PER_PRODUCT": 16, "ROWS_PER_SELECTION": 8, "TILE_OPERATIONS": 4096}
    with ExitStack() as stack:
        for module in (tiles, attention, sparse_attention, indexer):
            here = {name: value for name, value in (small | more).items() if hasattr(module, name)}
            for name, value in here.items():
                stack.enter_context(patch.object(module, name, value))
        yield


@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_outputs_and_gradients_are_the_references_on_every_sample(spec: KernelSpec, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    samples = [s for s in OPS[spec.op].samples(dtype, generator()) if takes(spec, s)]
    assert samples
    for arguments in samples:
        check(spec, arguments)
        with tiny_tiles():
            check(spec, arguments)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_kernel_of_a_cpu_file_says_how_it_computes_a_gradient(spec: KernelSpec) -> None:
    assert spec.devices == ("cpu",)
    assert spec.trains
    assert spec.backward_point() is not None


@st.composite
def attention_calls(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = st.integers(1, 40)
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys, dim = draw(size), draw(size), draw(st.integers(1, 9))
    heads, value_dim = kv_heads * group, draw(st.sampled_from([dim, 5]))
    offset = draw(st.sampled_from([0, 0, 3, 30, -4]))
    by_document = draw(st.booleans())
    if by_document:
        offset = max(offset, 0)
        keys = max(keys, queries + offset)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    full = (batch, heads, queries, keys)
    broadcast = tuple(n if draw(st.booleans()) else 1 for n in full)
    bias = make(*broadcast) if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        lowest = draw(st.sampled_from([float("-inf"), torch.finfo(torch.float32).min, -1e30, -1e4]))
        bias = bias.masked_fill(make(*broadcast[:3], 1) > 0.3, lowest)
    padding = make(batch, keys) > draw(st.sampled_from([-1.0, 0.5])) if draw(st.booleans()) else None
    if padding is not None and draw(st.booleans()):
        padding = padding.sort(dim=1, descending=draw(st.booleans())).values
    documents = torch.randint(0, 4, (batch, keys), generator=g) if by_document else None
    if documents is not None and draw(st.booleans()):
        documents = documents.sort(dim=1).values
    return {
        "q": make(batch, heads, queries, dim),
        "k": make(batch, kv_heads, keys, dim),
        "v": make(batch, kv_heads, keys, value_dim),
        "bias": bias,
        "mask": make(*broadcast) > -0.5 if draw(st.booleans()) else None,
        "sinks": make(heads) if draw(st.booleans()) else None,
        "padding": padding,
        "documents": documents,
        "scale": 0.4,
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 5, 20])),
        "chunk": draw(st.sampled_from([0, 0, 1, 7, 16])),
        "prefix": draw(st.sampled_from([0, 0, 3, 17, 50])),
        "offset": offset,
        "empty": draw(st.sampled_from(sorted(EMPTY))),
    }


@st.composite
def sparse_attention_calls(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    batch, heads, queries, dim = (draw(st.integers(1, n)) for n in (2, 5, 40, 9))
    offset, ratio = draw(st.sampled_from([0, 0, 7, 40])), draw(st.sampled_from([1, 2, 4, 16]))
    keys = queries + offset
    entries = draw(st.sampled_from([0, 1, keys // ratio, 33]))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    call = {
        "q": make(batch, heads, queries, dim),
        "kv": make(batch, keys, dim),
        "sinks": make(heads) if draw(st.booleans()) else None,
        "padding": make(batch, keys) > -0.5 if draw(st.booleans()) else None,
        "scale": 0.4,
        "window": draw(st.sampled_from([1, 3, 8, 64])),
        "ratio": ratio,
        "offset": offset,
    }
    if draw(st.booleans()):
        call["compressed"] = make(batch, entries, dim)
        if draw(st.booleans()):
            shape = (batch, queries, draw(st.sampled_from([0, 1, 3, 12, entries])))
            dtype = draw(st.sampled_from([torch.int32, torch.int64]))
            call["indices"] = random_indices(shape, dtype, g, call)
    return call


@st.composite
def lightning_indexer_calls(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    batch, queries, heads, dim, entries = (draw(st.integers(1, n)) for n in (2, 40, 4, 9, 40))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "q": make(batch, queries, heads, dim),
        "k": make(batch, entries, dim),
        "weights": make(batch, queries, heads),
        "scale": draw(st.sampled_from([0.4, -0.4])),
        "topk": draw(st.sampled_from([0, 1, min(4, entries), entries])),
        "ratio": draw(st.sampled_from([0, 1, 4, 7])),
        "offset": draw(st.sampled_from([0, 0, 5, 100])),
        "scored": draw(st.booleans()),
    }


NO_BAND = {"window": 0, "chunk": 0, "prefix": 0, "offset": 0}
SIMPLER = ({}, NO_BAND | {"softcap": 0.0, "sinks": None, "documents": None}, {"bias": None})
"""What turns, one after the other, any call of attention into one that every kernel takes."""

CALLS: dict[str, Callable[[], st.SearchStrategy[dict[str, Any]]]] = {
    "attention": attention_calls,
    "sparse_attention": sparse_attention_calls,
    "lightning_indexer": lightning_indexer_calls,
}


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_any_shape_and_any_mix_of_arguments_gives_the_references_result(spec: KernelSpec, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(arguments=CALLS[spec.op](), tiny=st.booleans())
    def holds(arguments: dict[str, Any], tiny: bool) -> None:
        torch.manual_seed(0)
        for simpler in SIMPLER if spec.op == "attention" else ():
            if not takes(spec, arguments):
                arguments = arguments | simpler | {"v": arguments["k"].flip(2)}
        if not takes(spec, arguments):
            return
        with tiny_tiles() if tiny else ExitStack():
            check(spec, arguments)

    holds()


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger tensor with its dimensions reversed."""
    wide = x.new_zeros(*(2 * n for n in reversed(x.shape)))
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_inputs_may_have_any_strides(spec: KernelSpec) -> None:
    for arguments in OPS[spec.op].samples(torch.float32, generator()):
        if takes(spec, arguments):
            torch.manual_seed(0)
            tensors = {name: strided(x) for name, x in arguments.items() if isinstance(x, torch.Tensor)}
            check(spec, arguments | tensors)


def test_queries_stored_by_position_and_a_broadcast_gradient_are_taken_as_they_are() -> None:
    g = generator()
    q = torch.randn(1, 70, 4, 8, generator=g).transpose(1, 2)
    call = {"q": q, "kv": torch.randn(1, 70, 8, generator=g), "scale": 0.3, "window": 9}
    spec = SPECS["kreg.tiled_sparse_attention"]
    with torch.no_grad():
        got = spec.entry_point()(**call)
        backward = spec.backward_point()
        assert backward is not None
        needs = frozenset(("q", "kv"))
        wide = backward((torch.ones(()).expand(got[0].shape), None), got, needs, **call)
        dense = backward((torch.ones(got[0].shape), None), got, needs, **call)
    assert all(torch.equal(wide[name], dense[name]) for name in needs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_only_the_gradients_that_are_needed_are_computed(spec: KernelSpec) -> None:
    op = OPS[spec.op]
    backward = spec.backward_point()
    assert backward is not None
    samples = [s for s in op.samples(torch.float64, generator()) if takes(spec, s) and s.get("scored", True)]
    for arguments in samples:
        with torch.no_grad():
            got = spec.entry_point()(**arguments)
            place = 1 if op.name == "lightning_indexer" else 0
            grads = tuple(torch.ones_like(x) if i == place else None for i, x in enumerate(got))
            names = [name for name in op.differentiable if arguments.get(name) is not None]
            every = backward(grads, got, frozenset(names), **arguments)
            for name in names:
                alone = backward(grads, got, frozenset([name]), **arguments)
                assert set(alone) == {name}
                torch.testing.assert_close(alone[name], every[name], rtol=1e-12, atol=1e-12, equal_nan=True)
            nothing = backward((None,) * len(got), got, frozenset(names), **arguments)
            assert all(not nothing[name].any() for name in names)


def test_a_query_that_sees_nothing_gives_zero_and_no_nan_in_any_gradient() -> None:
    g = generator()
    q, kv = torch.randn(1, 2, 5, 8, generator=g), torch.randn(1, 5, 8, generator=g)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    spec = SPECS["kreg.tiled_sparse_attention"]
    for sinks in (None, torch.randn(2, generator=g)):
        call = {"q": q, "kv": kv, "padding": nothing, "sinks": sinks, "scale": 1.0, "window": 3}
        with torch.no_grad():
            out, lse = spec.entry_point()(**call)
            backward = spec.backward_point()
            assert backward is not None
            needs = frozenset(("q", "kv", "sinks") if sinks is not None else ("q", "kv"))
            found = backward((torch.ones_like(out), None), (out, lse), needs, **call)
        assert not out.any()
        assert torch.equal(lse.isneginf().any(), torch.tensor(sinks is None))
        assert all(not x.any() for x in found.values())


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def long_calls(length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls whose work is linear in the length, but for the entries that grow with it."""
    g = generator()

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    heads, dim = 2, 4
    base = {"q": make(1, heads, length, dim), "kv": make(1, length, dim), "scale": 0.5, "window": 64}
    compressed = make(1, length // 4, dim)
    chosen = torch.randint(0, length // 4, (1, length, 1), generator=g)
    some = torch.cat([chosen, chosen - 1], dim=-1)
    yield "kreg.tiled_sparse_attention", base
    yield "kreg.tiled_sparse_attention", base | {"compressed": compressed, "indices": some, "ratio": 4}
    yield "kreg.tiled_sparse_attention", base | {"compressed": make(1, length // 64, dim), "ratio": 64}
    qkv = {"q": base["q"], "k": make(1, 1, length, dim), "v": make(1, 1, length, dim), "scale": 0.5}
    yield "kreg.tiled_attention", qkv | {"causal": True, "window": 64}
    yield "kreg.tiled_attention", qkv | {"causal": True}
    kept = torch.arange(length).expand(1, -1) >= 90
    yield "kreg.tiled_attention", qkv | {"causal": True, "padding": kept, "empty": "shifted"}
    yield "kreg.tiled_attention", qkv | {"documents": torch.arange(length).expand(1, -1) // 100, "window": 64}
    yield "kreg.tiled_attention", qkv | {"chunk": 100, "prefix": 10}
    index = {"q": make(1, length, heads, dim), "k": compressed, "weights": make(1, length, heads)}
    yield "kreg.tiled_indexer", index | {"scale": 1.0, "topk": 2, "ratio": 4, "scored": True}


def test_no_tensor_grows_faster_than_the_sequence() -> None:
    sizes: list[list[int]] = []
    for length in (1024, 4096):
        sizes.append([])
        for name, call in long_calls(length):
            spec = SPECS[name]
            with torch.no_grad(), LargestTensor() as seen:
                got = spec.entry_point()(**call)
                backward = spec.backward_point()
                assert backward is not None
                grads = tuple(torch.ones_like(x) if x.is_floating_point() else None for x in got)
                backward(grads, got, frozenset(OPS[spec.op].differentiable), **call)
            sizes[-1].append(seen.elements)
    for short, long in zip(*sizes, strict=True):
        assert long <= 4 * short
        assert long < 4096 * 1024 / 4


def test_entries_that_are_all_selected_are_never_scored() -> None:
    q, k = torch.full((1, 9, 2, 4), float("nan")), torch.full((1, 3, 4), float("nan"))
    with torch.no_grad():
        indices, scores = SPECS["kreg.tiled_indexer"].entry_point()(
            q=q, k=k, weights=q[..., 0], scale=1.0, topk=3, ratio=3, offset=0, scored=False
        )
    assert indices[0, 1].tolist() == [-1, -1, -1]
    assert indices[0, 2].tolist() == [0, -1, -1]
    assert indices[0, 8].tolist() == [0, 1, 2]
    assert scores.shape == (1, 9, 0)
