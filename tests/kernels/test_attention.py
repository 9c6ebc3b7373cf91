"""The op ``attention`` is what models write, position by position, and its kernels keep that where floats end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kreg
from kreg.kernels.attention import cpu, sdpa
from kreg.kernels.tiles import Band
from kreg.registry.calls import facts_names
from kreg.registry.constraints import Constraint, SymbolicSize, Verdict
from kreg.registry.ops import ATTENTION
from kreg.registry.ops.attention import EMPTY, band, random_documents, random_padding, reference, work

LOWEST = torch.finfo(torch.float32).min
INF = float("-inf")

Softmax = Callable[[Tensor, Tensor], Tensor]
WRITTEN: dict[str, Softmax] = {
    "nan": lambda scores, keep: torch.softmax(scores.masked_fill(~keep, INF), -1),
    "uniform": lambda scores, keep: torch.softmax(scores.masked_fill(~keep, LOWEST), -1),
    "shifted": lambda scores, keep: torch.softmax(scores + torch.where(keep, 0.0, LOWEST), -1),
}
"""What a model writes, by the value of ``empty`` that says what its queries without keys give."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = generator(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def outcome(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """A result and its gradients."""
    grad = torch.randn(out.shape, generator=generator(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)


def some_rows_empty() -> Tensor:
    """Causal, with the first keys of one batch element padded: its first queries keep no key."""
    late = torch.arange(9) >= torch.tensor([[4], [0]])
    return torch.ones(9, 9, dtype=torch.bool).tril() & late[:, None, None, :]


@pytest.mark.parametrize("empty", WRITTEN)
@pytest.mark.parametrize(
    ("kernel", "softcap"),
    [("", 0.0), ("", 2.0), ("kreg.tiled_attention", 0.0), ("kreg.tiled_attention", 2.0)],
)
def test_a_query_without_keys_gives_what_the_model_would_have_written(empty: str, kernel: str, softcap: float) -> None:
    q, k, v, bias = leaves(torch.float64, (2, 2, 9, 4), (2, 2, 9, 4), (2, 2, 9, 3), (1, 2, 9, 9))
    keep = some_rows_empty()
    scores = q @ k.mT * 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    want = outcome(WRITTEN[empty](scores + bias, keep) @ v, [q, k, v, bias])
    padding = keep[:, 0, -1]
    options = {"scale": 0.5, "softcap": softcap, "causal": True, "empty": empty, "kernel": kernel}
    for call in ({"padding": padding} | options, {"mask": keep} | options):
        out, lse = torch.ops.kreg.attention(q, k, v, bias, **call)
        assert_equal(outcome(out, [q, k, v, bias]), want)
        assert torch.equal(lse.isneginf(), ~keep.any(-1).expand(2, 2, 9))


@pytest.mark.parametrize("kernel", ["", "kreg.tiled_attention"])
def test_by_default_a_query_without_keys_gives_what_sdpa_gives(kernel: str) -> None:
    q, k, v = leaves(torch.float64, (2, 2, 9, 4), (2, 2, 9, 4), (2, 2, 9, 3))
    keep = some_rows_empty()
    want = outcome(F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.5), [q, k, v])
    out, _ = torch.ops.kreg.attention(q, k, v, None, keep, scale=0.5, kernel=kernel)
    assert_equal(outcome(out, [q, k, v]), want)


def test_nan_stays_where_autograd_has_it() -> None:
    q, k, v = leaves(torch.float64, (2, 2, 9, 4), (2, 1, 9, 4), (2, 1, 9, 3))
    options = {"scale": 0.5, "causal": True, "empty": "nan", "kernel": "kreg.tiled_attention"}
    out, _ = torch.ops.kreg.attention(q, k, v, None, None, None, some_rows_empty()[:, 0, -1], **options)
    got, *grads = outcome(out, [q, k, v])
    assert got[0, :, :4].isnan().all() and not got[0, :, 4:].isnan().any() and not got[1].isnan().any()
    assert [bool(x.isnan().any()) for x in grads] == [False, False, True]
    assert grads[2][0].isnan().all() and not grads[2][1].isnan().any()


@pytest.mark.parametrize("empty", sorted(EMPTY))
def test_a_bias_of_minus_infinity_everywhere_is_a_row_without_keys(empty: str) -> None:
    q, k, v, bias = leaves(torch.float64, (1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3), (1, 1, 5, 7))
    shut = bias.detach().clone()
    shut[:, :, 2] = INF
    keep = ~shut.isneginf()
    options = {"scale": 0.5, "empty": empty, "kernel": "kreg.tiled_attention"}
    by_bias, lse = torch.ops.kreg.attention(q, k, v, shut, **options)
    by_mask, _ = torch.ops.kreg.attention(q, k, v, bias, keep, **options)
    torch.testing.assert_close(by_bias, by_mask, equal_nan=True)
    assert lse[:, :, 2].isneginf().all()
    if empty == "nan":
        scores = q @ k.mT * 0.5 + shut
        assert_equal(outcome(by_bias, [q, k, v]), outcome(torch.softmax(scores, -1) @ v, [q, k, v]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lowest", [LOWEST, torch.finfo(torch.bfloat16).min, -1e30])
@pytest.mark.parametrize(
    ("kernel", "causal"), [("kreg.tiled_attention", False), ("kreg.tiled_attention", True), ("torch.sdpa", False)]
)
def test_a_bias_that_masks_every_key_gives_the_formulas_gradients(
    dtype: torch.dtype, lowest: float, kernel: str, causal: bool
) -> None:
    inputs = leaves(dtype, (1, 4, 40, 8), (1, 2, 700, 8), (1, 2, 700, 8))
    bias = torch.zeros(1, 1, 40, 700).index_fill_(2, torch.tensor([0, 7, 39]), lowest)
    bias.index_fill_(3, torch.tensor([3]), lowest)
    q, k, v = exact = [x.detach().double().requires_grad_() for x in inputs]
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3 + bias.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(40, 700, dtype=torch.bool).tril(660), INF)
    want = outcome(torch.softmax(scores, -1) @ v.repeat_interleave(2, 1), exact)
    options = {"scale": 0.3, "causal": causal, "offset": 660 if causal else 0, "kernel": kernel}
    out, _ = torch.ops.kreg.attention(*inputs, bias, **options)
    tolerance = ATTENTION.tolerances[dtype]
    for mine, theirs in zip(outcome(out, inputs), want, strict=True):
        error = float((mine.double() - theirs).abs().max())
        assert tolerance.accepts(error, float(theirs.abs().max()))


def test_a_large_finite_sink_and_bias_share_a_row_by_their_numbers() -> None:
    q, k, v, sinks = leaves(torch.float32, (1, 1, 2, 4), (1, 1, 6, 4), (1, 1, 6, 4), (1,))
    bias = torch.full((1, 1, 2, 6), LOWEST)
    lowest = torch.full_like(sinks, LOWEST).requires_grad_()
    for kernel in ("", "kreg.tiled_attention"):
        out, _ = torch.ops.kreg.attention(q, k, v, bias, None, lowest, scale=0.5, kernel=kernel)
        torch.testing.assert_close(out, v.sum(2, keepdim=True).expand_as(out) / 7)
        (grad,) = torch.autograd.grad(out.sum(), lowest)
        torch.testing.assert_close(grad, -out.sum().detach().view(1) / 7)


def test_the_band_keeps_exactly_the_keys_that_its_words_say() -> None:
    cases = product((False, True), (0, 1, 3), (0, 1, 4), (0, 2, 20), (0, 5, -3))
    for causal, window, chunk, prefix, offset in cases:
        found = band(
            6, 9, causal=causal, window=window, offset=offset, device=torch.device("cpu"), chunk=chunk, prefix=prefix
        )
        kept = [[True] * 9 for _ in range(6)]
        for s, t in product(range(6), range(9)):
            p = s + offset
            inside = (t <= p or not causal) and (not window or abs(t - p) < window)
            kept[s][t] = (inside and (not chunk or t // chunk == p // chunk)) or t < prefix
        assert found is None or found.tolist() == kept
        assert found is not None or all(map(all, kept))


@pytest.mark.parametrize("chunk", [0, 4, 5, 16])
def test_a_tile_meets_every_key_that_it_sees_once_and_hides_exactly_the_others(chunk: int) -> None:
    queries, keys, like = 24, 70, torch.empty(0)
    for causal, window, prefix, offset in product((False, True), (0, 3, 20), (0, 5, 33), (0, 7, 46, -6)):
        masks = {"causal": causal, "window": window, "offset": offset, "chunk": chunk, "prefix": prefix}
        keep = band(queries, keys, device=like.device, **masks)
        keep = torch.ones(queries, keys, dtype=torch.bool) if keep is None else keep
        tiled = Band(keys, **masks)
        for start, stop in product(range(0, queries, 3), (1, 7, 24)):
            stop = min(start + stop, queries)
            spans, left = tiled.spans(start, stop), keep[start:stop].clone()
            for first, last in spans:
                left[:, first:last] = False
                bias = tiled.bias(start, stop, first, last, like) if first < last else None
                hidden = ~keep[start:stop, first:last]
                assert torch.equal(bias.isneginf(), hidden) if bias is not None else not hidden.any()
            assert not left.any()
            assert all(a[1] <= b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize("function", [reference, cpu.forward])
def test_documents_must_reach_every_query(function: Callable[..., Any]) -> None:
    q = torch.zeros(1, 1, 4, 8)
    for keys, offset in ((3, 0), (6, 3), (6, -1)):
        k = torch.zeros(1, 1, keys, 8)
        documents = torch.zeros(1, keys, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"documents are given for positions 0 to {keys - 1}"):
            function(q, k, k, documents=documents, scale=1.0, offset=offset)


@pytest.mark.parametrize("function", [reference, cpu.forward])
def test_an_unknown_word_for_empty_rows_is_refused(function: Callable[..., Any]) -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="empty is one of zero, nan, uniform, shifted, not 'mean'"):
        function(x, x, x, scale=1.0, empty="mean")


def test_constraints_can_ask_for_the_word() -> None:
    names = facts_names(ATTENTION)
    assert {"empty", "has_padding", "has_documents", "prefix", "chunk"} <= set(names)
    facts: dict[str, Any] = {"empty": "nan", "queries": SymbolicSize("s0", 2), "has_sinks": False}
    for text, verdict in (
        ("empty in ('zero', 'nan')", Verdict.YES),
        ("empty == 'zero' or has_sinks", Verdict.NO),
        ("empty != 'uniform' and queries >= 2", Verdict.YES),
        ("empty == 'nan' and queries % 2 == 0", Verdict.UNKNOWN),
    ):
        assert Constraint.parse(text, names).decide(facts) is verdict


def test_a_checked_kernel_answers_by_the_reference_where_a_mask_is_not_its_own() -> None:
    q, k, v = leaves(torch.float32, (1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8))
    for call in ({"prefix": 3, "causal": True}, {"chunk": 4}, {"documents": torch.arange(20)[None] // 7}):
        got = torch.ops.kreg.attention(q, k, v, scale=0.3, kernel="torch.sdpa?", **call)
        want = torch.ops.kreg.attention(q, k, v, scale=0.3, **call)
        assert torch.equal(got[0], want[0])


def test_the_op_is_traced_with_every_argument_and_a_symbolic_prefix() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, padding: Tensor, documents: Tensor) -> Tensor:
            masks = {"padding": padding, "documents": documents}
            out, _ = torch.ops.kreg.attention(
                q, q, q, scale=0.3, causal=True, prefix=q.shape[2] // 2, empty="uniform", **masks
            )
            return out

    def inputs(length: int) -> tuple[Tensor, ...]:
        g = generator(length)
        return (
            torch.randn(2, 2, length, 8, generator=g),
            random_padding((2, length), torch.bool, g, {}),
            random_documents((2, length), torch.int64, g, {}),
        )

    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length}, {1: length}, {1: length})
    program = torch.export.export(Model(), inputs(12), dynamic_shapes=shapes)
    for n in (12, 31):
        torch.testing.assert_close(program.module()(*inputs(n)), Model()(*inputs(n)))


def test_work_counts_the_keys_that_a_query_sees() -> None:
    dims = {"batch": 1, "heads": 1, "kv_heads": 1, "queries": 1000, "keys": 1000, "head_dim": 1, "value_dim": 1}

    def seen(**attributes: Any) -> float:
        return work(dims, attributes)[0] / (4 * 1000)

    assert seen() == 1000
    assert seen(causal=True) == 500.5
    assert seen(window=10) == 19
    assert seen(causal=True, window=10) == 10
    assert seen(chunk=100) == 100
    assert seen(causal=True, chunk=100) == 50.5
    assert seen(causal=True, window=10, prefix=100) == pytest.approx(109)
    assert seen(prefix=100) == 1000


def test_random_padding_and_documents_are_valid_for_any_shape_and_dtype() -> None:
    padding = random_padding((50, 40), torch.bool, generator(), {})
    assert 0.15 < float((~padding).float().mean()) < 0.25
    documents = random_documents((50, 40), torch.int32, generator(), {})
    assert documents.dtype is torch.int32 and (documents.diff(dim=-1) >= 0).all() and documents.unique().numel() == 5
    assert random_documents((), torch.int64, generator(), {}).shape == ()


def test_sdpa_is_offered_only_where_torch_has_the_mask_or_the_caller_gives_it() -> None:
    names = facts_names(ATTENTION)
    spec = next(s for s in kreg.registry.catalogue.catalogue().kernels_for("attention") if s.name == "torch.sdpa")
    assert spec.entry_point() is sdpa.forward
    plain: dict[str, Any] = {name: False for name in names if name.startswith("has_")}
    plain |= {"causal": True, "softcap": 0.0, "window": 0, "chunk": 0, "prefix": 0, "offset": 0, "empty": "nan"}
    plain |= dict.fromkeys(("heads", "kv_heads", "queries", "keys", "head_dim", "value_dim", "batch"), 16)

    def takes(**changes: Any) -> bool:
        return all(Constraint.parse(text, names).holds(plain | changes) for text in spec.constraints)

    assert takes() and takes(causal=False, offset=3)
    assert takes(has_bias=True) and takes(has_mask=True, has_padding=True)
    assert not takes(has_bias=True, has_padding=True)
    for name, value in {"has_sinks": True, "has_documents": True, "chunk": 2, "prefix": 1, "offset": 1}.items():
        assert not takes(**{name: value})


@pytest.mark.parametrize("empty", sorted(EMPTY))
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_tells_an_lse_of_zero_from_a_query_without_keys(empty: str, causal: bool) -> None:
    q, k, v = leaves(torch.float64, (2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4))
    with torch.no_grad():
        q[:, :, 2] = 0.0
    mask = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    mask[:, 0, 2] = torch.arange(6) == 1  # one key, at a score of 0
    mask[:, 1, 4] = False
    mask[:, 1, 3] = torch.arange(6) == 4  # not seen yet where it is causal
    options = {"scale": 0.5, "causal": causal, "empty": empty}
    want, want_lse = torch.ops.kreg.attention(q, k, v, None, mask, **options)
    got, lse = torch.ops.kreg.attention(q, k, v, None, mask, kernel="torch.sdpa", **options)
    torch.testing.assert_close(lse, want_lse)
    assert lse.isneginf().sum() == (4 if causal else 2) and bool((lse == 0).any())
    assert_equal(outcome(got, [q, k, v]), outcome(want, [q, k, v]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["mask", "padding", "bias"])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_takes_masks_longer_than_its_blocks_and_a_bias_of_another_dtype(
    dtype: torch.dtype, form: str, causal: bool
) -> None:
    g = generator()
    inputs = leaves(dtype, (2, 4, 700, 8), (2, 2, 1100, 8), (2, 2, 1100, 8))
    late = torch.arange(1100).expand(2, -1) >= torch.tensor([[600], [3]])
    call: dict[str, Any] = {"padding": late}
    if form == "mask":
        call = {"mask": late[:, None, None] & (torch.rand(2, 1, 700, 1100, generator=g) < 0.5)}
    elif form == "bias":
        other = torch.float64 if dtype is torch.float32 else torch.float32
        call = {"bias": torch.randn(1, 4, 1, 1100, generator=g).to(other)}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in call.items()}
    want = outcome(reference(*exact, scale=0.3, causal=causal, **doubled)[0], exact)
    out, _ = torch.ops.kreg.attention(*inputs, scale=0.3, causal=causal, kernel="torch.sdpa", **call)
    for mine, theirs in zip(outcome(out, inputs), want, strict=True):
        error = float((mine.double() - theirs).abs().max())
        assert ATTENTION.tolerances[dtype].accepts(error, float(theirs.abs().max()))
