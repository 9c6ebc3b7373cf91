"""The backward of ``sparse_attention`` in Triton: which kernels run, over what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import cdiv, next_power_of_2

from kreg.kernels.gpu import current_target, launch
from kreg.kernels.sparse_attention.triton_backward import delta_kernel, query_kernel
from kreg.kernels.sparse_attention.triton_backward_keys import key_kernel, segment_kernel
from kreg.kernels.sparse_attention.triton_call import TABLE, Call, channel_blocks, dense_rows, processors

MOST_KEY_SPLITS = 64
"""Parts of the gradient of a tile of keys: each costs a float32 copy of it."""

PAIR_BYTES = 1 << 28
"""Memory for the gradients of what each query selected, before they are added up in order."""


@dataclass(frozen=True)
class Saved:
    """What the forward left, and the gradients it gets.

    Attributes:
        grad: of the output, [batch, heads, queries, head_dim], in the dtype of the products.
        lse, delta: float32 [batch, heads, queries], with equal strides, queries side by side.
    """

    grad: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor

    @staticmethod
    def of(
        call: Call, grad: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
    ) -> Saved:
        """With delta computed: rowsum(grad * out) - grad_lse."""
        batch, heads, queries, dim = call.q.shape
        grad, out, lse = dense_rows(grad, call.q.dtype), dense_rows(out), lse.contiguous()
        delta = torch.empty_like(lse)
        config = TABLE.pick("delta_kernel", current_target(out.device))
        block_h = min(config["BLOCK_M"], next_power_of_2(heads))
        block_d, block_e = channel_blocks(dim)
        launch(
            delta_kernel,
            (cdiv(queries, config["BLOCK_M"] // block_h), cdiv(heads, block_h), batch),
            config,
            out=out,
            grad=grad,
            grad_lse=grad_lse,
            delta=delta,
            queries=queries,
            heads=heads,
            **strides("out", out),
            **strides("grad", grad),
            **({"lse_batch": 0, "lse_head": 0, "lse_query": 0} if grad_lse is None else strides("lse", grad_lse)),
            HEAD_DIM=dim,
            LSE=grad_lse is not None,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            BLOCK_E=block_e,
        )
        return Saved(grad, lse, delta)

    def part(self, start: int, stop: int) -> Saved:
        """The queries ``start`` to ``stop``."""
        return Saved(self.grad[:, :, start:stop], self.lse[:, :, start:stop], self.delta[:, :, start:stop])

    def arguments(self) -> dict[str, object]:
        """As the kernels take them."""
        rows = {"lse_batch": self.lse.stride(0), "lse_head": self.lse.stride(1)}
        return {"grad": self.grad, "lse": self.lse, "delta": self.delta, **strides("grad", self.grad), **rows}


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """Strides of batch, heads and queries."""
    return {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_query": x.stride(2)}


def grad_of_sinks(sinks: torch.Tensor, saved: Saved) -> torch.Tensor:
    """Of each head's sink: minus its weight in every softmax, times delta."""
    weight = torch.exp(sinks.float().unsqueeze(1) - saved.lse)
    weight = weight.masked_fill(saved.lse.isneginf(), 0.0)  # the sink is -inf, and nothing is seen
    return -(weight * saved.delta).sum((0, 2))


