"""Decoders in the manner of the first GPTs: fused projections, buffers of ones, learned positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import VOCAB, Case, fixed, hidden, tokens, unbatched

WIDTH, HEADS, CONTEXT = 32, 4, 32


class FusedCausal(nn.Module):
    """One projection for all three, a buffer of ones cut to the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(0.0)
        self.resid_dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), attention()
        self.ln_2, self.mlp = (
            nn.LayerNorm(WIDTH),
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A whole language model, logits out."""

    def __init__(self, attention: type[nn.Module] = FusedCausal, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block(attention) for _ in range(layers))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx):
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class FlashCausal(nn.Module):
    """The same without a buffer: the fused function is told that it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class SlicedBufferWhere(nn.Module):
    """A boolean buffer, cut for a query that may start late; the fill value is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        causal = torch.tril(torch.ones((CONTEXT, CONTEXT), dtype=torch.bool)).view(1, 1, CONTEXT, CONTEXT)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, x):
        split = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        query, key, value = (t.view(split).permute(0, 2, 1, 3) for t in self.qkv(x).chunk(3, dim=-1))
        weights = torch.matmul(query, key.transpose(-1, -2)) / torch.full([], value.size(-1) ** 0.5, dtype=x.dtype)
        ns, nd = query.size(-2), key.size(-2)
        allowed = self.causal[:, :, nd - ns : nd, :nd]
        weights = torch.where(allowed, weights, torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype))
        weights = nn.functional.softmax(weights, dim=-1).type(value.dtype)
        merged = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        return self.out(merged.view(*merged.size()[:-2], WIDTH))


class LocalByXor(nn.Module):
    """Local attention as a difference of two triangles, kept as a byte buffer; no scaling; float32 softmax."""

    def __init__(self, window: int = 5) -> None:
        super().__init__()
        tri = torch.tril(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool))
        self.register_buffer("bias", torch.bitwise_xor(tri, torch.tril(tri, -window)).view(1, 1, CONTEXT, CONTEXT))
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        w = q.float() @ k.float().transpose(-1, -2)
        w = torch.where(self.bias[:, :, :t, :t], w, torch.tensor(torch.finfo(w.dtype).min))
        w = w.softmax(-1).to(v.dtype)
        return (w @ v).transpose(1, 2).reshape(b, t, WIDTH)


class Alibi(nn.Module):
    """Biases by distance through baddbmm with beta, heads interleaved in one projection, tanh-free."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", torch.tensor([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)]))
        self.beta = 1.0
        self.inv_norm = 1.0 / math.sqrt(WIDTH // HEADS)

    def forward(self, x):
        b, t, _ = x.shape
        fused = self.query_key_value(x).view(b, t, HEADS, 3, -1)
        q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        q = q.transpose(1, 2).reshape(b * HEADS, t, -1)
        k = k.permute(0, 2, 3, 1).reshape(b * HEADS, -1, t)
        v = v.transpose(1, 2).reshape(b * HEADS, t, -1)
        alibi = (self.slopes[:, None] * torch.arange(t)[None, :]).repeat(b, 1)[:, None, :]
        s = alibi.baddbmm(batch1=q, batch2=k, beta=self.beta, alpha=self.inv_norm).view(b, HEADS, t, t)
        blocked = torch.triu(torch.ones(t, t, dtype=torch.bool), diagonal=1)
        s = torch.masked_fill(s, blocked, torch.finfo(s.dtype).min)
        p = F.softmax(s, dim=-1, dtype=torch.float32).to(x.dtype)
        context = torch.bmm(p.view(b * HEADS, t, t), v).view(b, HEADS, t, -1).transpose(1, 2)
        return self.dense(context.reshape(b, t, WIDTH))


class DistanceBias(nn.Module):
    """ALiBi written with the true distance, causal mask and bias in one tensor built once a call."""

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = self.Wqkv(x).chunk(3, dim=2)
        q = q.reshape(b, s, HEADS, -1).permute(0, 2, 1, 3)
        k = k.reshape(b, s, HEADS, -1).permute(0, 2, 3, 1)
        v = v.reshape(b, s, HEADS, -1).permute(0, 2, 1, 3)
        distance = torch.arange(s).view(1, s) - torch.arange(s).view(s, 1)
        slopes = torch.pow(2.0, -torch.arange(1, HEADS + 1) * 8.0 / HEADS)
        attn_bias = slopes.view(1, HEADS, 1, 1) * distance
        logits = q.matmul(k) * (d // HEADS) ** -0.5 + attn_bias
        logits = logits.masked_fill(distance.gt(0), -float("inf"))
        return self.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class NoBatch(nn.Module):
    """The whole sequence as one matrix, one head, no batch at all."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, 8, bias=False) for _ in range(3))

    def forward(self, x):
        T, _ = x.shape
        wei = self.query(x) @ self.key(x).T * 8**-0.5
        wei = wei.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return F.softmax(wei, dim=1) @ self.value(x)


class HeadByHead(nn.Module):
    """Each head its own module, concatenated: the way tutorials begin."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, 8, bias=False) for _ in range(3)) for _ in range(2))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x):
        _, T, C = x.shape
        outs = []
        for key, query, value in self.heads:
            wei = query(x) @ key(x).transpose(-2, -1) * C**-0.5
            wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
            outs.append(F.softmax(wei, dim=-1) @ value(x))
        return torch.cat(outs, dim=-1)


CASES = (
    Case("gpt, buffer of ones", GPT, (tokens(),), sites=2, mask="stored causal", dims={"heads": HEADS}, bfloat16=True),
    Case("gpt, fused function", lambda: GPT(FlashCausal), (tokens(),), sites=2, mask="causal"),
    Case("buffer cut by lengths, where", SlicedBufferWhere, (hidden(WIDTH),), mask="stored causal"),
    Case("local by xor of triangles", LocalByXor, (hidden(WIDTH),), mask="stored sliding"),
    Case("alibi by baddbmm", Alibi, (hidden(WIDTH),), mask="causal+bias"),
    Case("alibi by distances", DistanceBias, (hidden(WIDTH),), mask="causal+bias"),
    Case("no batch", NoBatch, (unbatched(WIDTH),), mask="causal"),
    Case("head by head", HeadByHead, (hidden(WIDTH),), sites=2, mask="stored causal"),
    Case("fused, training", FusedCausal, (hidden(WIDTH),), mask="stored causal", training=True, **fixed()),
)
