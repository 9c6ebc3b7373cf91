"""``npu_fusion_attention`` and its gradient, with arguments and results laid out as kreg's attention has them.

Facts are those of torch_npu 2.13's own documentation of the two operators. They take [batch, position, head, dim]
("BSND"), which is how kreg's attention stores its output, and most models their queries: then nothing is copied.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from kreg.registry.ops.attention import accumulation_dtype

LAYOUT = "BSND"

UNLIMITED = 2147483647
"""``pre_tockens`` and ``next_tockens`` that bound nothing."""

TRIANGLE = 2048
"""Side of the mask that stands for a causal or band mask of any size (``sparse_mode`` 2, 3 and 4)."""

LANES = 8
"""The softmax's maximum and sum are kept as this many equal numbers."""


def operators() -> Any:
    """``torch.ops.npu``, with torch_npu's operators in it."""
    importlib.import_module("torch_npu")
    return torch.ops.npu


@dataclass(frozen=True)
class Masking:
    """The mask in the operator's own words.

    Attributes:
        atten_mask: bool, True where a key is dropped; None: every query sees every key.
        sparse_mode: 1 takes ``atten_mask`` as it is, [1|batch, 1|heads, queries, keys]. 2, 3 and 4 take `triangle`:
            2 keeps keys ``t <= s``, 3 keeps ``t <= s + keys - queries``, and 4 keeps
            ``-pre_tockens <= t - (s + keys - queries) <= next_tockens``.
    """

    atten_mask: torch.Tensor | None = None
    sparse_mode: int = 0
    pre_tockens: int = UNLIMITED
    next_tockens: int = UNLIMITED

    @property
    def arguments(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {
            "atten_mask": self.atten_mask,
            "sparse_mode": self.sparse_mode,
            "pre_tockens": self.pre_tockens,
            "next_tockens": self.next_tockens,
        }


def triangle(device: torch.device) -> torch.Tensor:
    """The compressed mask: bool [2048, 2048], True above the diagonal."""
    place = torch.arange(TRIANGLE, device=device)
    return place > place.unsqueeze(1)


def band(queries: int, keys: int, *, causal: bool, window: int, offset: int, device: torch.device) -> Masking:
    """A causal mask or a window without a tensor of their size.

    A window's origin is the bottom right corner: query s then stands at ``s + keys - queries``.

    Raises:
        ValueError: the queries stand where no mode of the operator has them.
    """
    if not causal and not window:
        return Masking()
    if offset != keys - queries and (window or offset):
        raise ValueError(
            f"npu_fusion_attention: {queries} queries at positions from {offset} on, before {keys} keys; without a "
            f"mask tensor they have to be the last {queries} positions"
        )
    if window:
        return Masking(triangle(device), 4, window - 1, 0 if causal else window - 1)
    return Masking(triangle(device), 3 if offset else 2)


def laid_out(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, positions, dim] as the operator takes it."""
    return x.transpose(1, 2).contiguous()


def packed(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the usual strides where a dimension has one element, too."""
    return x.contiguous().flatten().view(x.shape)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masking: Masking,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    pse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [batch, heads, queries, value_dim], and the softmax's maximum and sum, float32 [batch, heads, queries]."""
    out, largest, total, *_ = operators().npu_fusion_attention(
        laid_out(q),
        laid_out(k),
        laid_out(v),
        q.shape[1],
        LAYOUT,
        pse=pse,
        scale=scale,
        sink=None if sinks is None else sinks.to(accumulation_dtype(q.dtype)),
        **masking.arguments,
    )
    return out.transpose(1, 2), largest[..., 0], total[..., 0]


@dataclass(frozen=True)
class Gradients:
    """Of q, k and v in their shapes; of the sinks float32 [heads], where there are any."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor | None,
    masking: Masking,
    *,
    scale: float,
    sinks: torch.Tensor | None = None,
    pse: torch.Tensor | None = None,
) -> Gradients:
    """The gradients, from the output and the softmax's maximum and sum.

    The operator computes probabilities ``exp(s - maximum) / sum``. So the log of the denominator may be given for
    the maximum, and None, which is 1, for the sum: ``exp(s - lse) / 1``.
    """
    maxima = lanes(largest)
    dq, dk, dv, _, dsinks = operators().npu_fusion_attention_grad(
        laid_out(q),
        laid_out(k),
        laid_out(v),
        laid_out(grad),
        q.shape[1],
        LAYOUT,
        pse=pse,
        softmax_max=maxima,
        softmax_sum=torch.ones_like(maxima) if total is None else lanes(total),
        attention_in=laid_out(out),
        scale_value=scale,
        sink=None if sinks is None else sinks.to(accumulation_dtype(q.dtype)),
        **masking.arguments,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return Gradients(dq, dk, dv, None if sinks is None else dsinks)


def lanes(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, queries] as [batch, heads, queries, 8]."""
    return x.unsqueeze(-1).repeat(1, 1, 1, LANES)