def queries(
    call: Call, saved: Saved, grad_q: torch.Tensor | None, grad_entries: torch.Tensor | None, scatter: str
) -> None:
    """The gradient of q, into ``grad_q``, and of selected entries, as ``scatter`` says, into ``grad_entries``."""
    target = current_target(call.q.device)
    one_query = call.mode == "selected"
    config = call.pick("query_kernel", target, one_query)
    if grad_q is not None and grad_entries is not None and not config["FUSED"]:
        queries(call, saved, grad_q, None, "")
        grad_q = None
    batch, heads, count, _ = call.q.shape
    block_h = call.block_heads(config["BLOCK_M"])
    programs = batch * cdiv(count, config["BLOCK_M"] // block_h) * cdiv(heads, block_h)
    launch(
        query_kernel,
        (programs,),
        config,
        **call.arguments(),
        **saved.arguments(),
        **({"gq_batch": 0, "gq_head": 0, "gq_query": 0} if grad_q is None else strides("gq", grad_q)),
        grad_q=grad_q,
        grad_entries=grad_entries,
        batch=batch,
        DQ=grad_q is not None,
        SCATTER=scatter,
        BLOCK_H=block_h,
    )


def in_order(call: Call, saved: Saved, grad_q: torch.Tensor | None, grad_entries: torch.Tensor) -> None:
    """As `queries`, adding to each entry in a fixed order: some queries at a time, their parts sorted by entry."""
    assert call.indices is not None
    target = current_target(call.q.device)
    batch, heads, count, dim = call.q.shape
    selected = call.indices.shape[2]
    config = TABLE.pick("segment_kernel", target)
    block_m = call.pick("query_kernel", target, True)["BLOCK_M"]
    parts = cdiv(heads, block_m)
    step = max(1, PAIR_BYTES // (4 * parts * batch * selected * dim))
    for start in range(0, count, step):
        stop = min(count, start + step)
        some = call.part(start, stop)
        assert some.indices is not None
        pairs = grad_entries.new_empty(parts, batch * (stop - start) * selected, dim)
        queries(some, saved.part(start, stop), None if grad_q is None else grad_q[:, :, start:stop], pairs, "store")
        order, starts = by_entry(some.indices, call.entries)
        launch(
            segment_kernel,
            (batch * call.entries, cdiv(dim, config["BLOCK_C"])),
            config,
            pairs=pairs,
            order=order,
            starts=starts,
            grad_entries=grad_entries,
            parts=parts,
            count=pairs.shape[1],
            HEAD_DIM=dim,
        )


def by_entry(indices: torch.Tensor, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places in ``indices`` sorted by (batch, entry), and where each of these starts among them."""
    batch = indices.shape[0]
    first = torch.arange(batch, device=indices.device).view(-1, 1, 1) * entries
    there = (indices >= 0) & (indices < entries)
    owner = torch.where(there, indices + first, batch * entries).flatten()
    owner, order = torch.sort(owner, stable=True)
    return order, torch.searchsorted(owner, torch.arange(batch * entries + 1, device=indices.device))


def keys(call: Call, saved: Saved, *, ready: bool) -> torch.Tensor:
    """The gradient of kv, or of entries that are seen once ``ready``."""
    target = current_target(call.q.device)
    of = call.compressed if ready else call.kv
    assert of is not None
    config = call.pick("key_kernel", target, False)
    batch, heads, length, dim = call.q.shape
    count = of.shape[1]
    block_h = min(config["BLOCK_M"], next_power_of_2(heads))
    block_q = config["BLOCK_M"] // block_h
    programs = batch * cdiv(count, config["BLOCK_N"])
    reach = length if ready else min(length, call.window + config["BLOCK_N"])
    steps = cdiv(reach, block_q) * cdiv(heads, block_h)
    splits = max(1, min(2 * processors(call.q.device) // max(programs, 1), MOST_KEY_SPLITS, steps // 4))
    arguments = call.arguments()
    names = ("q", "scale", "window", "offset", "queries", "heads", "q_batch", "q_head", "q_query", "padding_batch")
    found = of.new_empty(splits, batch, count, dim, dtype=torch.float32 if splits > 1 else of.dtype)
    launch(
        key_kernel,
        (programs, splits),
        config,
        **{name: arguments[name] for name in (*names, "HEAD_DIM", "BLOCK_D", "BLOCK_E")},
        **saved.arguments(),
        keys=of,
        padding=None if ready else call.padding,
        grad_keys=found,
        count=count,
        batch=batch,
        splits=splits,
        keys_batch=of.stride(0),
        keys_key=of.stride(1),
        RATIO=call.ratio if ready else 0,
        READY=ready,
        PADDING=call.padding is not None and not ready,
        BLOCK_H=block_h,
    )
    return found[0] if splits == 1 else found.sum(0)
