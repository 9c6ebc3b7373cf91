"""Masks, however a model builds them, lift to expressions equal to its tensors, and read as what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule, Interpreter, Node

from kreg.rewriters import masks, program
from kreg.rewriters import notation as n
from kreg.rewriters.find import _ranges
from kreg.rewriters.graph import is_tensor, sized
from kreg.rewriters.lift import Lifter, variables
from tests.rewriters.evaluate import LETTERS, environments, evaluate

Q = 9
MIN = torch.finfo(torch.float32).min
INF = float("-inf")
Sizes = dict[sympy.Symbol, int]


@dataclass
class Captured:
    """A small function's functional graph, and the value of every node for the example inputs."""

    module: GraphModule
    values: dict[Node, Any]
    sizes: Sizes

    @property
    def output(self) -> Node:
        (out,) = (node for node in self.module.graph.nodes if node.op == "output")
        node = out.args[0][0]
        assert isinstance(node, Node)
        return node


class _Recorder(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: dict[Node, Any] = {}

    def run_node(self, node: Node) -> Any:
        self.values[node] = super().run_node(node)
        return self.values[node]


def capture(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dynamic: bool = False) -> Captured:
    """Exports and functionalises a function."""

    class Module(nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return function(*args)

    shapes = tuple({d: Dim.AUTO for d in range(t.dim()) if t.shape[d] > 1} for t in inputs) if dynamic else None
    exported = torch.export.export(Module(), inputs, dynamic_shapes=(shapes,) if shapes else None, strict=False)
    module = program.functional(exported).module
    given = iter(inputs)
    values = []
    for spec in exported.graph_signature.input_specs:
        target = spec.target
        values.append(exported.constants[target] if target in exported.constants else next(given))
    recorder = _Recorder(module)
    recorder.run(*values)
    sizes: Sizes = {}
    for node, value in recorder.values.items():
        if is_tensor(node):
            for extent, real in zip(node.meta["val"].shape, value.shape, strict=True):
                symbol = sized(extent)
                if isinstance(symbol, sympy.Symbol):
                    sizes[symbol] = real
    return Captured(module, recorder.values, sizes)


@cache
def captured_case(name: str, dynamic: bool) -> Captured:
    """The capture of one of `CASES`."""
    return capture(CASES[name].build, CASES[name].inputs, dynamic)


def lift(captured: Captured) -> tuple[n.Expr, tuple[n.Var, ...]]:
    """The output's element and its index."""
    index = variables(captured.output, LETTERS[: captured.output.meta["val"].dim()])
    with n.sizes_within(_ranges(captured.module.graph)):
        return Lifter().element(captured.output, index), index


def tensor_of(e: n.Expr, index: tuple[n.Var, ...], captured: Captured) -> torch.Tensor:
    """The tensor an expression stands for."""
    want = captured.values[captured.output]
    flat = [evaluate(e, env, captured.values, captured.sizes) for env in environments(index, captured.sizes)]
    return torch.tensor(flat, dtype=torch.float64).reshape(want.shape).to(want.dtype)


def looked_into(e: n.Expr, captured: Captured) -> bool:
    """Whether nothing in an expression reads a value that the function itself computed, a top-k aside."""
    computed = [load.node for load in masks.loads(e) if load.node.op == "call_function"]
    return all("topk" in str(node.args[0]) or "getitem" in node.name for node in computed)


def band(q: int, k: int, offset: int = 0) -> torch.Tensor:
    """key - query - offset."""
    return torch.arange(k) - torch.arange(q).unsqueeze(1) - offset


def packed(ids: torch.Tensor) -> torch.Tensor:
    """Positions that start again at each document, as transformers tells documents apart."""
    starts = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1
    document = starts.cumsum(-1)
    return document[:, :, None] == document[:, None, :]


def default_positions(x: torch.Tensor) -> torch.Tensor:
    """The same with the positions of a single document: trivially all one."""
    ids = torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1)
    keep = torch.arange(x.shape[1]) <= torch.arange(x.shape[1]).unsqueeze(1)
    return keep & packed(ids)


def transformers_style(x: torch.Tensor, mask: torch.Tensor, window: int = 4) -> torch.Tensor:
    """``masking_utils``: broadcast indices, a window by two compares, padding looked up by index."""
    length = x.shape[1]
    batch, q, k = torch.arange(x.shape[0]), torch.arange(length), torch.arange(length)
    batch, q, k = batch[:, None, None, None], q[None, None, :, None], k[None, None, None, :]
    keep = (k <= q) & (k > q - window) & mask.bool()[batch, k]
    return torch.where(keep, torch.tensor(0.0), MIN)


def selected(scores: torch.Tensor) -> torch.Tensor:
    """A top-k scattered into an additive bias, with one slot more for "none"."""
    entries = scores.shape[-1]
    picks = scores.topk(min(3, entries), dim=-1).indices
    bias = torch.full((*scores.shape[:-1], entries + 1), INF)
    bias = bias.scatter(-1, torch.where(picks >= 0, picks, entries), 0.0)
    return bias[..., :entries]


def compressed(x: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Entries not ready yet are at -inf."""
    entries = x.shape[1] // ratio
    threshold = (torch.arange(x.shape[1]) + 1) // ratio
    return torch.zeros(x.shape[1], entries).masked_fill(torch.arange(entries) >= threshold[:, None], INF)


def in_two_parts(x: torch.Tensor) -> torch.Tensor:
    """A window over the keys, then compressed entries."""
    q, k = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    window = torch.where((k <= q) & (k > q - 4), 0.0, MIN)
    return torch.cat([window, compressed(x)], dim=-1)


def sliced_buffer(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's: a triangle as large as the model allows, cut to the sequence."""
    return torch.tril(torch.ones(32, 32, dtype=torch.bool))[: x.shape[1], : x.shape[1]]


X = torch.randn(2, Q, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[1] * Q, [0] * 3 + [1] * (Q - 3)])
SCORES = torch.randn(2, Q, 7, generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]])


