"""`npu_fusion_attention` and its gradient: torch_npu's documentation, and CANN's of aclnnFlashAttentionScore V1 and V3.

``y = softmax(mask(scale * (pse + query key^T), atten_mask)) value``, where the mask drops what is True; with a sink,
``m = max(sink, max(S))`` and the sum takes in ``exp(sink - m)``. Query head n of N reads key head ``n // (N / Nkv)``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from . import demand, now, wide

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COMPRESSED = 2048


def dropped(
    atten_mask: torch.Tensor | None, sparse_mode: int, pre: int, after: int, B: int, N: int, Sq: int, Skv: int
) -> torch.Tensor:
    """Which scores the mask drops: bool [B, N, Sq, Skv]. Table 1 of the documentation."""
    result = torch.zeros(B, N, Sq, Skv, dtype=torch.bool)
    if atten_mask is None:  # the mode and the bounds are ignored then
        return result
    demand(atten_mask.dtype in (torch.bool, torch.uint8), f"atten_mask is bool or uint8, not {atten_mask.dtype}")
    demand(atten_mask.is_contiguous(), "atten_mask is contiguous")
    if sparse_mode == 1:  # allMask: the whole mask is passed
        shapes = ([B, N, Sq, Skv], [B, 1, Sq, Skv], [1, 1, Sq, Skv], [Sq, Skv])
        demand(list(atten_mask.shape) in shapes, f"atten_mask is {list(atten_mask.shape)}; it may be {shapes}")
        result |= atten_mask.bool()
    else:
        demand(sparse_mode in (2, 3, 4), f"sparse_mode {sparse_mode} is not read here")
        upper = torch.ones(COMPRESSED, COMPRESSED).triu(1).bool()
        demand(
            atten_mask.shape == upper.shape and torch.equal(atten_mask.bool(), upper), "it is the 2048 x 2048 triangle"
        )
        for i in range(Sq):
            if sparse_mode == 2:  # leftUpCausal: the origin is the upper left corner
                result[:, :, i, i + 1 :] = True
                continue
            right = i + Skv - Sq  # the origin is the lower right corner
            if sparse_mode == 3:
                demand(Sq <= Skv, "rightDownCausal needs Sq <= Skv")
                result[:, :, i, right + 1 :] = True
                continue
            demand(pre + after >= 0, "pre_tockens and next_tockens have to overlap")
            for t in range(Skv):  # band
                result[:, :, i, t] = not (right - pre <= t <= right + after)
    demand(not bool(result.all(-1).any()), "what a row gives that is masked whole is not documented")
    return result


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    pse: torch.Tensor | None,
    scale: float,
    drop: torch.Tensor,
) -> torch.Tensor:
    """[B, N, Sq, Skv], -inf where dropped."""
    B, Sq, N, _ = query.shape
    Skv, share = key.shape[1], N // key.shape[2]
    result = torch.empty(B, N, Sq, Skv, dtype=wide(query.dtype))
    for n in range(N):
        result[:, n] = query[:, :, n].to(result.dtype) @ key[:, :, n // share].to(result.dtype).mT
    if pse is not None:
        demand(pse.dtype == query.dtype, f"pse is {pse.dtype}, the query {query.dtype}")
        shapes = ([B, N, Sq, Skv], [B, N, 1, Skv], [1, N, Sq, Skv])
        demand(list(pse.shape) in shapes, f"pse is {list(pse.shape)}; it may be {shapes}")
        demand(bool(pse.isfinite().all()), "what an infinite pse gives is not documented")
        shift = pse.to(result.dtype)
        result = scale * (result + shift) if now().pse_before_scale else scale * result + shift
    else:
        result = scale * result
    return result.masked_fill(drop, float("-inf"))


def checked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int, input_layout: str, sink: Any
) -> None:
    """Shapes and dtypes as the documentation has them."""
    demand(input_layout == "BSND", f"input_layout {input_layout} is not read here")
    demand(all(x.dim() == 4 for x in (query, key, value)), "query, key and value are [B, S, N, D]")
    demand(query.dtype in DTYPES + now().dtypes, f"query is {query.dtype}")
    demand(query.dtype == key.dtype == value.dtype, "query, key and value are of one dtype")
    (B, Sq, N, D), (Bk, Skv, Nkv, Dk) = query.shape, key.shape
    demand(head_num == N and 1 <= N <= 256 and N % Nkv == 0, f"{head_num} heads, of queries {N}, of keys {Nkv}")
    demand(Bk == B and value.shape[:3] == key.shape[:3], "key and value differ in their last dimension at most")
    demand(Dk == D and value.shape[3] <= D <= 768, f"the dimensions are {D}, {Dk} and {value.shape[3]}")
    demand(B >= 1 and Sq >= 1 and Skv >= 1, "nothing may be empty")
    if sink is not None:
        demand(sink.dtype == wide(query.dtype) and sink.shape == (N,), f"sink is {sink.dtype} {list(sink.shape)}")


def sequences(tensors: tuple[Any, ...], qlen: Any, kvlen: Any) -> list[tuple[torch.Tensor, ...]]:
    """Each sequence of the varlen layout [T, N, D], as a batch of one; the lengths are cumulative."""
    demand(list(qlen) == list(kvlen), "sequences of queries and keys of other lengths are not read here")
    demand(1 <= len(qlen) <= 1024 and sorted(qlen) == list(qlen), "1 to 1024 lengths, summed up")
    demand(all(x.dim() == 3 and x.shape[0] == qlen[-1] for x in tensors), "[T, N, D], T the last of the lengths")
    bounds = [0, *qlen]
    return [tuple(x[a:b].unsqueeze(0) for x in tensors) for a, b in pairwise(bounds)]


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: None = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    dropout_mask: None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    """Output, the softmax's maximum and sum [B, N, Sq, 8], an empty tensor, and three numbers for dropout."""
    if input_layout == "TND":
        demand(softmax_layout == "TND" and pse is None and sink is None, "read is softmax_layout TND, no pse or sink")
        options = {"atten_mask": atten_mask, "scale": scale, "sparse_mode": sparse_mode}
        found = [
            forward(*parts, head_num, "BSND", **options)[:3]
            for parts in sequences((query, key, value), actual_seq_qlen, actual_seq_kvlen)
        ]
        outs, maxima, sums = zip(*found, strict=True)
        lanes = (torch.cat([x[0].transpose(0, 1) for x in each]).contiguous() for each in (maxima, sums))
        return (torch.cat([x[0] for x in outs]), *lanes, query.new_empty(0), 0, 0, 0)
    checked(query, key, value, head_num, input_layout, sink)
    demand(keep_prob == 1.0 and padding_mask is None, "no dropout and no padding_mask")
    B, Sq, N, _ = query.shape
    Skv, share = key.shape[1], N // key.shape[2]
    drop = dropped(atten_mask, sparse_mode, pre_tockens, next_tockens, B, N, Sq, Skv)
    s = scores(query, key, pse, scale, drop)
    largest = s.amax(-1)
    if sink is not None:
        largest = torch.maximum(largest, sink.view(1, N, 1))
    p = (s - largest.unsqueeze(-1)).exp()
    total = p.sum(-1)
    if sink is not None:
        total = total + (sink.view(1, N, 1) - largest).exp()
    out = query.new_empty(B, Sq, N, value.shape[3])
    for n in range(N):
        weights = p[:, n] / total[:, n].unsqueeze(-1)
        out[:, :, n] = (weights @ value[:, :, n // share].to(weights.dtype)).to(out.dtype)
    lanes = (x.unsqueeze(-1).repeat(1, 1, 1, 8) for x in (largest, total))
    return (out, *lanes, query.new_empty(0), 0, 0, 0)


def gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: torch.Tensor | None = None,
    padding_mask: None = None,
    atten_mask: torch.Tensor | None = None,
    softmax_max: torch.Tensor | None = None,
    softmax_sum: torch.Tensor | None = None,
    softmax_in: None = None,
    attention_in: torch.Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: None = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """``P = exp(S - max) / sum``, ``dS = P (dP - rowsum(dY Y))``, ``dsink = -sum(P dP) exp(sink - max) / sum``.

    The gradient of pse is not given (CANN: a reserved output; torch_npu returns an undefined tensor).
    """
    if input_layout == "TND":
        demand(softmax_layout == "TND" and pse is None and sink is None, "read is softmax_layout TND, no pse or sink")
        given = (query, key, value, dy, attention_in, softmax_max, softmax_sum)
        found = []
        for q, k, v, g, out, largest, total in sequences(given, actual_seq_qlen, actual_seq_kvlen):
            softmax = {"softmax_max": largest.transpose(1, 2), "softmax_sum": total.transpose(1, 2)}
            options = {"atten_mask": atten_mask, "scale_value": scale_value, "sparse_mode": sparse_mode}
            found.append(gradient(q, k, v, g, head_num, "BSND", attention_in=out, **softmax, **options)[:3])
        return (*(torch.cat([x[0] for x in each]) for each in zip(*found, strict=True)), None, torch.empty(0))
    checked(query, key, value, head_num, input_layout, sink)
    demand(sink is None or query.dtype != torch.float32, "with a sink the gradient takes 16-bit inputs")
    assert softmax_max is not None and softmax_sum is not None and attention_in is not None
    B, Sq, N, _ = query.shape
    Skv, share, acc = key.shape[1], N // key.shape[2], wide(query.dtype)
    for x in (softmax_max, softmax_sum):
        demand(x.shape == (B, N, Sq, 8) and x.dtype == acc, f"{list(x.shape)} {x.dtype}: the softmax's is [B, N, S, 8]")
        demand(bool((x == x[..., :1]).all()), "the eight lanes are equal")
    demand(dy.shape == attention_in.shape == (B, Sq, N, value.shape[3]), "dy and attention_in are as the output")
    demand(dy.dtype == attention_in.dtype == query.dtype, "dy and attention_in are of the query's dtype")
    drop = dropped(atten_mask, sparse_mode, pre_tockens, next_tockens, B, N, Sq, Skv)
    s = scores(query, key, pse, scale_value, drop)
    largest, total = softmax_max[..., :1], softmax_sum[..., :1]
    p = (s - largest).exp() / total
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (query, key, value))
    dsink = torch.zeros(N, dtype=acc)
    for n in range(N):
        dout, kv = dy[:, :, n].to(acc), n // share
        dp = dout @ value[:, :, kv].to(acc).mT
        ds = p[:, n] * (dp - (dout * attention_in[:, :, n].to(acc)).sum(-1, keepdim=True))
        dq[:, :, n] = scale_value * (ds @ key[:, :, kv].to(acc))
        dk[:, :, kv] += scale_value * (ds.mT @ query[:, :, n].to(acc))
        dv[:, :, kv] += p[:, n].mT @ dout
        if sink is not None:
            of_sink = (sink[n] - largest[:, n]).exp() / total[:, n]
            dsink[n] = -((p[:, n] * dp).sum(-1, keepdim=True) * of_sink).sum()
    results = (x.to(query.dtype) for x in (dq, dk, dv))
    return (*results, None, dsink if sink is not None else torch.empty(0))


OPERATORS = {"npu_fusion_attention": forward, "npu_fusion_attention_grad": gradient}
