"""Which blocks of keys a block of queries has to read, from where the blocks begin and end.

FlexAttention takes this as a `BlockMask`. torch's own ``create_block_mask`` evaluates the mask at every query and key;
here intervals are compared, block by block, in time and memory that do not see the lengths themselves. A block may be
listed that turns out to keep nothing: within those that are not known to be kept wholly, the mask decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Positions:
    """The mask by where queries and keys stand; see `kreg.registry.ops.attention.band`."""

    queries: int
    keys: int
    causal: bool = False
    window: int = 0
    chunk: int = 0
    prefix: int = 0
    offset: int = 0

    @property
    def all_kept(self) -> bool:
        """Whether every query sees every key."""
        return not (self.causal or self.window or self.chunk)


def touched(at: Positions, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of blocks that may keep something, and those that keep everything: bool [query blocks, key blocks]."""
    first, last = (x.unsqueeze(1) + at.offset for x in _ends(at.queries, device))
    low, high = (x.unsqueeze(0) for x in _ends(at.keys, device))
    some = (low <= high) & (first <= last)
    every = some.clone()
    if at.causal:
        some, every = some & (low <= last), every & (high <= first)
    if at.window:
        some = some & (high > first - at.window) & (low < last + at.window)
        every = every & (low > last - at.window) & (high < first + at.window)
    if at.chunk:
        low_chunk, high_chunk = low // at.chunk, high // at.chunk
        first_chunk, last_chunk = first // at.chunk, last // at.chunk
        some = some & (high_chunk >= first_chunk) & (low_chunk <= last_chunk)
        every = every & (low_chunk == high_chunk) & (first_chunk == last_chunk) & (low_chunk == first_chunk)
    some, every = some | (low < at.prefix), every | (high < at.prefix)
    return some, every


def _ends(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last place of each block."""
    first = torch.arange(0, length, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp_(max=length - 1)


def block_mask(
    at: Positions,
    mask_mod: MaskMod,
    *,
    padding: torch.Tensor | None = None,
    of_queries: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    has_mask: bool = False,
    device: torch.device,
) -> BlockMask:
    """A `BlockMask` that lists every block in which ``mask_mod`` keeps something.

    Args:
        mask_mod: the whole mask, element by element.
        padding: bool [batch, keys].
        of_queries, documents: integers [batch, queries] and [batch, keys].
        has_mask: whether ``mask_mod`` drops more than all of these do.
    """
    some, every = (x[None] for x in touched(at, device))
    if padding is not None:
        kept = _blocks(padding.to(torch.int8), 0)
        some, every = some & kept.amax(-1).bool()[:, None], every & kept.amin(-1).bool()[:, None]
    if documents is not None and of_queries is not None:
        mine, theirs = _extent(of_queries), _extent(documents)
        own_low, own_high = (x[:, :, None] for x in mine)
        low, high = (x[:, None] for x in theirs)
        some = some & (low <= own_high) & (high >= own_low)
        every = every & (low == high) & (own_low == own_high) & (low == own_low)
    every = every & some & (not has_mask)
    # A block that sticks out at an end is never whole.
    if at.queries % BLOCK:
        every[:, -1] = False
    if at.keys % BLOCK:
        every[:, :, -1] = False
    partial, whole = some & ~every, every
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(at.queries, at.keys),
    )


def _blocks(x: torch.Tensor, filler: int) -> torch.Tensor:
    """[batch, places] as [batch, blocks, BLOCK]."""
    missing = -x.shape[1] % BLOCK
    padded = torch.nn.functional.pad(x, (0, missing), value=filler)
    return padded.view(len(x), -1, BLOCK)


def _extent(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest document of each block; the last one, where it is short, goes on as it ends."""
    missing = -documents.shape[1] % BLOCK
    going_on = torch.cat([documents, documents[:, -1:].expand(-1, missing)], dim=1)
    low, high = going_on.unflatten(1, (-1, BLOCK)).aminmax(dim=-1)
    return low, high


def _ordered(listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row lists, and which, first: int32 [batch, 1, rows] and [batch, 1, rows, blocks]."""
    dense = listed.unsqueeze(1).to(torch.int8)
    order = torch.argsort(dense, dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), order.to(torch.int32)
