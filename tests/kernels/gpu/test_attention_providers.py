"""The adapters of attention on CUDA, as far as a machine without a GPU can tell.

FlexAttention runs here uncompiled, through the same trace that would be compiled for a GPU. PyTorch's CUDA operators
and flash-attn do not run: their shapes are checked on fake tensors, and what the adapters make of them against
stand-ins that compute, in plain PyTorch, what the operators are documented to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kreg.kernels.attention import cuda, cuda_cudnn, flash, flex, flex_blocks
from kreg.registry.calls import call_facts, facts_names, recompute
from kreg.registry.catalogue import catalogue
from kreg.registry.constraints import Constraint
from kreg.registry.ops import ATTENTION
from kreg.registry.ops.attention import band

ABSENT = dict.fromkeys(ATTENTION.optional)
SAMPLES = [
    sample
    for sample in ATTENTION.samples(torch.float32, torch.Generator().manual_seed(0))
    if sample["k"].shape[2] and sample["q"].shape[2]
]


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32)


def case(heads: int, kv_heads: int, queries: int, keys: int, dim: int = 16, **attributes: Any) -> dict[str, Any]:
    q, k, v = make(2, heads, queries, dim), make(2, kv_heads, keys, dim, seed=1), make(2, kv_heads, keys, dim, seed=2)
    return {"q": q, "k": k, "v": v, "scale": dim**-0.5} | attributes


CASES = [
    case(4, 2, 17, 17, causal=True),
    case(4, 4, 17, 17, causal=True, sinks=make(4)),
    case(4, 1, 5, 17, causal=True, offset=12),
    case(4, 2, 5, 17, causal=True, offset=12, window=4, sinks=make(4)),
    case(2, 2, 17, 17, window=6),
    case(2, 2, 9, 21),
    case(2, 2, 17, 17, causal=True),
    case(1, 1, 33, 33, causal=True),
    case(3, 3, 2, 40),
    case(2, 2, 9, 21, causal=True),
    case(2, 2, 21, 9, causal=True, sinks=make(2)),
    case(2, 1, 21, 21, causal=True, window=5, softcap=2.0),
    case(2, 1, 1, 21, causal=True, offset=20, softcap=2.0),
    *SAMPLES,
]


def takes(kernel: str, arguments: dict[str, Any]) -> bool:
    """Whether the declaration of a kernel takes this call."""
    facts = call_facts(ATTENTION, ABSENT | dict(ATTENTION.defaults) | arguments)
    parsed = (Constraint.parse(text, facts_names(ATTENTION)) for text in catalogue().kernel(kernel).constraints)
    return all(constraint.holds(facts) for constraint in parsed)


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    return ABSENT | wide


def check(arguments: dict[str, Any], forward: Any, backward: Any) -> None:
    """Output, lse, strides and every gradient against the float64 reference."""
    given = ABSENT | arguments
    names = [name for name in ATTENTION.differentiable if given[name] is not None]
    wide = exact(arguments)
    leaves = {name: wide[name].clone().requires_grad_() for name in names}
    want, want_lse = ATTENTION.reference(**(wide | leaves))
    out, lse = forward(**given)
    grad = make(*out.shape, seed=7)
    found = backward((grad, None), (out, lse), frozenset(names), **given)
    wanted = torch.autograd.grad(want, list(leaves.values()), grad.double(), allow_unused=True)

    assert out.stride() == ATTENTION.fake(**given)[0].stride()
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    close(out, want)
    close(lse.masked_fill(lse.isneginf(), 0), want_lse.masked_fill(want_lse.isneginf(), 0))
    assert found.keys() == set(names)
    for name, gradient in zip(names, wanted, strict=True):
        close(found[name], torch.zeros_like(leaves[name]) if gradient is None else gradient)


def close(got: Tensor, want: Tensor) -> None:
    error = ATTENTION.error({}, (got,), (want,))
    scale = float(want.detach().nan_to_num(neginf=0, posinf=0).abs().max())
    assert ATTENTION.tolerances[torch.float32].accepts(error, scale), error


# ---------------------------------------------------------------------------------------------- FlexAttention


@pytest.fixture
def traced_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as Dynamo traces it for a compiler, run by PyTorch's own operators; with gradients on the CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    run = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "_compiled", lambda: run)


@pytest.mark.parametrize("number", range(len(SAMPLES)))
@pytest.mark.usefixtures("traced_flex")
def test_flex_attention_computes_every_sample_of_the_op_and_its_gradients(number: int) -> None:
    check(SAMPLES[number], flex.forward, flex.backward)


@pytest.mark.usefixtures("traced_flex")
def test_another_offset_prefix_or_window_is_not_another_compilation() -> None:
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    for offset, window in ((3, 4), (8, 6), (12, 5)):
        flex.forward(**case(2, 2, 4, 16, causal=True, offset=offset, window=window))
    assert counted["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("traced_flex")
def test_blocks_that_were_made_without_gradients_serve_a_training_step() -> None:
    arguments = case(2, 2, 43, 43, causal=True)
    with torch.inference_mode():
        flex.forward(**arguments)
    check(arguments, flex.forward, flex.backward)


def test_blocks_made_during_a_graphs_capture_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    at, device, capturing = flex_blocks.Positions(44, 44, causal=True), torch.device("cuda"), True
    monkeypatch.setattr(flex, "_by_position", lru_cache(lambda at, device: object()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    made = flex.blocks(at, device)
    capturing = False
    kept = flex.blocks(at, device)
    assert made is not kept
    assert flex.blocks(at, device) is kept


@pytest.mark.parametrize(
    "attributes",
    [
        {"causal": True},
        {"causal": True, "window": 9},
        {"window": 3},
        {"chunk": 5},
        {"chunk": 16, "causal": True},
        {"causal": True, "prefix": 19},
        {"causal": True, "window": 4, "chunk": 11, "prefix": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(40, 40, 0), (13, 50, 37), (30, 21, -6), (8, 64, 20), (1, 33, 32)]
)
def test_blocks_that_are_skipped_keep_nothing_and_whole_ones_keep_everything(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], queries: int, keys: int, offset: int
) -> None:
    monkeypatch.setattr(flex_blocks, "BLOCK", 8)
    at = flex_blocks.Positions(queries, keys, offset=offset, **attributes)
    g = torch.Generator().manual_seed(queries)
    padding = torch.rand(2, keys, generator=g) < 0.9
    padding[0, :10] = False
    documents = torch.randint(0, 3, (2, keys), generator=g).sort().values
    of_queries = torch.randint(0, 3, (2, queries), generator=g).sort().values
    kept = band(
        queries, keys, offset=offset, device=torch.device("cpu"), **({"causal": False, "window": 0} | attributes)
    )
    assert kept is not None
    every = kept & padding[:, None] & (of_queries[:, :, None] == documents[:, None])

    keeps = flex.mask_mod(at, torch.device("cpu"), None, padding, of_queries, documents)
    index = [torch.arange(n).view(shape) for n, shape in ((2, (2, 1, 1)), (queries, (1, -1, 1)), (keys, (1, 1, -1)))]
    assert torch.equal(keeps(index[0], index[0] * 0, index[1], index[2]), every)

    made = flex_blocks.block_mask(
        at, keeps, padding=padding, of_queries=of_queries, documents=documents, device=torch.device("cpu")
    )
    partial, whole = listed(made.kv_num_blocks, made.kv_indices), listed(made.full_kv_num_blocks, made.full_kv_indices)
    missing = (-queries % 8, -keys % 8)
    tiles = torch.nn.functional.pad(every, (0, missing[1], 0, missing[0])).unfold(1, 8, 8).unfold(2, 8, 8)
    assert not (partial & whole).any()
    assert not (tiles.any(-1).any(-1) & ~(partial | whole)).any()
    assert not (whole & ~tiles.all(-1).all(-1)).any()
    if attributes == {"causal": True, "window": 9}:
        assert (partial | whole).float().mean() < 0.7  # something is skipped


def listed(counts: Tensor | None, indices: Tensor | None) -> Tensor:
    """A ragged list of blocks as a mask [batch, query blocks, key blocks]."""
    assert counts is not None and indices is not None
    mask = torch.zeros(indices.shape, dtype=torch.bool)
    first = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return mask.scatter(-1, indices.long(), first)[:, 0]


# ------------------------------------------------------------------------------- PyTorch's fused CUDA operators


def bottom_right(queries: int, keys: int, causal: bool, left: int | None, right: int | None) -> Tensor:
    """The documented mask of FlashAttention: aligned at the last query and key."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    left = keys if left is None or left < 0 else left
    right = 0 if causal else keys if right is None or right < 0 else right
    return (key >= place - left) & (key <= place + right)


