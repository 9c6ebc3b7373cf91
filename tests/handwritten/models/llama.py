"""Decoders with rotary positions, grouped heads, soft caps, sinks and caches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from tests.handwritten.case import VOCAB, Case, heads, hidden, tokens

DIM, N_HEADS, N_KV, HEAD = 32, 4, 2, 8


def precompute(end: int) -> Tensor:
    inverse = 1.0 / (10000.0 ** (torch.arange(0, HEAD, 2)[: HEAD // 2].float() / HEAD))
    table = torch.outer(torch.arange(end).float(), inverse)
    return torch.polar(torch.ones_like(table), table)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[None, :, None, :]).flatten(3).type_as(x)


def rope(x: Tensor) -> Tensor:
    """Halves rotated, on [b, h, s, d]."""
    angle = torch.arange(x.shape[-2])[:, None] * 100.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class ComplexRotary(nn.Module):
    """Complex rotation, repeated keys, a square of -inf above the diagonal made by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.wq = nn.Linear(DIM, N_HEADS * HEAD, bias=False)
        self.wk, self.wv = nn.Linear(DIM, N_KV * HEAD, bias=False), nn.Linear(DIM, N_KV * HEAD, bias=False)
        self.wo = nn.Linear(N_HEADS * HEAD, DIM, bias=False)

    def attend(self, x: Tensor, freqs: Tensor, mask: Tensor | None) -> Tensor:
        bsz, seqlen, _ = x.shape
        xq = rotate(self.wq(x).view(bsz, seqlen, N_HEADS, HEAD), freqs)
        xk = rotate(self.wk(x).view(bsz, seqlen, N_KV, HEAD), freqs)
        xv = self.wv(x).view(bsz, seqlen, N_KV, HEAD)
        keys, values = (
            t[:, :, :, None, :].expand(bsz, seqlen, N_KV, N_HEADS // N_KV, HEAD).reshape(bsz, seqlen, N_HEADS, HEAD)
            for t in (xk, xv)
        )
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        s = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(HEAD)
        if mask is not None:
            s = s + mask
        s = F.softmax(s.float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(s, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tok_embeddings(ids)
        n = ids.shape[1]
        mask = torch.triu(torch.full((n, n), float("-inf")), diagonal=1).type_as(h)
        return h + self.attend(h, precompute(n), mask)


class GroupedByEinsum(nn.Module):
    """Groups stay a dimension of their own: five dimensions, no key repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, N_HEADS * HEAD), nn.Linear(DIM, 2 * N_KV * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, N_KV, N_HEADS // N_KV, HEAD).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).view(b, s, 2, N_KV, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        sim = einsum("bgrsd,bgtd->bgrst", q * HEAD**-0.5, k)
        causal = torch.ones(s, s, dtype=torch.bool).tril()
        sim = sim.masked_fill(~causal, -torch.finfo(sim.dtype).max)
        out = einsum("bgrst,bgtd->bgrsd", sim.softmax(dim=-1), v)
        return out.permute(0, 3, 1, 2, 4).reshape(b, s, -1)


class GroupedByBroadcast(nn.Module):
    """The same groups through matmul's broadcasting over a dimension of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, (N_HEADS + 2 * N_KV) * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        q, k, v = self.proj(x).split([N_HEADS * HEAD, N_KV * HEAD, N_KV * HEAD], -1)
        q = q.unflatten(-1, (N_KV, -1, HEAD)).movedim(1, 3)
        k = k.unflatten(-1, (N_KV, HEAD)).transpose(1, 2).unsqueeze(2)
        v = v.unflatten(-1, (N_KV, HEAD)).transpose(1, 2).unsqueeze(2)
        i = torch.arange(s)
        score = torch.where(i[:, None] >= i[None, :], q @ k.mT / HEAD**0.5, -torch.inf)
        return (score.softmax(-1) @ v).movedim(3, 1).flatten(2)


class OneKeyHead(nn.Module):
    """Shazeer's multi-query attention: keys and values without heads, all by einsum, weights as raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.P_q, self.P_o = (nn.Parameter(torch.empty(N_HEADS, DIM, HEAD)) for _ in range(2))
        self.P_k, self.P_v = (nn.Parameter(torch.empty(DIM, HEAD)) for _ in range(2))

    def forward(self, X: Tensor) -> Tensor:
        Q = einsum("bnd,hdk->bhnk", X, self.P_q)
        K = einsum("bmd,dk->bmk", X, self.P_k)
        V = einsum("bmd,dv->bmv", X, self.P_v)
        logits = einsum("bhnk,bmk->bhnm", Q, K)
        weights = torch.softmax(logits, dim=-1)
        O = einsum("bhnm,bmv->bhnv", weights, V)
        return einsum("bhnv,hdv->bnd", O, self.P_o)


class SoftCapped(nn.Module):
    """Capped scores, a window on one layer, queries and keys normalised before the product."""

    def __init__(self, window: int | None, cap: float = 5.0) -> None:
        super().__init__()
        self.window, self.cap = window, cap
        self.qkv_proj = nn.Linear(DIM, (N_HEADS + 2 * N_KV) * HEAD, bias=False)
        self.query_norm, self.key_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        xq, xk, xv = self.qkv_proj(x).split([N_HEADS * HEAD, N_KV * HEAD, N_KV * HEAD], dim=-1)
        xq = self.query_norm(xq.view(b, -1, N_HEADS, HEAD))
        key = self.key_norm(xk.view(b, -1, N_KV, HEAD)).repeat_interleave(N_HEADS // N_KV, dim=2)
        value = torch.repeat_interleave(xv.view(b, -1, N_KV, HEAD), N_HEADS // N_KV, dim=2)
        q, k, v = xq.transpose(1, 2) * HEAD**-0.5, key.transpose(1, 2), value.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = torch.tanh(scores / self.cap) * self.cap
        mask = torch.triu(torch.full((1, 1, n, n), -2.3819763e38), diagonal=1)
        if self.window is not None:
            ones = torch.ones_like(mask)
            near = torch.triu(ones, -self.window + 1) * torch.tril(ones, self.window - 1)
            mask = torch.where(near == 1, mask, -2.3819763e38)
        out = torch.matmul(F.softmax((scores + mask).float(), dim=-1).type_as(q), v)
        return out.transpose(1, 2).contiguous().view(b, n, -1)


class LearnedSinks(nn.Module):
    """One more logit a head, in a layout of its own (queries last but one), cut off after the softmax."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.sinks, self.window = nn.Parameter(torch.zeros(N_HEADS)), window
        self.qkv = nn.Linear(DIM, HEAD * (N_HEADS + 2 * N_KV))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x)
        Q = qkv[..., : N_HEADS * HEAD].view(b, n, N_KV, N_HEADS // N_KV, HEAD)
        K = qkv[..., N_HEADS * HEAD : (N_HEADS + N_KV) * HEAD].view(b, n, N_KV, 1, HEAD)
        V = qkv[..., (N_HEADS + N_KV) * HEAD :].view(b, n, N_KV, 1, HEAD)
        K, V = K.expand(-1, -1, -1, N_HEADS // N_KV, -1), V.expand(-1, -1, -1, N_HEADS // N_KV, -1)
        mask = torch.triu(Q.new_full((n, n), -float("inf")), diagonal=1)
        if self.window > 0:
            mask = mask + torch.tril(mask.new_full((n, n), -float("inf")), diagonal=-self.window)
        QK = einsum("bqhmd,bkhmd->bhmqk", Q, K) * HEAD**-0.5 + mask[None, None, None]
        S = self.sinks.reshape(1, N_KV, N_HEADS // N_KV, 1, 1).expand(b, -1, -1, n, -1)
        W = torch.softmax(torch.cat([QK, S], dim=-1), dim=-1)[..., :-1]
        return einsum("bhmqk,bkhmd->bqhmd", W, V).reshape(b, n, -1)


class SinksByQuery(nn.Module):
    """Each query decides how much it attends to nothing: one more logit that is computed from it, in front."""

    def __init__(self, doubt: bool = False) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(DIM, N_HEADS * HEAD), nn.Linear(N_HEADS * HEAD, DIM)
        self.kv = nn.Linear(DIM, 2 * N_KV * HEAD)
        self.nothing, self.doubt = nn.Linear(DIM, N_HEADS), doubt

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, N_HEADS, HEAD).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, N_KV, HEAD).unbind(2)
        k, v = (t.transpose(1, 2).repeat_interleave(N_HEADS // N_KV, 1) for t in (k, v))
        nothing = self.nothing(x)
        if self.doubt:  # some queries have no sink at all
            nothing = nothing.masked_fill(nothing < 0, -torch.inf)
        seen = torch.arange(n) <= torch.arange(n)[:, None]
        scores = (q @ k.mT / HEAD**0.5).masked_fill(~seen, -torch.inf)
        weights = torch.cat([nothing.permute(0, 2, 1)[..., None], scores], -1).softmax(-1)
        return self.o((weights[..., 1:] @ v).transpose(1, 2).flatten(2))


class Decode(nn.Module):
    """New tokens after a cache: keys and values concatenated, queries at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, N_HEADS, HEAD).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        total = k.size(2)
        rows, columns = torch.arange(total - n, total).view(-1, 1), torch.arange(total).view(1, -1)
        bias = torch.zeros(n, total).masked_fill_(columns > rows, float("-inf"))
        return (((q @ k.mT) / math.sqrt(HEAD) + bias).softmax(-1) @ v).transpose(1, 2).reshape(b, n, DIM)


class LatentKeys(nn.Module):
    """Keys and values decompressed from one small latent, a shared rotary part joined to every head's key."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.down = nn.Linear(DIM, N_HEADS * (HEAD + 4)), nn.Linear(DIM, 12 + 4)
        self.up = nn.Linear(12, N_HEADS * (HEAD + 6))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, N_HEADS, HEAD + 4).transpose(1, 2)
        latent, k_pe = self.down(x).split([12, 4], dim=-1)
        k_nope, v = self.up(latent).view(b, s, N_HEADS, HEAD + 6).transpose(1, 2).split([HEAD, 6], dim=-1)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, N_HEADS, -1, -1)], dim=-1)
        scores = (q @ k.transpose(-1, -2)).mul((HEAD + 4) ** -0.5)
        scores += torch.full((s, s), float("-inf")).triu_(1)
        return scores.softmax(dim=-1, dtype=torch.float32).type_as(x) @ v


class AbsorbedLatent(nn.Module):
    """The same latent as keys and as values, two products added to one score."""

    def __init__(self) -> None:
        super().__init__()
        self.q_nope, self.q_pe, self.down = (
            nn.Linear(DIM, N_HEADS * 12),
            nn.Linear(DIM, N_HEADS * 4),
            nn.Linear(DIM, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q_nope, q_pe = self.q_nope(x).view(b, s, N_HEADS, 12), self.q_pe(x).view(b, s, N_HEADS, 4)
        kv, pe = self.down(x).split([12, 4], dim=-1)
        scores = (einsum("bshc,btc->bsht", q_nope, kv) + einsum("bshr,btr->bsht", q_pe, pe)) * 0.25
        mask = torch.full((s, s), float("-inf")).triu_(1)
        scores = (scores + mask.unsqueeze(1)).softmax(dim=-1)
        return einsum("bsht,btc->bshc", scores, kv).flatten(2)


class Rotated(nn.Module):
    """Halves rotated, heads grouped by the fused function itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(DIM, N_HEADS * HEAD),
            nn.Linear(DIM, N_KV * HEAD),
            nn.Linear(DIM, N_KV * HEAD),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True, enable_gqa=True)


X = (hidden(DIM),)
GROUPED = {"heads": N_HEADS, "kv_heads": N_KV}
CASES = (
    Case("complex rotary, repeated keys", ComplexRotary, (tokens(),), mask="causal", dims=GROUPED, bfloat16=True),
    Case("groups by einsum", GroupedByEinsum, X, mask="causal", dims=GROUPED),
    Case("groups by broadcasting", GroupedByBroadcast, X, mask="causal", dims=GROUPED),
    Case("one head of keys", OneKeyHead, X, dims={"heads": N_HEADS, "kv_heads": 1}, attributes={"scale": 1.0}),
    Case("soft cap", lambda: SoftCapped(None), X, mask="causal", attributes={"softcap": 5.0}, bfloat16=True),
    Case("soft cap in a window", lambda: SoftCapped(4), X, mask="sliding", facts={"window": 4}),
    Case("sinks", LearnedSinks, X, mask="causal", dims=GROUPED),
    Case("a sink for each query", SinksByQuery, X, mask="causal bias", dims=GROUPED),
    Case(
        "a sink for each query that may be -inf",
        lambda: SinksByQuery(doubt=True),
        X,
        sites=0,
        reason="one for each query, and may be infinite",
    ),
    Case("sinks in a window", lambda: LearnedSinks(5), X, mask="sliding", facts={"window": 5}),
    # Behind a cache of any length the offset is symbolic: the mask is proven for a given length only.
    Case("after a cache", Decode, (hidden(DIM), *(heads(N_HEADS, HEAD, "memory"),) * 2), mask="causal", resized=None),
    Case("latent keys", LatentKeys, X, mask="causal", dims={"head_dim": HEAD + 4, "value_dim": 6}),
    Case("absorbed latent", AbsorbedLatent, X, mask="causal+bias", either=True),
    Case("rotated halves, grouped function", Rotated, X, mask="causal", dims=GROUPED),
)
