"""Which keys each op keeps, by its own helpers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kreg.registry.ops import ATTENTION, SELECTED_ATTENTION, SPARSE_ATTENTION
from kreg.registry.ops.attention import band, documents_of_queries
from kreg.registry.ops.selected_attention import named
from kreg.registry.ops.sparse_attention import ready, selection

Tensors = Mapping[str, torch.Tensor]
Told = Mapping[str, Any]
CPU = torch.device("cpu")
BAND = ("causal", "window", "chunk", "prefix", "offset")


def _attention_keeps(given: Tensors, told: Told, queries: int, keys: int) -> torch.Tensor:
    kept = band(queries, keys, device=CPU, **{name: told[name] for name in BAND})
    kept = torch.ones(1, 1, dtype=torch.bool) if kept is None else kept
    kept = kept[None, None]
    if "padding" in given:
        kept = kept & given["padding"][:, None, None, :]
    if "documents" in given:
        documents = given["documents"]
        of_queries = documents_of_queries(documents, queries, told["offset"])
        kept = kept & (of_queries[:, None, :, None] == documents[:, None, None, :])
    return kept & given["mask"] if "mask" in given else kept


def _sparse_keeps(given: Tensors, told: Told, queries: int, keys: int) -> torch.Tensor:
    kept = band(queries, keys, causal=True, window=told["window"], offset=told["offset"], device=CPU)
    assert kept is not None
    kept = kept[None]
    if "padding" in given:
        kept = kept & given["padding"][:, None, :]
    if "compressed" in given:
        entries = given["compressed"].shape[1]
        seen = ready(queries, entries, ratio=told["ratio"], offset=told["offset"], device=CPU)[None]
        if "indices" in given:
            seen = selection(given["indices"], entries)
        batch = max(len(kept), len(seen))
        kept = torch.cat([kept.expand(batch, -1, -1), seen.expand(batch, -1, -1)], dim=-1)
    return kept[:, None]


def _selected_keeps(given: Tensors, told: Told, queries: int, keys: int) -> torch.Tensor:
    kept = named(given["indices"], keys, told["block"])
    kept = kept.repeat_interleave(told["heads"] // kept.shape[1], dim=1)
    near = band(queries, keys, causal=told["causal"], window=told["window"], offset=told["offset"], device=CPU)
    if near is not None:
        kept = kept & near
    return kept & given["padding"][:, None, None, :] if "padding" in given else kept


@dataclass(frozen=True)
class Keeping:
    """How an op masks.

    Attributes:
        inputs: the operands that it masks with.
        drawn: those of them that are drawn, not computed: the op that made them vouches for their values.
        keeps: which keys it keeps, from those operands, its attributes and dimensions, and how many queries and keys.
    """

    inputs: tuple[str, ...]
    drawn: tuple[str, ...]
    keeps: Callable[[Tensors, Told, int, int], torch.Tensor]


OPS = {
    ATTENTION.name: Keeping(("mask", "padding", "documents"), (), _attention_keeps),
    SELECTED_ATTENTION.name: Keeping(("padding", "indices"), ("indices",), _selected_keeps),
    SPARSE_ATTENTION.name: Keeping(("padding", "indices"), ("indices",), _sparse_keeps),
}

TOLD = frozenset({*BAND, "ratio", "block"})
"""The attributes that say which keys are kept."""
