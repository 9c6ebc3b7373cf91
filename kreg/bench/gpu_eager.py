"""``attention`` and the serving ops as transformers and plain PyTorch write them, to measure kernels against.

``attention``: transformers 5.23's ``eager_attention_forward`` of Llama, and of gpt-oss where there are sinks; a test
holds them against that code. The serving ops have no code there: gather, multiply, select.
"""

from __future__ import annotations

from typing import Any

import torch

from kreg.bench.gpu_baselines import Forward, fits, fresh
from kreg.bench.gpu_case import Case
from kreg.bench.gpu_serving import slots


def attention(case: Case, given: dict[str, Any], compiled: bool = False) -> Forward:
    """Keys and values repeated for each head, scores as a tensor, the mask added, a sink as one more column."""
    s, element = case.sizes, given["q"].element_size()
    fits(case.batch * s.heads * case.queries * case.context * (3 * element + 4), given["q"].device)
    position = torch.arange(case.queries, device=given["q"].device).unsqueeze(1) + given["offset"]
    key = torch.arange(case.context, device=given["q"].device)
    seen = key <= position
    if case.layer == "window":
        seen = seen & (key > position - s.window)
    bias = torch.zeros(seen.shape, dtype=given["q"].dtype, device=seen.device)
    bias.masked_fill_(~seen, torch.finfo(bias.dtype).min)
    groups, scale = s.heads // s.kv_heads, given["scale"]

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(len(x), s.heads, *x.shape[2:])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        scores = q @ repeated(k).transpose(2, 3) * scale + bias
        if sinks is None:
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        else:
            sink = sinks.view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
            scores = torch.cat([scores, sink], dim=-1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
            weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
        return (weights @ repeated(v)).transpose(1, 2).contiguous()

    run = fresh(attend) if compiled else attend
    return lambda: run(given["q"], given["k"], given["v"], given.get("sinks"))


def sparse_mqa_sink(case: Case, given: dict[str, Any], compiled: bool = False) -> Forward:
    """Selected slots gathered for each token; every index is of one."""
    size = case.batch * slots(case) * (case.sizes.head_dim * given["q"].element_size() + case.sizes.heads * 8)
    fits(2 * size, given["q"].device)
    scale = given["scale"]

    def attend(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        keys = kv.flatten(0, 1)[indices.long()]
        scores = (q @ keys.transpose(1, 2)).float() * scale
        scores = torch.cat([scores, sink.float().view(1, -1, 1).expand(len(q), -1, 1)], dim=-1)
        return torch.softmax(scores, dim=-1)[..., :-1].to(q.dtype) @ keys

    run = fresh(attend) if compiled else attend
    return lambda: run(given["q"], given["kv"], given["topk_indices"], given["attn_sink"])


def indexer_topk(case: Case, given: dict[str, Any], compiled: bool = False) -> Forward:
    """Pages gathered for each request, scores of all heads, summed and selected from; a token of each request."""
    size = case.batch * case.entries * (case.sizes.index_dim * 6 + case.sizes.index_heads * 8)
    fits(size, given["q"].device)
    ratio, topk = given["ratio"], given["topk"]

    def pick(
        q: torch.Tensor, kv: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        keys = kv[table.long()].flatten(1, 2)
        scores = (torch.relu((q @ keys.transpose(1, 2)).float()) * weights.float().unsqueeze(-1)).sum(1)
        entry = torch.arange(scores.shape[1], device=scores.device)
        late = (entry + 1) * ratio > positions.unsqueeze(1) + 1
        return scores.masked_fill(late, float("-inf")).topk(topk, dim=-1).indices.to(torch.int32)

    run = fresh(pick) if compiled else pick
    names = ("q", "kv", "weights", "positions", "block_table")
    return lambda: run(*(given[name] for name in names))
