"""``attention`` by PyTorch's own fused CPU kernel, for a causal mask, one from an input, or a bias.

What the fused kernel cannot say is left to the tiled one: gradients of a bias, of queries without keys that have
weights all the same, and of queries whose lse is too large to compute probabilities from.
"""

from __future__ import annotations

import torch

from kreg.kernels.attention import cpu as tiled
from kreg.kernels.tiles import absence
from kreg.registry.ops.attention import accumulation_dtype


def per_head(x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Tensor [batch, heads, rows, dim] with each head repeated, rows dense as torch needs them."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def stored_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x``, copied if its strides are not those of ``like``."""
    return x if x.stride() == like.stride() else like.copy_(x)


def added(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
) -> torch.Tensor | None:
    """What is added to the scores, broadcastable to them, rows dense; None: nothing."""
    if bias is not None:
        dtype = q.dtype if bias.dtype is q.dtype else accumulation_dtype(q.dtype)  # no other is read right
        bias = bias.to(dtype)
    elif mask is not None or padding is not None:
        kept = mask
        if padding is not None:
            by_key = padding[:, None, None]
            kept = by_key if kept is None else kept & by_key
        assert kept is not None
        bias = absence(kept, q.new_empty(kept.shape))
    if bias is None:
        return None
    bias = bias.expand(*bias.shape[:3], k.shape[2])
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def over_scores(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """As a view [batch, heads, queries, keys]."""
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def without_keys(bias: torch.Tensor, causal: bool, queries: int) -> torch.Tensor:
    """Which queries keep no key, broadcastable to [batch, heads, queries]."""
    kept = ~bias.isneginf()
    first = kept.to(torch.uint8).argmax(-1)
    late = first > torch.arange(queries, device=bias.device) if causal else first < 0
    return ~kept.any(-1) | late


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: None = None,
    padding: torch.Tensor | None = None,
    documents: None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    empty: str = "zero",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse; torch's causal mask, ``t <= s``, is the op's for offset 0.

    A query without keys has output 0 and lse 0 there, and -inf here.
    """
    groups, by_score = q.shape[1] // k.shape[1], added(q, k, bias, mask, padding)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        per_head(q),
        per_head(k, groups),
        per_head(v, groups),
        0.0,
        causal,
        attn_mask=over_scores(by_score, q, k),
        scale=scale,
    )
    batch, heads, queries, dim = q.shape
    out = stored_as(out, out.new_empty(batch, queries, heads, dim).transpose(1, 2))
    lse = stored_as(lse, lse.new_empty(batch, heads, queries))
    if by_score is not None and not bool(lse.all()):
        lse.masked_fill_(without_keys(by_score, causal, queries), float("-inf"))
        tiled.answer_(out, lse, v, empty)
    return out, lse


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: None = None,
    padding: torch.Tensor | None = None,
    documents: None = None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    empty: str = "zero",
) -> dict[str, torch.Tensor]:
    """Gradients of q, k and v; those of a shared key head are summed over its query heads."""
    (out, lse), grad = outputs, grads[0]
    if "bias" in needs or tiled.large(lse) or tiled.blank_rows(lse, empty, k.shape[2]) is not None:
        return tiled.backward(
            grads,
            outputs,
            needs,
            q=q,
            k=k,
            v=v,
            bias=bias,
            mask=mask,
            padding=padding,
            scale=scale,
            causal=causal,
            empty=empty,
        )
    arguments = {"q": q, "k": k, "v": v}
    if grad is None:
        return {name: torch.zeros_like(x) for name, x in arguments.items() if name in needs}
    groups = q.shape[1] // k.shape[1]
    rows = (per_head(grad), per_head(q), per_head(k, groups), per_head(v, groups))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *rows,
        out,
        tiled.finite(lse),
        0.0,
        causal,
        attn_mask=over_scores(added(q, k, bias, mask, padding), q, k),
        scale=scale,
    )
    return {
        name: part if part.shape == x.shape else part.unflatten(1, (-1, groups)).sum(2)
        for (name, x), part in zip(arguments.items(), found, strict=True)
        if name in needs
    }