def softmax_of(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output and lse of tensors [batch, heads, rows, dim]."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~kept, float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(groups, 1), scores.logsumexp(-1)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Tensor, scale: float
) -> list[Tensor]:
    """What a fused backward makes of a saved output and lse: weights ``exp(s - lse)``, and ``rowsum(grad * out)``."""
    groups = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    p = ((q @ keys.mT * scale) - lse.unsqueeze(-1)).exp().masked_fill(~kept, 0.0)
    d = p * (grad @ values.mT - (grad * out).sum(-1, keepdim=True)) * scale
    by_head = (d.mT @ q, p.mT @ grad)
    return [d @ keys, *(x.unflatten(1, (-1, groups)).sum(2) for x in by_head)]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's operators and flash-attn, as documented, on the CPU."""

    def flash_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, **sides):  # type: ignore[no-untyped-def]
        assert (max_q, max_k, dropout, cum_q, cum_k) == (q.shape[1], k.shape[1], 0.0, None, None)
        kept = bottom_right(max_q, max_k, causal, sides["window_size_left"], sides["window_size_right"])
        out, lse = softmax_of(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), kept, scale)
        return out.transpose(1, 2).contiguous(), lse, None, None, None

    def flash_backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *rng, scale, **sides):  # type: ignore[no-untyped-def]
        kept = bottom_right(max_q, max_k, causal, sides["window_size_left"], sides["window_size_right"])
        parts = gradients(*(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse, kept, scale)
        return [x.transpose(1, 2) for x in parts]

    def efficient_forward(q, k, v, bias, with_lse, dropout, causal, *, scale):  # type: ignore[no-untyped-def]
        assert bias is None and with_lse and dropout == 0.0
        kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        out, lse = softmax_of(q, k, v, kept.tril() if causal else kept, scale)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
        return out.transpose(1, 2).contiguous().transpose(1, 2), padded, None, None

    def efficient_backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale):  # type: ignore[no-untyped-def]
        assert lse.shape[2] % 32 == 0 and wanted == [True, True, True, False]
        kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        kept = kept.tril() if causal else kept
        return [*gradients(grad, q, k, v, out, lse[..., : q.shape[2]], kept, scale), None]

    def cudnn_forward(q, k, v, bias, with_lse, dropout, causal, debug, *, scale):  # type: ignore[no-untyped-def]
        out, lse, *more = efficient_forward(q, k, v, bias, with_lse, dropout, causal, scale=scale)
        return out, lse[..., : q.shape[2]].unsqueeze(-1), *more

    def cudnn_backward(  # type: ignore[no-untyped-def]
        grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert lse.shape == (*q.shape[:3], 1) and (bias, cum_q, cum_k, max_q) == (None, None, None, q.shape[2])
        kept = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return gradients(grad, q, k, v, out, lse.squeeze(-1), kept.tril() if causal else kept, scale)

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap, return_attn_probs):  # type: ignore[no-untyped-def]
        assert return_attn_probs
        kept = bottom_right(q.shape[1], k.shape[1], causal, *window_size)
        out, lse = softmax_of(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), kept, softmax_scale, softcap)
        return out.transpose(1, 2).contiguous(), lse.detach(), None

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    for name, function in {
        "_flash_attention_forward": flash_forward,
        "_flash_attention_backward": flash_backward,
        "_scaled_dot_product_cudnn_attention": cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
        "_scaled_dot_product_efficient_attention": efficient_forward,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    }.items():
        monkeypatch.setattr(torch.ops.aten, name, function)
    yield


