"""``attention`` by PyTorch's FlexAttention: the masks and the scores are expressions that torch compiles into a kernel.

What it leaves over: sinks are a rescaling by the log-sum-exp; a query that keeps no key and yet has weights, and scores
so large that the log-sum-exp is rounded, are the tiled kernel's (which runs on any device). Gradients come from
FlexAttention's own autograd, so its forward is run again for them.

The host waits for the device in two kinds of calls, to read from the log-sum-exp which kernel answers: with a bias (an
additive mask may cover rows wholly, and weights cannot be computed from an lse of -3e38, nor does any argument tell
beforehand), and where queries may keep no key and do not give 0. Such a call cannot be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from kreg.kernels.attention import cpu as tiled
from kreg.kernels.attention.flex_blocks import MaskMod, Positions, block_mask
from kreg.kernels.attention.sdpa import stored_as
from kreg.registry.ops.attention import accumulation_dtype, documents_of_queries, empty_rows

LARGEST_BIAS = 2e38
"""FlexAttention counts in powers of two: log2(e) times a larger float32 is not finite."""


VARIANTS = 256
"""Compiled kernels to keep: heads, widths, masks and layouts are constants of each. Dynamo's own limit, 8, is for code
that changes by mistake; beyond the limit the op's reference would compute the call.
"""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    *,
    empty: str = "zero",
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    arguments: dict[str, Any] = {"bias": bias, "mask": mask, "sinks": sinks, "padding": padding, "documents": documents}
    arguments |= attributes
    out, lse = attend(q, k, v, **arguments)
    if bias is not None and tiled.large(lse):
        return tiled.forward(q, k, v, **arguments, empty=empty)
    out = as_the_op_stores(out)
    if empty_rows(empty, sinks) != "zero" and may_be_blank(q, k, arguments):
        tiled.answer_(out, lse, v, empty)
    return out, lse


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    empty: str = "zero",
    **arguments: Any,
) -> dict[str, torch.Tensor]:
    """Gradients by FlexAttention's autograd; by the tiled kernel where it has none that are right."""
    grad, (_, lse) = grads[0], outputs
    if grad is None:
        return {name: torch.zeros_like(arguments[name]) for name in needs}
    if left_to_tiled(grad, lse, empty, arguments):
        return tiled.backward(grads, outputs, needs, **arguments, empty=empty)
    with torch.enable_grad():
        leaves = {name: arguments[name].detach().requires_grad_() for name in sorted(needs)}
        out, _ = attend(**(arguments | leaves))
        found = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if part is None else part
        for (name, leaf), part in zip(leaves.items(), found, strict=True)
    }


def left_to_tiled(grad: torch.Tensor, lse: torch.Tensor, empty: str, arguments: dict[str, Any]) -> bool:
    """Whether a query with weights but without keys passes a gradient on, or the lse is too large to weigh by."""
    if arguments.get("bias") is not None and tiled.large(lse):
        return True
    if empty_rows(empty, arguments.get("sinks")) == "zero":
        return False
    if not may_be_blank(arguments["q"], arguments["k"], arguments):
        return False
    blank = lse.isneginf()
    passes = blank if empty == "nan" else blank & (grad != 0).any(-1)  # NaN takes no zero for an answer
    return bool(passes.any())


def may_be_blank(q: torch.Tensor, k: torch.Tensor, masks: dict[str, Any]) -> bool:
    """Whether some query may keep no key; told from the sizes alone, without reading what is on the device."""
    if any(masks.get(name) is not None for name in ("bias", "mask", "padding")):
        return True
    if not (masks.get("causal") or masks.get("window") or masks.get("chunk")):
        return False
    # A query that stands at a key sees that key, whatever the documents are.
    offset: int = masks.get("offset", 0)
    return offset < 0 or offset + q.shape[2] > k.shape[2]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, queries, value_dim] and lse, differentiable; 0 and -inf for a query without keys."""
    at = Positions(q.shape[2], k.shape[2], causal, window, chunk, prefix if causal or window or chunk else 0, offset)
    keeps = None
    if not at.all_kept or mask is not None or padding is not None or documents is not None:
        keeps = blocks(at, q.device, mask, padding, documents)
    if bias is not None:  # in its own dtype: it may be wider than q's
        bias = bias.masked_fill(bias.isfinite() & (bias < -LARGEST_BIAS), -LARGEST_BIAS)
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        out, extra = _compiled()(
            q,
            k,
            v,
            score_mod=score_mod(softcap, bias, q),
            block_mask=keeps,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    lse = extra.lse
    return (out, lse) if sinks is None else with_sinks(out, lse, sinks)


def as_the_op_stores(out: torch.Tensor) -> torch.Tensor:
    """An output [batch, heads, queries, dim] stored as [batch, queries, heads, dim], copied if it is not."""
    batch, heads, queries, dim = out.shape
    if out.stride() == (queries * heads * dim, dim, heads * dim, 1):
        return out
    return stored_as(out, out.new_empty(batch, queries, heads, dim).transpose(1, 2))


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What one more logit in the denominator makes of an output and its lse.

    With weights ``exp(s - lse)``, the sink's share is ``exp(sink - lse')`` of ``lse' = log(exp(lse) + exp(sink))``, and
    all others shrink by ``exp(lse - lse') = sigmoid(lse - sink)``.
    """
    sink = sinks.to(lse.dtype).unsqueeze(1)
    share = torch.sigmoid(lse - sink).unsqueeze(-1)
    return (out.to(lse.dtype) * share).to(out.dtype), torch.logaddexp(lse, sink.expand_as(lse))


