"""``attention`` by torch_npu's ``npu_fusion_attention`` under a mask tensor: inputs' masks, documents, a bias.

What torch_npu's documentation leaves open is not relied on:

- What a row gives whose keys are all masked. Such a row is handed to the operator without its mask, and its result is
  replaced by what the op says; in the gradient it takes no part, since its probabilities ``exp(s - NEVER)`` are 0.
- Whether ``pse`` may be infinite. Where it is, the key is masked and the bias is a finite number.
- Whether ``pse`` is added before the scale or after it (the formula says before, ``pse_type`` that both exist). The
  queries are scaled instead, and the operator's scale is 1.
- The gradient of ``pse``: torch_npu returns none. It is computed here, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kreg.kernels.attention import npu_fusion as fusion
from kreg.kernels.attention.npu import zeros
from kreg.registry.ops.attention import accumulation_dtype, band, documents_of_queries, empty_rows

NEVER = 1e30
"""A maximum so large that every probability under it is 0 in float32."""


@dataclass(frozen=True)
class Scene:
    """What a call of the op comes to: the operator's arguments, and which queries keep no key.

    Attributes:
        blank: bool [1|batch, 1|heads, queries], True where a query keeps no key; None: nothing drops keys.
        kept: bool [1|batch, 1|heads, queries, keys], with the rows of `blank` in it as they are; None as above.
    """

    masking: fusion.Masking
    pse: torch.Tensor | None
    blank: torch.Tensor | None
    kept: torch.Tensor | None


def scene(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    documents: torch.Tensor | None,
    *,
    offset: int,
    **by_place: Any,
) -> Scene:
    """All masks as one, and the bias as ``pse``; ``by_place`` is causal, window, chunk and prefix."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    near = band(queries, keys, offset=offset, device=q.device, **by_place)
    parts = [] if near is None else [near[None, None]]
    if mask is not None:
        parts.append(mask)
    if padding is not None:
        parts.append(padding[:, None, None])
    if documents is not None:
        own = documents_of_queries(documents, queries, offset)
        parts.append(own[:, None, :, None] == documents[:, None, None])
    if bias is not None:
        parts.append(bias != float("-inf"))
    pse = None if bias is None else as_pse(bias, q, keys)
    if not parts:
        return Scene(fusion.Masking(), pse, None, None)
    kept = parts[0]
    for part in parts[1:]:
        kept = kept & part
    by_head = kept.shape[1] > 1  # the documented shapes: [B, N, S, S], [B, 1, S, S] and [1, 1, S, S]
    kept = kept.expand(batch if by_head else kept.shape[0], heads if by_head else 1, queries, keys)
    blank = ~kept.any(-1)
    dropped = ~(kept | blank.unsqueeze(-1))
    return Scene(fusion.Masking(dropped.contiguous(), 1), pse, blank, kept)


def as_pse(bias: torch.Tensor, q: torch.Tensor, keys: int) -> torch.Tensor:
    """The bias in the queries' dtype, finite, in one of the documented shapes: [1|B, N, S, S] or [B, N, 1, S]."""
    finite = bias.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    batch = q.shape[0] if bias.shape[2] == 1 else bias.shape[0]
    return finite.expand(batch, q.shape[1], bias.shape[2], keys).contiguous()


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
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    empty: str = "zero",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    empty = empty_rows(empty, sinks)
    places = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix, "offset": offset}
    seen = scene(q, k, bias, mask, padding, documents, **places)
    q, scale = scaled(q, scale, bias)
    out, largest, total = fusion.forward(q, k, v, seen.masking, scale=scale, sinks=sinks, pse=seen.pse)
    lse = largest + total.log()
    if seen.blank is None:
        return out, fusion.packed(lse)
    rows = seen.blank.unsqueeze(-1)
    if empty in ("zero", "nan"):
        out.masked_fill_(rows, float("nan") if empty == "nan" else 0.0)
    else:
        out.copy_(torch.where(rows, mean_of(v, q.shape[1]).to(out.dtype), out))
    nothing = lse.new_full((), float("-inf")) if sinks is None else sinks.to(lse.dtype)[:, None]
    return out, fusion.packed(torch.where(seen.blank, nothing, lse))