ADAPTERS = {
    "torch.flash": (cuda.flash, cuda.flash_backward),
    "torch.efficient": (cuda.efficient, cuda.efficient_backward),
    "torch.cudnn": (cuda_cudnn.forward, cuda_cudnn.backward),
    "flash_attn.func": (flash.forward, recompute(flash.forward)),
}


def test_rows_that_do_not_begin_at_16_bytes_are_copied_and_others_are_not() -> None:
    wide = torch.arange(2 * 3 * 5 * 32, dtype=torch.bfloat16).view(2, 3, 5, 32)
    for taken in (wide, wide[..., 8:24], wide.transpose(1, 2), wide[:, :, 2:], wide[:, :1].expand(-1, 3, -1, -1)):
        assert cuda.dense(taken) is taken
    odd = torch.arange(2 * 3 * 5 * 20, dtype=torch.bfloat16).view(2, 3, 5, 20)
    for copied in (wide[..., 4:20], wide[..., ::2], odd[..., :16], wide.flatten()[1 : 1 + 32].view(1, 1, 2, 16)):
        made = cuda.dense(copied)
        assert torch.equal(made, copied)
        assert (made.stride(-1), made.storage_offset()) == (1, 0)
        assert all(step % 8 == 0 for step in made.stride()[:-1])