def blocks(
    at: Positions,
    device: torch.device,
    mask: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> BlockMask:
    """All masks as one `BlockMask`; kept from call to call where it is by position only."""
    if mask is None and padding is None and documents is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _by_position.__wrapped__(at, device)  # a graph's own memory, which only its replay fills
        return _by_position(at, device)
    of_queries = None if documents is None else documents_of_queries(documents, at.queries, at.offset)
    keeps = mask_mod(at, device, mask, padding, of_queries, documents)
    return block_mask(
        at,
        keeps,
        padding=padding,
        of_queries=of_queries,
        documents=documents,
        has_mask=mask is not None,
        device=device,
    )


@lru_cache(maxsize=32)
def _by_position(at: Positions, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # it may serve a training step later, which cannot save inference tensors
        return block_mask(at, mask_mod(at, device), device=device)


def mask_mod(
    at: Positions,
    device: torch.device,
    mask: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    of_queries: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> MaskMod:
    """The masks as FlexAttention's expression. Numbers are tensors, so that another number is not another kernel."""
    causal, windowed, chunked, prefixed = at.causal, bool(at.window), bool(at.chunk), bool(at.prefix)
    offset, window, chunk, prefix = (
        torch.full((), number, dtype=torch.int32, device=device)
        for number in (at.offset, at.window, max(at.chunk, 1), at.prefix)
    )
    pick = None if mask is None else broadcast_index(mask)

    def keeps(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        kept = key >= 0
        position = row + offset
        if causal:
            kept = kept & (key <= position)
        if windowed:
            kept = kept & (key > position - window) & (key < position + window)
        if chunked:
            kept = kept & (_floor(key, chunk) == _floor(position, chunk))
        if prefixed:
            kept = kept | (key < prefix)
        if padding is not None:
            kept = kept & padding[b, key]
        if documents is not None and of_queries is not None:
            kept = kept & (of_queries[b, row] == documents[b, key])
        if mask is not None and pick is not None:
            kept = kept & mask[pick(b, h, row, key)]
        return kept

    return keeps


def _floor(position: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """The chunk of a position, which may be negative."""
    return torch.div(position, chunk, rounding_mode="floor")


def score_mod(softcap: float, bias: torch.Tensor | None, like: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Soft cap and bias as FlexAttention's expression; the score is scaled already."""
    if not softcap:
        return None if bias is None else added(bias)
    # A tensor: a float that changes from call to call is compiled into a read of its value, which fails.
    cap = torch.full((), softcap, dtype=accumulation_dtype(like.dtype), device=like.device)
    add = None if bias is None else added(bias)

    def capped(s: torch.Tensor, *place: Any) -> torch.Tensor:
        s = cap * torch.tanh(s / cap)
        return s if add is None else add(s, *place)

    return capped


def added(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The bias of a score, added to it."""
    pick = broadcast_index(bias)

    def add(s: torch.Tensor, *place: Any) -> torch.Tensor:
        return s + bias[pick(*place)]

    return add


def broadcast_index(x: torch.Tensor) -> Callable[..., tuple[Any, ...]]:
    """Index of one score's element in a tensor that broadcasts to [batch, heads, queries, keys]."""
    full = tuple(size != 1 for size in x.shape)

    def pick(*place: Any) -> tuple[Any, ...]:
        return tuple(i if whole else i * 0 for i, whole in zip(place, full, strict=True))

    return pick


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, fullgraph=True)
