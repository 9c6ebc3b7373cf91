"""``attention`` by PyTorch's fused kernels for NVIDIA GPUs: FlashAttention 2 and memory-efficient attention.

torch's operators are called beneath ``scaled_dot_product_attention``, because the op returns the log-sum-exp, and a
gradient from a saved output and lse costs no second forward. A causal mask ends at the last query and key in the first,
and begins at the first query and key in the other: cuda.yaml asks for offsets that are just that. Then every query sees
a key, and ``empty`` never asks for anything.

A sink rescales the output and raises the lse. The gradient needs nothing new for it: it is that of weights
``exp(s - lse)`` and of the output that they give, and both are what was saved.
"""

from __future__ import annotations

from typing import Any

import torch

from kreg.kernels.attention.flex import as_the_op_stores, with_sinks

LSE_ROWS = 32
"""Memory-efficient attention wants its lse in as many rows, filled up with infinity."""


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: None = None,
    mask: None = None,
    sinks: torch.Tensor | None = None,
    padding: None = None,
    documents: None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse by FlashAttention 2; causal masks and windows are aligned at the last query and key."""
    left, right = sides(causal, window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(dense(x).transpose(1, 2) for x in (q, k, v)),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return finished(out.transpose(1, 2), lse, sinks)


def flash_backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    scale: float,
    causal: bool = False,
    window: int = 0,
    **rest: Any,
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output and lse."""
    grad, (out, lse) = grads[0], outputs
    arguments = {"q": q, "k": k, "v": v, "sinks": sinks}
    if grad is None:
        return zeros(arguments, needs)
    found: dict[str, torch.Tensor] = {}
    if needs & {"q", "k", "v"}:
        left, right = sides(causal, window)
        parts = torch.ops.aten._flash_attention_backward(
            *(dense(x).transpose(1, 2) for x in (grad, q, k, v)),
            out.transpose(1, 2),
            lse,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            torch.empty(2, dtype=torch.uint64, device=q.device),  # of dropout, of which there is none
            torch.empty((), dtype=torch.uint64, device=q.device),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        found = {name: part.transpose(1, 2) for name, part in zip("qkv", parts, strict=True)}
    return {name: sinks_gradient(grad, out, lse, sinks) if name == "sinks" else found[name] for name in needs}


def efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: None = None,
    mask: None = None,
    sinks: torch.Tensor | None = None,
    padding: None = None,
    documents: None = None,
    *,
    scale: float,
    causal: bool = False,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse by memory-efficient attention; a causal mask is aligned at the first query and key."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(dense(x) for x in (q, k, v)), None, True, 0.0, causal, scale=scale
    )
    return finished(out, lse, sinks)


def efficient_backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    scale: float,
    causal: bool = False,
    **rest: Any,
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output and lse."""
    grad, (out, lse) = grads[0], outputs
    arguments = {"q": q, "k": k, "v": v, "sinks": sinks}
    if grad is None:
        return zeros(arguments, needs)
    found: dict[str, torch.Tensor] = {}
    if needs & {"q", "k", "v"}:
        missing = -lse.shape[2] % LSE_ROWS
        rows = torch.nn.functional.pad(lse, (0, missing), value=float("inf")) if missing else lse
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
        parts = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *(dense(x) for x in (grad, q, k, v)),
            None,
            out,
            rows,
            seed,
            seed,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
        found = dict(zip("qkv", parts, strict=False))
    return {name: sinks_gradient(grad, out, lse, sinks) if name == "sinks" else found[name] for name in needs}


def sides(causal: bool, window: int) -> tuple[int | None, int | None]:
    """How many keys a query sees before and after its own; None: all that the causal mask leaves.

    Without a window both are None, causal or not: only then does FlashAttention take the heads that share a key for
    rows of one product where there is one query.
    """
    if not window:
        return None, None
    return window - 1, 0 if causal else window - 1


def dense(x: torch.Tensor) -> torch.Tensor:
    """With adjacent elements in a row, and rows at multiples of 16 bytes: FlashAttention reads as many at once.

    Elsewhere it would read at an address that is not aligned, after which nothing more runs on the device.
    """
    unit = 16 // x.element_size()
    steps = (step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)
    aligned = x.stride(-1) == 1 and x.storage_offset() % unit == 0 and not any(step % unit for step in steps)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def finished(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """With the sink, without rows that were filled up, stored as the op's results are."""
    lse = lse[..., : out.shape[2]].contiguous()
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return as_the_op_stores(out), lse


def sinks_gradient(
    grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """A sink takes the share ``exp(sink - lse)`` from every output: ``-sum(share * (grad . out))``, by head."""
    assert sinks is not None
    inner = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    share = torch.exp(sinks.to(lse.dtype).unsqueeze(1) - lse)
    return -(share * inner).sum((0, 2)).to(sinks.dtype)


def zeros(arguments: dict[str, torch.Tensor | None], needs: frozenset[str]) -> dict[str, torch.Tensor]:
    """No gradient at all."""
    return {name: torch.zeros_like(x) for name, x in arguments.items() if name in needs and x is not None}
