"""What kernels of sparse ops are measured against: code as transformers writes it, the same compiled, FlexAttention.

The eager forms do what transformers 5.23's modelling code does, step by step: keys and values repeated for every head,
scores as a tensor of their own, the mask added, the sink one more column, weights in the dtype of the queries. A test
holds them against that code. Each makes a call that does a case's work once; `Skip` says why one is not made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kreg.bench.gpu_case import Case

Call = Callable[[], object]
Forward = Callable[[], torch.Tensor]


class Skip(Exception):
    """Why something is not measured, in words."""


def eager(case: Case, given: dict[str, Any], compiled: bool = False) -> Forward:
    """The forward as transformers writes it, masks and all, from the op's arguments.

    Raises:
        Skip: its scores would not fit into memory.
    """
    wide = case.sizes.index_heads if case.op == "lightning_indexer" else case.sizes.heads
    keys = case.entries if case.op == "lightning_indexer" else given["kv"].shape[1] + case.entries
    copies = 3 if case.op == "lightning_indexer" else 4
    element = 4 if case.op == "lightning_indexer" else given["q"].element_size()
    scores = case.batch * wide * case.queries * keys * element * copies
    repeated = 0 if case.op == "lightning_indexer" else 2 * case.batch * wide * keys * case.sizes.head_dim * element
    fits(scores + repeated, given["q"].device)  # keys and values are repeated for each head
    if case.op == "lightning_indexer":
        return _eager_indexer(case, given, compiled)
    return _eager_attention(case, given, compiled)


def _eager_attention(case: Case, given: dict[str, Any], compiled: bool) -> Forward:
    keys, mask = keys_and_mask(case, given)
    additive = torch.zeros(mask.shape, dtype=given["q"].dtype, device=mask.device)
    additive.masked_fill_(~mask, torch.finfo(additive.dtype).min)
    heads, scale = case.sizes.heads, given["scale"]

    def attend(q: torch.Tensor, kv: torch.Tensor, bias: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        repeated = kv[:, None].expand(-1, heads, -1, -1).clone()
        scores = q @ repeated.transpose(2, 3) * scale + bias[:, None]
        sink = sinks.view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
        values = kv[:, None].expand(-1, heads, -1, -1).clone()
        return (weights @ values).transpose(1, 2).contiguous()

    run = fresh(attend) if compiled else attend
    return lambda: run(given["q"], keys(), additive, given["sinks"])


def _eager_indexer(case: Case, given: dict[str, Any], compiled: bool) -> Forward:
    position = torch.arange(case.queries, device=given["q"].device) + given["offset"]
    threshold = ((position + 1) // case.ratio)[:, None]
    scale = given["scale"]

    def pick(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        by_head = torch.relu(q.float() @ k.float().transpose(-1, -2).unsqueeze(1)) * scale
        scores = (by_head * weights.float().unsqueeze(-1)).sum(dim=2)
        entry = torch.arange(scores.shape[-1], device=scores.device)
        best = scores.masked_fill(entry >= threshold, float("-inf")).topk(case.selected, dim=-1).indices
        return torch.where(best >= threshold, -1, best)

    run = fresh(pick) if compiled else pick
    return lambda: run(given["q"], given["k"], given["weights"])


def flex(case: Case, given: dict[str, Any]) -> Forward:
    """FlexAttention over window and entries side by side; a selection is a mask that it reads."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    device = given["q"].device
    keys, count = keys_of(given), given["kv"].shape[1]
    window, offset, ratio = case.sizes.window, given["offset"], max(1, case.ratio)
    chosen = selected_mask(case, given) if case.layer == "selected" else None

    def keeps(b: Any, h: Any, row: Any, key: Any) -> Any:
        position, entry = row + offset, key - count
        near = (key <= position) & (key > position - window) & (key < count)
        if chosen is None:
            return near | ((key >= count) & ((entry + 1) * ratio <= position + 1))
        return near | ((key >= count) & chosen[b, row, entry.clamp(min=0)])

    compiles = device.type != "cpu"
    blocks = create_block_mask(
        keeps, case.batch, None, case.queries, count + case.entries, device=str(device), _compile=compiles
    )
    run: Any = fresh(flex_attention) if compiles else flex_attention
    sinks = given["sinks"].float()[:, None]

    def attend() -> torch.Tensor:
        kv = keys()[:, None]
        out, extra = run(
            given["q"],
            kv,
            kv,
            block_mask=blocks,
            scale=given["scale"],
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        share = torch.sigmoid(extra.lse - sinks).unsqueeze(-1)
        scaled: torch.Tensor = (out * share).to(out.dtype).transpose(1, 2)
        return scaled

    return attend


def fresh(function: Any) -> Any:
    """Compiled for this case alone: after several shapes Dynamo would run the function as it is, and say nothing."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def keys_and_mask(case: Case, given: dict[str, Any]) -> tuple[Forward, torch.Tensor]:
    """Keys and entries in one tensor, and which of them each query sees: bool [batch, queries, keys]."""
    device, count = given["q"].device, given["kv"].shape[1]
    position = torch.arange(case.queries, device=device).unsqueeze(1) + given["offset"]
    key = torch.arange(count, device=device)
    near = ((key <= position) & (key > position - case.sizes.window)).expand(case.batch, -1, -1)
    if not case.ratio:
        return keys_of(given), near
    if case.layer == "selected":
        entries = selected_mask(case, given)
    else:
        entry = torch.arange(case.entries, device=device)
        entries = ((entry + 1) * case.ratio <= position + 1).expand(case.batch, -1, -1)
    return keys_of(given), torch.cat([near, entries], dim=-1)


def keys_of(given: dict[str, Any]) -> Forward:
    """Window and entries in one tensor: joined in each call, as the model joins them."""
    if given.get("compressed") is None:
        return lambda: given["kv"]
    return lambda: torch.cat([given["kv"], given["compressed"]], dim=1)


def selected_mask(case: Case, given: dict[str, Any]) -> torch.Tensor:
    """The selection as a bool mask [batch, queries, entries]."""
    size = case.batch * case.queries * (case.entries + 1)
    fits(2 * size, given["q"].device)
    chosen = torch.zeros(case.batch, case.queries, case.entries + 1, dtype=torch.bool, device=given["q"].device)
    indices = given["indices"]
    chosen.scatter_(-1, torch.where(indices < 0, case.entries, indices), True)
    return chosen[..., : case.entries]


def fits(needed: int, device: torch.device) -> None:
    """Raises Skip for what memory cannot hold; where its size is not known, 64 GiB are taken for it."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 64 * 2**30
    if needed > 0.9 * free:
        raise Skip(f"needs about {needed / 2**30:,.0f} GiB of scores and masks, {free / 2**30:,.0f} are free")