def test_a_causal_mask_alone_is_no_window_to_flash_attention() -> None:
    assert cuda.sides(causal=True, window=0) == cuda.sides(causal=False, window=0) == (None, None)
    assert (cuda.sides(causal=True, window=3), cuda.sides(causal=False, window=3)) == ((2, 0), (2, 2))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", ADAPTERS)
def test_what_an_adapter_makes_of_a_fused_kernel_is_the_op(kernel: str) -> None:
    taken = [arguments for arguments in CASES if takes(kernel, arguments)]
    assert len(taken) >= 4
    for arguments in taken:
        check(arguments, *ADAPTERS[kernel])


@pytest.mark.parametrize("kernel", ADAPTERS)
def test_no_query_is_without_keys_where_a_kernel_cannot_say_what_that_gives(kernel: str) -> None:
    for arguments in CASES:
        if takes(kernel, arguments):
            lse = ATTENTION.reference(**exact(arguments))[1]
            assert not lse.isneginf().any()


@pytest.mark.parametrize(
    ("kernel", "arguments", "takes_it"),
    [
        ("torch.flash", case(2, 2, 5, 17, causal=True), False),  # its mask would end at the last key
        ("torch.flash", case(2, 2, 5, 17, causal=True, offset=12), True),
        ("torch.flash", case(2, 2, 17, 5, causal=True, offset=-12), False),  # the first queries would see nothing
        ("torch.flash", case(2, 2, 5, 17, window=3, offset=12), True),
        ("torch.flash", case(2, 2, 5, 17, softcap=1.0), False),
        ("flash_attn.func", case(2, 2, 5, 17, softcap=1.0), True),
        ("flash_attn.func", case(2, 2, 5, 17, sinks=make(2)), False),
        ("torch.efficient", case(2, 2, 5, 17, causal=True, offset=12), False),
        ("torch.efficient", case(2, 2, 5, 17, causal=True), True),
        ("torch.efficient", case(2, 2, 5, 17, dim=512), True),
        ("torch.flash", case(2, 2, 5, 17, dim=512), False),
        ("torch.flash", case(2, 2, 0, 17), False),  # a launch of no programs
        ("torch.efficient", case(2, 2, 0, 17), False),
        ("torch.cudnn", case(2, 2, 5, 17, causal=True), False),
        ("torch.cudnn", case(2, 1, 17, 17, causal=True), False),
        ("torch.flex", case(2, 2, 5, 17, dim=512), False),
        ("torch.flex", case(2, 2, 5, 17, dim=8), False),
    ],
)
def test_the_declarations_say_what_each_kernel_cannot_do(
    kernel: str, arguments: dict[str, Any], takes_it: bool
) -> None:
    assert takes(kernel, arguments) is takes_it


@pytest.mark.parametrize("kernel", ["torch.flash", "torch.efficient", "torch.cudnn"])
@pytest.mark.parametrize("causal", [False, True])
def test_torchs_operators_take_these_arguments_on_a_cuda_device(
    monkeypatch: pytest.MonkeyPatch, kernel: str, causal: bool
) -> None:
    """By their fake kernels: schemas, shapes, dtypes. Nothing is computed."""
    for module in (cuda, cuda_cudnn):
        monkeypatch.setattr(module, "finished", lambda out, lse, sinks: (out, lse))
    forward, backward = ADAPTERS[kernel]
    arguments = case(4, 2 if kernel == "torch.flash" else 4, 32, 32, dim=64, causal=causal, offset=0)
    assert takes(kernel, arguments)
    with FakeTensorMode():
        fakes = {
            name: torch.empty(value.shape, dtype=torch.bfloat16, device="cuda") if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        out, lse = forward(**fakes)
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 32, 64), torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype, lse.device.type) == ((2, 4, 32), torch.float32, "cuda")
        found = backward(
            (torch.empty((2, 4, 32, 64), dtype=torch.bfloat16, device="cuda"), None),
            (out, lse),
            frozenset("qkv"),
            **fakes,
        )
        assert {name: x.shape for name, x in found.items()} == {name: fakes[name].shape for name in "qkv"}
