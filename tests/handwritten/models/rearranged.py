"""The einsum school: rearranged dimensions, null keys, learned temperatures, memories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import einsum, nn

from tests.handwritten.case import Case, fixed, hidden, kept, kept_or_none, memory


def exists(val):
    return val is not None


def split_heads(t, h):
    """'b n (h d) -> b h n d'"""
    b, n, _ = t.shape
    return t.reshape(b, n, h, -1).permute(0, 2, 1, 3)


def merge_heads(t):
    """'b h n d -> b n (h d)'"""
    return t.permute(0, 2, 1, 3).flatten(2)


def max_neg_value(t):
    return -torch.finfo(t.dtype).max


class PreNormAttention(nn.Module):
    """Bare self or cross attention with an optional mask."""

    def __init__(self, dim=24, dim_head=6, heads=4):
        super().__init__()
        inner = dim_head * heads
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        x = self.norm(x)
        context = context if exists(context) else x
        q, k, v = self.to_q(x), *self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        if exists(mask):
            sim.masked_fill_(~mask[:, None, None, :], max_neg_value(sim))
        attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(merge_heads(out))


class Masked(PreNormAttention):
    def forward(self, x, mask):
        return super().forward(x, mask=mask)


class CrossMasked(PreNormAttention):
    def forward(self, x, context, mask):
        return super().forward(x, context, mask)


class NullKeyValue(nn.Module):
    """A learned key and value that any query may turn to, and a mask padded for them."""

    def __init__(self, dim=24, heads=3, dim_head=8):
        super().__init__()
        self.heads = heads
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * 2, bias=False)

    def forward(self, x, mask):
        b, h = x.shape[0], self.heads
        q = split_heads(self.to_q(x), h) * 8**-0.5
        k, v = self.to_kv(x).chunk(2, dim=-1)
        nk, nv = (t.expand(b, 1, -1) for t in self.null_kv.unbind(dim=-2))
        k, v = torch.cat((nk, k), dim=-2), torch.cat((nv, v), dim=-2)
        sim = einsum("b h i d, b j d -> b h i j", q, k)
        mask = F.pad(mask, (1, 0), value=True)[:, None, None, :]
        sim = sim.masked_fill(~mask, max_neg_value(sim))
        return merge_heads(einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v))


class CosineSim(nn.Module):
    """Normalised queries and keys under a fixed factor and a learned gain for each channel."""

    def __init__(self, dim=24, heads=3, dim_head=8, scale=10):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim_head)), nn.Parameter(torch.ones(dim_head))

    def forward(self, x):
        n = x.shape[1]
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        causal_mask = torch.ones((n, n), dtype=torch.bool).triu(1)
        sim = sim.masked_fill(causal_mask, max_neg_value(sim))
        return merge_heads(einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v))


class LearnedTemperature(nn.Module):
    """The temperature is a parameter, one a head, applied to the scores: it is a factor on the queries."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.zeros(heads, 1, 1))
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)

    def forward(self, x):
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        q, k = (F.normalize(t, p=2.0, dim=-1) for t in (q, k))
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.temperature.exp()
        return merge_heads(sim.softmax(dim=-1) @ v)


class LogitScale(nn.Module):
    """One temperature for all, a scalar tensor, as contrastive models keep it."""

    def __init__(self, dim=16):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones([]) * 2.0)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x):
        q, k = F.normalize(self.q(x), dim=-1), F.normalize(self.k(x), dim=-1)
        return (self.logit_scale.exp() * q @ k.transpose(1, 2)).softmax(dim=-1) @ self.v(x)