def scaled(q: torch.Tensor, scale: float, bias: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """Queries and the operator's scale: a bias is not to be scaled, whenever the operator adds it."""
    return (q, scale) if bias is None else (q * scale, 1.0)


def mean_of(v: torch.Tensor, heads: int) -> torch.Tensor:
    """The mean of all values, for each query head: [batch, heads, 1, value_dim] in the accumulation dtype."""
    mean = v.to(accumulation_dtype(v.dtype)).mean(2, keepdim=True)
    return mean.repeat_interleave(heads // v.shape[1], dim=1)


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
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    offset: int = 0,
    empty: str = "zero",
) -> dict[str, torch.Tensor]:
    """Gradients by ``npu_fusion_attention_grad``, from the saved output and lse.

    With a bias they come from a softmax's maximum and sum that are computed again: an lse as large as a mask's most
    negative number has no digits left for the sum.
    """
    empty = empty_rows(empty, sinks)
    (out, lse), grad = outputs, grads[0]
    arguments = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    if grad is None:
        return zeros(arguments, needs)
    places = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix, "offset": offset}
    seen = scene(q, k, bias, mask, padding, documents, **places)
    rows, factor = scaled(q, scale, bias)
    largest, total = lse, None
    if bias is not None:
        _, largest, total = fusion.forward(rows, k, v, seen.masking, scale=factor, sinks=sinks, pse=seen.pse)
    if seen.blank is not None:
        largest = largest.masked_fill(seen.blank, NEVER)
        if empty == "nan":  # its product with a probability of 0 would not be 0
            out = out.masked_fill(seen.blank.unsqueeze(-1), 0.0)
    found = fusion.backward(
        grad, rows, k, v, out, largest, total, seen.masking, scale=factor, sinks=sinks, pse=seen.pse
    )
    dq = found.q if bias is None else found.q * scale
    results: dict[str, Any] = {"q": dq, "k": found.k, "v": found.v, "sinks": found.sinks}
    if "bias" in needs and bias is not None:
        softmax = largest, torch.ones_like(largest) if total is None else total
        results["bias"] = gradient_of_bias(grad, rows, k, v, out, softmax, seen, bias)
    if seen.blank is not None and empty != "zero":
        of_blank = blank_rows(grad, q, k, v, seen.blank, scale, empty)
        results |= {name: results[name] + part.to(results[name].dtype) for name, part in of_blank.items()}
    return {name: x for name, x in results.items() if name in needs}


def gradient_of_bias(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax: tuple[torch.Tensor, torch.Tensor],
    seen: Scene,
    bias: torch.Tensor,
) -> torch.Tensor:
    """``p * (grad @ v^T - rowsum(grad * out))``, summed to the bias's shape; the scores of one head at a time."""
    assert seen.pse is not None and seen.kept is not None
    acc = accumulation_dtype(q.dtype)
    groups, total = q.shape[1] // k.shape[1], torch.zeros(bias.shape, dtype=acc, device=bias.device)
    inner = (grad.to(acc) * out.to(acc)).sum(-1, keepdim=True)
    largest, denominator = (x.unsqueeze(-1) for x in softmax)
    for head in range(q.shape[1]):
        own, shared = slice(head, head + 1), slice(head // groups, head // groups + 1)
        kept = seen.kept[:, own] if seen.kept.shape[1] > 1 else seen.kept
        scores = q[:, own].to(acc) @ k[:, shared].to(acc).mT + seen.pse[:, own].to(acc)
        p = (scores - largest[:, own]).exp() / denominator[:, own]
        d = p.masked_fill(~kept, 0.0) * (grad[:, own].to(acc) @ v[:, shared].to(acc).mT - inner[:, own])
        part = total[:, own] if bias.shape[1] > 1 else total
        part += d.sum_to_size(part.shape)
    return total.to(bias.dtype)


def blank_rows(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blank: torch.Tensor,
    scale: float,
    empty: str,
) -> dict[str, torch.Tensor]:
    """What queries that keep no key add to the gradients, without a row of scores for any of them.

    Their weights are 1 / keys, or NaN. "shifted" ones have a softmax's gradient: with g of the output and m the mean
    of the values, ``d = (g . (v[t] - m)) / keys`` at key t, so ``dq = scale * sum_t d[t] k[t]`` is g times the
    covariance of values and keys, and ``dk[t] = scale * sum_s d[s, t] q[s]`` is (v[t] - m) times the sum of g q^T.
    """
    batch, heads, keys, acc = q.shape[0], q.shape[1], k.shape[2], accumulation_dtype(q.dtype)
    shape = (batch, k.shape[1], heads // k.shape[1])
    rows = blank.expand(batch, heads, -1).unsqueeze(-1)
    if empty == "nan":
        lost = rows.unflatten(1, shape[1:]).any(2).any(2, keepdim=True)
        return {"v": torch.zeros_like(v, dtype=acc).masked_fill(lost, float("nan"))}
    g = grad.to(acc).masked_fill(~rows, 0.0).unflatten(1, shape[1:])
    found = {"v": g.sum((2, 3)).unsqueeze(2) / keys}
    if empty == "shifted":
        q, k, v = (x.to(acc) for x in (q, k, v))
        centred = v - v.mean(2, keepdim=True)
        covariance = (centred.mT @ k).unsqueeze(2) * (scale / keys)
        found["q"] = (g @ covariance).flatten(1, 2)
        together = g.mT @ q.unflatten(1, shape[1:])
        found["k"] = centred @ together.sum(2) * (scale / keys)
    return found