@dataclass(frozen=True)
class Case:
    """A way to build a mask, and what it should be read as."""

    build: Callable[..., torch.Tensor]
    reads: dict[str, Any] | None = field(default_factory=dict)
    inputs: tuple[torch.Tensor, ...] = (X,)


CAUSAL = {"causal": True}
CASES: dict[str, Case] = {
    "a triangle of ones": Case(lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)), CAUSAL),
    "a triangle of floats": Case(lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1])) != 0, CAUSAL),
    "what is not in the upper triangle": Case(
        lambda x: ~torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), diagonal=1), CAUSAL
    ),
    "an upper triangle of -inf": Case(lambda x: torch.triu(torch.full((x.shape[1], x.shape[1]), INF), 1), CAUSAL),
    "a triangle cut from a larger one": Case(sliced_buffer, CAUSAL),
    "a triangle one to the right": Case(
        lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1] + 1, dtype=torch.bool), diagonal=1),
        {"causal": True, "offset": 1},
    ),
    "the last rows of a triangle": Case(
        lambda x: torch.tril(torch.ones(x.shape[1] + 3, x.shape[1] + 3, dtype=torch.bool))[3:],
        {"causal": True, "offset": 3},
    ),
    "a triangle cut from the end": Case(
        lambda x: torch.tril(torch.ones(x.shape[1] + 3, x.shape[1] + 3, dtype=torch.bool))[-2:],
        {"causal": True, "offset": Q + 1},
    ),
    "a triangle cut from further than its end": Case(
        lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))[-100:], CAUSAL
    ),
    "positions compared": Case(lambda x: torch.arange(x.shape[1])[:, None] >= torch.arange(x.shape[1]), CAUSAL),
    "positions compared the other way round": Case(
        lambda x: torch.logical_not(torch.arange(x.shape[1]) > torch.arange(x.shape[1]).view(-1, 1)), CAUSAL
    ),
    "positions subtracted": Case(
        lambda x: (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]) >= 0, CAUSAL
    ),
    "a fill of the future": Case(
        lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(
            torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None], MIN
        ),
        CAUSAL,
    ),
    "one minus an integer mask, times -1e4": Case(
        lambda x: (1 - torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.int64))) * -1e4, CAUSAL
    ),
    "one minus a mask of floats, times -1e9": Case(
        lambda x: (1.0 - torch.tril(torch.ones(x.shape[1], x.shape[1]))) * -1e9, CAUSAL
    ),
    "a window by two compares": Case(
        lambda x: (band(x.shape[1], x.shape[1]) <= 0) & (band(x.shape[1], x.shape[1]) > -4),
        {"causal": True, "window": 4},
    ),
    "a window by two triangles": Case(
        lambda x: torch.tril(torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), diagonal=-3)),
        {"causal": True, "window": 4},
    ),
    "a window by exclusive or of fills": Case(
        lambda x: (
            torch.full((x.shape[1], x.shape[1]), 0.0)
            .masked_fill(band(x.shape[1], x.shape[1]) > 0, INF)
            .masked_fill(band(x.shape[1], x.shape[1]) < -3, INF)
        ),
        {"causal": True, "window": 4},
    ),
    "two additive masks": Case(
        lambda x: (
            torch.triu(torch.full((x.shape[1], x.shape[1]), INF), 1)
            + torch.where(band(x.shape[1], x.shape[1]) > -4, 0.0, INF)
        ),
        {"causal": True, "window": 4},
    ),
    "a mask within bounds": Case(
        lambda x: torch.clamp(torch.where(band(x.shape[1], x.shape[1]) > 0, -1e9, 3e9), MIN, 0.0),
        None,
    ),
    "no mask at all": Case(lambda x: torch.zeros(x.shape[1], x.shape[1]), {}),
    "padding looked up by index": Case(transformers_style, {"causal": True, "window": 4, "padding": 1}, (X, PADDING)),
    "padding broadcast": Case(
        lambda x, mask: mask.bool()[:, None, None, :].expand(-1, 1, Q, -1), {"padding": 1}, (X, PADDING)
    ),
    "padding of another number": Case(
        lambda x, mask: (mask == 0)[:, None, :].expand(-1, Q, -1), {"padding": 1}, (X, PADDING)
    ),
    "documents packed by an input": Case(packed, {"documents": True}, (DOCUMENTS,)),
    "one document, by default positions": Case(default_positions, CAUSAL),
    "compressed entries that are ready": Case(compressed, {"ratio": 4}),
    "compressed entries counted from the queries": Case(
        lambda x: (torch.arange(x.shape[1] // 4) + 1) * 4 <= torch.arange(x.shape[1])[:, None] + 1,
        {"ratio": 4},
    ),
    "compressed entries by their last position": Case(
        lambda x: torch.arange(x.shape[1] // 4) * 4 + 3 <= torch.arange(x.shape[1])[:, None], {"ratio": 4}
    ),
    "a top-k scattered": Case(selected, {"selected": True}, (SCORES,)),
    "a top-k scattered into True": Case(
        lambda s: torch.zeros(s.shape, dtype=torch.bool).scatter(-1, s.topk(3, dim=-1).indices, True),
        {"selected": True},
        (SCORES,),
    ),
    "a top-k scattered out of True": Case(
        lambda s: ~torch.ones(s.shape, dtype=torch.bool).scatter(-1, s.topk(3, dim=-1).indices, False),
        {"selected": True},
        (SCORES,),
    ),
    "chunks": Case(lambda x: torch.arange(x.shape[1]) // 4 == torch.arange(x.shape[1])[:, None] // 4, {"chunk": 4}),
    "a mask shifted by a pad": Case(
        lambda x: nn.functional.pad(
            torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)), (1, 0), value=True
        ),
        None,
    ),
    "a prefix seen by all": Case(
        lambda x: (torch.arange(x.shape[1]) < 3) | (torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None]),
        {"causal": True, "prefix": 3},
    ),
    "two kinds of keys in one mask": Case(in_two_parts, None),
    "a mask flipped": Case(
        lambda x: torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)).flip(0).flip(1), CAUSAL
    ),
    "a mask gathered by places": Case(
        lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))[torch.arange(x.shape[1])],
        CAUSAL,
    ),
    "a mask repeated over heads": Case(
        lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)).repeat(2, 1, 1), CAUSAL
    ),
    "a mask stacked from rows of a cumulative sum": Case(
        lambda x: (
            torch.ones(x.shape[1], x.shape[1], dtype=torch.int64).cumsum(0)
            >= torch.ones(x.shape[1], x.shape[1], dtype=torch.int64).cumsum(1)
        ),
        None,
    ),
}
DATA = ("documents packed by an input",)
"""Sums of data stay tensors, which are compared as such."""
STRUCTURES = (
    *("causal", "window", "chunk", "prefix", "offset"),
    *("ratio", "selected", "documents", "padding", "rest"),
)
DYNAMIC = [
    name
    for name in CASES
    if name not in ("padding broadcast", "padding of another number", "a triangle cut from the end")
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_a_mask_lifts_to_an_expression_equal_to_the_tensor(name: str, dynamic: bool) -> None:
    captured = captured_case(name, dynamic)
    e, index = lift(captured)
    want = captured.values[captured.output]
    assert torch.equal(tensor_of(e, index, captured), want)
    if name not in DATA and (not dynamic or name in DYNAMIC):
        assert looked_into(e, captured), f"{name} stays a load: {e}"


def structured(s: masks.Structure, index: tuple[n.Var, ...], captured: Captured) -> torch.Tensor:
    """The mask that a structure stands for, by the definitions of its fields."""
    shape = captured.values[captured.output].shape
    query, key = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])
    keep = torch.ones(shape, dtype=torch.bool)
    position = query + s.offset
    if s.causal:
        keep &= key <= position
    if s.window:
        keep &= (key > position - s.window) & (key < position + s.window)
    if s.chunk:
        keep &= key // s.chunk == position // s.chunk
    if s.prefix:
        keep |= key < s.prefix
    if s.documents is not None:
        for env in environments(index, captured.sizes):
            at = [{**env, index[-1]: place} for place in (env[index[-1]], env[index[-2]] + s.offset)]
            mine, own = (evaluate(s.documents, e, captured.values, captured.sizes) for e in at)
            keep[tuple(env.values())] &= mine == own
    if s.ratio:
        keep &= (key + 1) * s.ratio <= query + s.offset + 1
    if s.selected is not None:
        chosen = s.selected
        (m,) = chosen.variables - set(index)
        for env in environments(index, captured.sizes):
            picks = [evaluate(chosen, {**env, m: i}, captured.values, captured.sizes) for i in range(3)]
            keep[tuple(env.values())] &= env[index[-1]] in picks
    for condition in (*s.padding, *s.rest):
        for env in environments(index, captured.sizes):
            keep[tuple(env.values())] &= bool(evaluate(condition, env, captured.values, captured.sizes))
    return keep


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reads is not None])
def test_what_a_mask_is_read_as_is_what_it_is(name: str, dynamic: bool) -> None:
    case = CASES[name]
    captured = captured_case(name, dynamic)
    e, index = lift(captured)
    with n.sizes_within(_ranges(captured.module.graph)):
        keep = e if n.is_boolean(e) else masks.keep_of(e)
        assert keep is not None, f"not read as a mask: {e}"
        found = masks.read(keep, index[-2], index[-1], index[:-2])
    want = captured.values[captured.output]
    kept = want if want.dtype is torch.bool else want == 0
    assert torch.equal(structured(found, index, captured), kept)
    if dynamic and name not in DYNAMIC:
        return
    said = {
        key: value if isinstance(value, (bool, int)) else len(value) if isinstance(value, tuple) else value is not None
        for key in STRUCTURES
        if (value := getattr(found, key))
    }
    assert said == case.reads


NARROW = (torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", NARROW)
def test_integers_in_a_narrower_dtype_are_the_same_only_where_they_fit(dtype: torch.dtype) -> None:
    ids = torch.tensor([3, 4, 255, 256, 2049, 40000])
    captured = capture(lambda x: x.to(dtype).long() - 1, (ids,))
    e, index = lift(captured)
    assert not n.is_integral(e) or torch.equal(tensor_of(e, index, captured), captured.values[captured.output])
    assert n.is_integral(lift(capture(lambda x: torch.arange(len(x)).to(dtype), (ids,)))[0])
