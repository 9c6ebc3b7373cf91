"""``sparse_attention`` by torch_npu's ``npu_fusion_attention``: one shared head of keys, which are the values too.

A window alone costs no mask tensor. With compressed entries they stand behind the keys of the window, and a mask
tensor [queries, keys + entries] says which of both a query sees: right for every call, and dense.
"""

from __future__ import annotations

from typing import Any

import torch

from kreg.kernels.attention import npu as proven
from kreg.kernels.attention import npu_masked as masked
from kreg.registry.ops.attention import band
from kreg.registry.ops.sparse_attention import ready, selection


def windowed(
    q: torch.Tensor,
    kv: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    scale: float,
    window: int,
    offset: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op without compressed entries and padding."""
    shared = kv.unsqueeze(1)
    return proven.forward(q, shared, shared, scale=scale, sinks=sinks, causal=True, window=window, offset=offset)


def windowed_backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    kv: torch.Tensor,
    sinks: torch.Tensor | None = None,
    scale: float,
    window: int,
    offset: int = 0,
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """Its gradients; that of the shared head is the sum of the keys' and the values'."""
    shared = kv.unsqueeze(1)
    found = proven.backward(
        grads,
        outputs,
        inner_needs(needs),
        q=q,
        k=shared,
        v=shared,
        scale=scale,
        sinks=sinks,
        causal=True,
        window=window,
        offset=offset,
    )
    return gathered(found, needs, kv)


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    keys = every_key(kv, compressed)
    mask = seen(q.shape[2], kv, compressed, indices, padding, window=window, ratio=ratio, offset=offset)
    return masked.forward(q, keys, keys, mask=mask, sinks=sinks, scale=scale)


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> dict[str, torch.Tensor]:
    """Its gradients."""
    keys = every_key(kv, compressed)
    mask = seen(q.shape[2], kv, compressed, indices, padding, window=window, ratio=ratio, offset=offset)
    found = masked.backward(
        grads, outputs, inner_needs(needs), q=q, k=keys, v=keys, mask=mask, sinks=sinks, scale=scale
    )
    return gathered(found, needs, kv)


def every_key(kv: torch.Tensor, compressed: torch.Tensor | None) -> torch.Tensor:
    """The window's keys and the compressed entries as one head: [batch, 1, keys + entries, head_dim]."""
    return (kv if compressed is None else torch.cat([kv, compressed], dim=1)).unsqueeze(1)


def seen(
    queries: int,
    kv: torch.Tensor,
    compressed: torch.Tensor | None,
    indices: torch.Tensor | None,
    padding: torch.Tensor | None,
    *,
    window: int,
    ratio: int,
    offset: int,
) -> torch.Tensor:
    """Which keys and entries each query sees: bool [1|batch, 1, queries, keys + entries]."""
    near = band(queries, kv.shape[1], causal=True, window=window, offset=offset, device=kv.device)
    assert near is not None
    near = near.unsqueeze(0)
    if padding is not None:
        near = near & padding.unsqueeze(1)
    if compressed is None:
        return near.unsqueeze(1)
    entries = compressed.shape[1]
    if indices is not None:
        far = selection(indices, entries)
    else:
        far = ready(queries, entries, ratio=ratio, offset=offset, device=kv.device).unsqueeze(0)
    batch = max(near.shape[0], far.shape[0])
    return torch.cat([x.expand(batch, -1, -1) for x in (near, far)], dim=-1).unsqueeze(1)


def inner_needs(needs: frozenset[str]) -> frozenset[str]:
    """The gradients that attention over one shared head is asked for."""
    return needs & {"q", "sinks"} | (frozenset("kv") if needs & {"kv", "compressed"} else frozenset())


def gathered(found: dict[str, torch.Tensor], needs: frozenset[str], kv: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of attention as those of the op."""
    results = dict(found)
    if "k" in found:
        both = (found["k"] + found["v"]).squeeze(1)
        results["kv"], results["compressed"] = both[:, : kv.shape[1]], both[:, kv.shape[1] :]
    return {name: x for name, x in results.items() if name in needs}
