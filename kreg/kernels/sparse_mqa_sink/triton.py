"""``sparse_mqa_sink`` on CUDA and ROCm GPUs, in Triton: the forward of ``sparse_attention`` without a window."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kreg.kernels.gpu import Launch, Target, record
from kreg.kernels.sparse_attention.triton import attend
from kreg.kernels.sparse_attention.triton_call import TABLE, Call

BORROWED = (TABLE,)


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    topk_indices: torch.Tensor,
    attn_sink: torch.Tensor | None = None,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Output of the op. Tokens are the queries of one batch, and all slots its entries."""
    blocks, block = kv.shape[:2]
    evenly = blocks <= 1 or kv.stride(0) == block * kv.stride(1)
    slots = kv.unsqueeze(0) if not evenly else kv.view(1, blocks * block, kv.shape[2])
    call = Call.of(
        q.transpose(0, 1).unsqueeze(0),
        None,
        slots,
        topk_indices.unsqueeze(0),
        attn_sink,
        None,
        scale=scale,
        window=1,
        ratio=0,
        offset=0,
        page=0 if evenly else block,
    )
    return (attend(call, q.dtype)[0].squeeze(0),)


def builds(target: Target) -> Iterator[Launch]:
    """Decoding with 64 heads of 512 channels, 64 requests, 512 slots of each; pages side by side and apart."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q = torch.empty(64, 64, 512, dtype=dtype, device="meta")
        pages = torch.empty(4096, 64, 512, dtype=dtype, device="meta")
        indices = torch.empty(64, 512, dtype=torch.int32, device="meta")
        sink = torch.empty(64, dtype=torch.float32, device="meta")
        for kv in (pages, pages[:, :32]):
            yield from record(target, forward, q, kv, indices, sink, scale=0.04)
