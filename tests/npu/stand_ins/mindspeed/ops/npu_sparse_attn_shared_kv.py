"""SAS. Signature: MindSpeed core 0.17. Meaning, limits: CANN's documentation of SparseAttnSharedkv and SparseFlashMla.

For query i of S, with ``threshold = i + 1``, seen are the keys ``max(threshold - ori_win_left - 1, 0) <= t`` and
``t < threshold + ori_win_right``, and of the compressed entries those below ``floor(threshold / cmp_ratio)``; for a
ratio of 4 only those that ``cmp_sparse_indices`` names. One softmax over all of them, ``sinks`` in its denominator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensor

from ..readings import demand, now


def npu_sparse_attn_shared_kv(
    query: torch.Tensor,
    ori_kv: torch.Tensor,
    cmp_kv: torch.Tensor | None,
    cmp_sparse_indices: torch.Tensor | None,
    sinks: torch.Tensor,
    softmax_scale: float,
    cmp_ratio: int,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 127,
    ori_win_right: int = 0,
) -> torch.Tensor:
    """query [S, B, N, D], ori_kv [S, B, D], cmp_kv [S', B, D] or None, indices int32 [B, S, K], sinks [N]."""
    demand(query.dim() == 4 and ori_kv.dim() == 3, "query is [S, B, N, D] and ori_kv [S, B, D]")
    S, B, N, D = query.shape
    demand(query.dtype in now().dtypes, f"query is {query.dtype}")
    demand(ori_kv.shape == (S, B, D) and ori_kv.dtype == query.dtype, f"ori_kv is {list(ori_kv.shape)}")
    demand(D == 512, f"the head dimension is 512, not {D}")
    demand(N in (64, 128), f"there are 64 or 128 heads, not {N}")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    demand(sinks.shape == (N,) and sinks.dtype == wide, f"sinks are float32 [N], not {sinks.dtype} {list(sinks.shape)}")
    demand(sinks.is_contiguous(), "sinks are contiguous")
    demand(isinstance(softmax_scale, float) and type(cmp_ratio) is int, "softmax_scale is a float, cmp_ratio an int")
    demand((ori_mask_mode, cmp_mask_mode) == (4, 3), "ori_mask_mode is 4 and cmp_mask_mode 3")
    demand((ori_win_left, ori_win_right) == (127, 0), "the window is 127 keys back and 0 ahead")
    demand(cmp_ratio in (1, 4, 128), f"cmp_ratio is 1, 4 or 128, not {cmp_ratio}")
    demand((cmp_kv is not None) == (cmp_ratio > 1), "cmp_kv comes with a cmp_ratio above 1")
    threshold = torch.arange(1, S + 1, device=query.device).unsqueeze(1)
    key = torch.arange(S, device=query.device)
    seen = (key >= (threshold - ori_win_left - 1).clamp(min=0)) & (key < threshold + ori_win_right)
    seen, keys = seen.expand(B, S, S).to(torch.int32), ori_kv  # how often each is seen
    if cmp_kv is not None:
        E = cmp_kv.shape[0]
        demand(cmp_kv.shape == (E, B, D) and cmp_kv.dtype == query.dtype, f"cmp_kv is {list(cmp_kv.shape)}")
        demand(E > 0, "cmp_kv may not be empty")
        far = (torch.arange(E, device=query.device) < threshold // cmp_ratio).expand(B, S, E).to(torch.int32)
        if cmp_ratio == 4:
            chosen = _named(cmp_sparse_indices, B, S, E, torch.is_grad_enabled() and query.requires_grad)
            far = far * chosen if now().causal_again else chosen
        seen, keys = torch.cat([seen, far], dim=-1), torch.cat([ori_kv, cmp_kv])
    keys = keys.transpose(0, 1).to(wide)
    scores = torch.einsum("sbnd,btd->bsnt", query.to(wide), keys) * softmax_scale
    scores = scores + seen.to(wide).log().unsqueeze(2)  # -inf for never; what is gathered twice weighs twice
    scores = torch.cat([scores, sinks.view(1, 1, N, 1).expand(B, S, N, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :-1]
    result = torch.einsum("bsnt,btd->sbnd", weights, keys)
    checked: torch.Tensor = _Result.apply(result.to(query.dtype).contiguous())
    return checked


class _Result(torch.autograd.Function):
    """The output, whose gradient comes in as the output is stored: what else its kernel takes is not documented."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor) -> torch.Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        demand(grad.is_contiguous(), "the output's gradient is contiguous")
        return grad


def _named(indices: torch.Tensor | None, B: int, S: int, E: int, differentiated: bool) -> torch.Tensor:
    """How often the indices name each entry: int32 [B, S, E]."""
    demand(indices is not None, "a cmp_ratio of 4 needs cmp_sparse_indices")
    assert indices is not None
    demand(indices.dtype == torch.int32 and indices.dim() == 3, f"indices are int32 [B, S, K], not {indices.dtype}")
    demand(indices.is_contiguous(), "indices are contiguous")
    demand(indices.shape[:2] == (B, S), f"indices are {list(indices.shape)}, for {B} rows of {S}")
    demand(indices.shape[2] in (512, 1024), f"512 or 1024 indices a query, not {indices.shape[2]}")
    valid = indices >= 0
    if now().minus_one == "ends":
        valid = valid.to(torch.int32).cumprod(-1) > 0
    if not isinstance(indices, FakeTensor):
        demand(bool((indices >= -1).all()) and bool((indices < E).all()), f"an index is not in -1 to {E - 1}")
        demand(not differentiated or bool((indices >= 0).all()), "the gradient reads out of range at -1")
    slots = torch.where(valid, indices, E).long()
    counts = torch.zeros(B, S, E + 1, dtype=torch.int32, device=indices.device)
    return counts.scatter_add(-1, slots, torch.ones_like(slots, dtype=torch.int32))[..., :E]
