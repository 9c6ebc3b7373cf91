"""A call of ``sparse_attention`` as its Triton kernels take it: tensors, which entries are seen, block sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from triton import next_power_of_2

from kreg.kernels.gpu import Config, Table, Target

TABLE = Table.read(Path(__file__).parent / "tuning/triton.yaml")

INTERPRETED_PROCESSORS = 1
"""How many programs fill what is no GPU."""


def processors(device: torch.device) -> int:
    """How many programs a device runs side by side, at least: its multiprocessors (compute units)."""
    if device.type == "meta":
        return 132  # an H100's: what is built ahead of time is split as there
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def channel_blocks(dim: int, bytes: int = 2) -> tuple[int, int]:
    """A power of two, at least 16, and a smaller one or 0, that hold ``dim`` channels of so many bytes together.

    Wide heads in float32 are one block: two take more registers than there are.
    """
    first = 1 << (dim.bit_length() - 1)
    rest = max(16, next_power_of_2(dim - first)) if dim > first else 0
    if first < 16:
        return 16, 0
    return (first, rest) if rest < first and not (bytes == 4 and dim > 256) else (2 * first if rest else first, 0)


def dense_rows(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x`` with neighbouring channels side by side, copied only if they are not."""
    x = x if dtype is None else x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


@dataclass(frozen=True)
class Call:
    """The tensors of a call as the kernels take them.

    Attributes:
        q: [batch, heads, queries, head_dim]; kv: [batch, keys, head_dim] or None, where there is no window;
            compressed: [batch, entries, head_dim], or, where ``page``, [batch, blocks, page, head_dim]; indices:
            [batch, queries, selected]; padding: uint8 [batch, keys].
        mode: "window", "ready" or "selected": which entries are seen.
    """

    q: torch.Tensor
    kv: torch.Tensor | None
    compressed: torch.Tensor | None
    indices: torch.Tensor | None
    sinks: torch.Tensor | None
    padding: torch.Tensor | None
    scale: float
    window: int
    ratio: int
    offset: int
    page: int = 0

    @staticmethod
    def of(
        q: torch.Tensor,
        kv: torch.Tensor | None,
        compressed: torch.Tensor | None,
        indices: torch.Tensor | None,
        sinks: torch.Tensor | None,
        padding: torch.Tensor | None,
        *,
        scale: float,
        window: int,
        ratio: int,
        offset: int,
        page: int = 0,
    ) -> Call:
        """What is not there, or empty, is None; tensors of several dtypes get the widest."""
        if compressed is not None and not compressed.numel():
            compressed = None
        if indices is not None and not indices.numel():
            compressed = None
        dtype = q.dtype
        for other in (kv, compressed):
            dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
        return Call(
            dense_rows(q, dtype),
            None if kv is None else dense_rows(kv, dtype),
            None if compressed is None else dense_rows(compressed, dtype),
            None if indices is None or compressed is None else dense_rows(indices),
            None if sinks is None else sinks.contiguous(),
            None if padding is None else dense_rows(padding).view(torch.uint8),
            scale,
            window,
            ratio,
            offset,
            page,
        )

    @property
    def mode(self) -> str:
        if self.compressed is None:
            return "window"
        return "ready" if self.indices is None else "selected"

    @property
    def entries(self) -> int:
        if self.compressed is None:
            return 0
        return self.compressed.shape[1] * (self.page or 1)

    def part(self, start: int, stop: int) -> Call:
        """The same for the queries ``start`` to ``stop``."""
        indices = None if self.indices is None else self.indices[:, start:stop]
        return replace(self, q=self.q[:, :, start:stop], indices=indices, offset=self.offset + start)

    def longest(self) -> int:
        """The most keys that a query sees in one of the ranges."""
        span = 0 if self.kv is None else min(self.window, self.kv.shape[1])
        if self.mode == "selected":
            assert self.indices is not None
            return max(span, self.indices.shape[2])
        return max(span, self.entries)

    def pick(self, kernel: str, target: Target, one_query: bool) -> Config:
        """The configuration for this call; ``one_query``: whether all rows of a program are heads of one query."""
        heads, queries, dim = self.q.shape[1:]
        rows = heads if one_query else heads * queries
        rows = max(16, min(128, next_power_of_2(rows)))
        return TABLE.pick(kernel, target, head_dim=dim, rows=rows, bytes=self.q.element_size())

    def block_heads(self, rows: int) -> int:
        """Heads in a program of so many rows; selections differ from query to query, so there all are of one."""
        return rows if self.mode == "selected" else min(rows, next_power_of_2(self.q.shape[1]))

    def arguments(self) -> dict[str, object]:
        """What every kernel over rows of queries takes."""
        _, heads, queries, dim = self.q.shape
        kv, compressed, indices = self.kv, self.compressed, self.indices
        block_d, block_e = channel_blocks(dim, self.q.element_size())
        return {
            "q": self.q,
            "kv": kv,
            "compressed": compressed,
            "indices": indices,
            "padding": self.padding,
            "scale": self.scale,
            "window": self.window,
            "offset": self.offset,
            "queries": queries,
            "heads": heads,
            "keys": 0 if kv is None else kv.shape[1],
            "entries": self.entries,
            "selected": 0 if indices is None else indices.shape[2],
            "q_batch": self.q.stride(0),
            "q_head": self.q.stride(1),
            "q_query": self.q.stride(2),
            "kv_batch": 0 if kv is None else kv.stride(0),
            "kv_key": 0 if kv is None else kv.stride(1),
            "compressed_batch": 0 if compressed is None else compressed.stride(0),
            "compressed_entry": 0 if compressed is None else compressed.stride(-2),
            "compressed_page": compressed.stride(1) if compressed is not None and self.page else 0,
            "indices_batch": 0 if indices is None else indices.stride(0),
            "indices_query": 0 if indices is None else indices.stride(1),
            "padding_batch": 0 if self.padding is None else self.padding.stride(0),
            "HEAD_DIM": dim,
            "RATIO": self.ratio if self.mode == "ready" else 0,
            "MODE": self.mode,
            "WINDOW": kv is not None,
            "PADDING": self.padding is not None,
            "PAGE": self.page,
            "BLOCK_D": block_d,
            "BLOCK_E": block_e,
        }