class MemoryKeyValues(nn.Module):
    """Persistent memories before the keys, seen by all; causal among the tokens."""

    def __init__(self, dim=24, heads=3, dim_head=8, slots=4):
        super().__init__()
        self.heads, self.slots = heads, slots
        self.mem_k, self.mem_v = (nn.Parameter(torch.randn(heads, slots, dim_head)) for _ in range(2))
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)

    def forward(self, x):
        b = x.shape[0]
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        k = torch.cat((self.mem_k.expand(b, -1, -1, -1), k), dim=-2)
        v = torch.cat((self.mem_v.expand(b, -1, -1, -1), v), dim=-2)
        dots = einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        i, j = dots.shape[-2:]
        mask = torch.ones((i, j), dtype=torch.bool).triu_(j - i + 1)
        dots.masked_fill_(mask, max_neg_value(dots))
        return merge_heads(einsum("bhij,bhjd->bhid", dots.softmax(dim=-1), v))


class MemoryOnly(nn.Module):
    """Tokens read a learned table, keys and values both parameters."""

    def __init__(self, dim=24, slots=10):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(slots, dim)) for _ in range(2))

    def forward(self, x):
        sim = einsum("b n d, m d -> b n m", x, self.keys) * x.shape[-1] ** -0.5
        return einsum("b n m, m d -> b n d", sim.softmax(dim=-1), self.values)


class HeadsLast(nn.Module):
    """'b n h d' all the way, gates on the output of each head."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.heads, self.to_qkvg = heads, nn.Linear(dim, dim * 4, bias=False)

    def forward(self, x):
        q, k, v, g = (t.unflatten(-1, (self.heads, -1)) for t in self.to_qkvg(x).chunk(4, dim=-1))
        sim = einsum("b i h d, b j h d -> b i h j", q, k) / q.shape[-1] ** 0.5
        out = einsum("b i h j, b j h d -> b i h d", sim.softmax(dim=-1), v)
        return (out * g.sigmoid()).flatten(2)


class Buckets(nn.Module):
    """Attention inside buckets of the sequence: one more dimension before the heads."""

    def __init__(self, dim=24, heads=3, bucket=4):
        super().__init__()
        self.heads, self.bucket, self.to_qkv = heads, bucket, nn.Linear(dim, dim * 3, bias=False)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (
            t.reshape(b, n // self.bucket, self.bucket, self.heads, -1).permute(0, 1, 3, 2, 4)
            for t in self.to_qkv(x).chunk(3, dim=-1)
        )
        sim = einsum("b w h i d, b w h j d -> b w h i j", q, k) * q.shape[-1] ** -0.5
        out = einsum("b w h i j, b w h j d -> b w h i d", sim.softmax(dim=-1), v)
        return out.permute(0, 1, 3, 2, 4).reshape(b, n, d)


class TalkingHeads(nn.Module):
    """Heads mixed before and after the softmax: another computation."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.heads, self.to_qkv = heads, nn.Linear(dim, dim * 3, bias=False)
        self.pre, self.post = nn.Parameter(torch.randn(heads, heads)), nn.Parameter(torch.randn(heads, heads))

    def forward(self, x):
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * 8**-0.5
        dots = einsum("b h i j, h g -> b g i j", dots, self.pre)
        attn = einsum("b h i j, h g -> b g i j", dots.softmax(dim=-1), self.post)
        return merge_heads(einsum("b h i j, b h j d -> b h i d", attn, v))


X = (hidden(24),)
CASES = (
    Case("plain", PreNormAttention, X, dims={"heads": 4}, bfloat16=True),
    Case("masked by the maximum", Masked, (hidden(24), kept_or_none()), mask="padding"),
    Case("cross, masked", CrossMasked, (hidden(24), memory(24), kept_or_none("memory")), mask="padding"),
    Case("null key", NullKeyValue, (hidden(24), kept()), mask="padding", dims={"kv_heads": 1}),
    Case("cosine", CosineSim, X, mask="causal", attributes={"scale": 10.0}),
    Case("learned temperature", LearnedTemperature, X),
    Case("scalar temperature", LogitScale, (hidden(16),)),
    Case("memories before the keys", MemoryKeyValues, X, mask="causal"),
    Case("only memories", MemoryOnly, X),
    Case("heads last but one", HeadsLast, X, dims={"heads": 3}),
    Case("buckets", Buckets, X, **fixed()),
    Case("talking heads", TalkingHeads, X, sites=0, reason=""),
)
