"""F.scaled_dot_product_attention, called in all the ways that its signature allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import Case, conditions, heads, hidden, kept, scores, tokens, unbatched

H, D = 4, 8


class Sdpa(nn.Module):
    """The bare call: queries, keys, values, then perhaps a mask."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


class ThreeDimensions(nn.Module):
    """[batch, length, width], one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class FiveDimensions(nn.Module):
    """Frames of a video attend within themselves: a batch of two dimensions."""

    def __init__(self, frames: int = 3) -> None:
        super().__init__()
        self.frames, self.qkv = frames, nn.Linear(16, 48)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, self.frames, n // self.frames, 3, 2, 8).permute(3, 0, 1, 4, 2, 5).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).reshape(b, n, -1)


class Unpacked(nn.Module):
    """Two dimensions: no batch, no head."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class MaskOfATriangle(nn.Module):
    """A causal mask built densely, which the call could have been told in a word."""

    def __init__(self, additive: bool, window: int = 0) -> None:
        super().__init__()
        self.additive, self.window = additive, window

    def forward(self, q, k, v):
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
        mask = j <= i
        if self.window:
            mask = mask & (i - j < self.window)
        if self.additive:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask.logical_not(), float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class CausalAndPadding(nn.Module):
    """The mask of a causal model with padding, as a boolean over [b, 1, s, s]."""

    def forward(self, q, k, v, keep):
        n = q.shape[2]
        causal = torch.tril(torch.ones(n, n, dtype=torch.bool))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & keep[:, None, None, :])


class Repeated(nn.Module):
    """Keys repeated for the call; queries scaled beforehand, so the call must not scale."""

    def forward(self, q, k, v):
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q * 0.2, k, v, scale=1.0, is_causal=True)


class TiedEmbeddings(nn.Module):
    """A small language model around it, with rotary-free positions and a mask kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(40, 32), nn.Linear(32, 96)
        self.mask: torch.Tensor | None = None

    def forward(self, ids):
        x = self.embed(ids)
        b, n, _ = x.shape
        if self.mask is None or self.mask.shape[-1] != n:
            self.mask = torch.full((n, n), float("-inf")).triu(1)
        q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)
        return F.linear(x + y, self.embed.weight)


QKV = (heads(H, D), heads(H, D), heads(H, D))
CROSS = (heads(H, D), heads(H, D, "memory"), heads(H, D, "memory"))
GROUPED = (heads(H, D), heads(2, D), heads(2, D))
DIMS = {"heads": H, "head_dim": D}
CASES = (
    Case("plain", Sdpa, QKV, dims=DIMS, attributes={"scale": D**-0.5}, bfloat16=True),
    Case("cross", Sdpa, CROSS, dims={"queries": 12, "keys": 7}),
    Case("scaled", lambda: Sdpa(scale=0.3), QKV, attributes={"scale": 0.3}),
    Case("causal", lambda: Sdpa(is_causal=True), QKV, mask="causal", bfloat16=True),
    Case("causal, more queries than keys", lambda: Sdpa(is_causal=True), CROSS, mask="causal"),
    Case("grouped", lambda: Sdpa(enable_gqa=True), GROUPED, dims={"kv_heads": 2}),
    Case("grouped, causal", lambda: Sdpa(enable_gqa=True, is_causal=True), GROUPED, mask="causal"),
    Case("float mask", Sdpa, (*QKV, scores()), mask="bias"),
    Case("bool mask", Sdpa, (*QKV, conditions()), mask="input"),
    Case("values of another width", Sdpa, (heads(H, D), heads(H, D), heads(H, 5)), dims={"value_dim": 5}),
    Case("three dimensions", ThreeDimensions, (hidden(16),)),
    Case("two dimensions", Unpacked, (unbatched(16),)),
    Case("five dimensions", FiveDimensions, (hidden(16),), resized=None),
    Case("triangle, bool", lambda: MaskOfATriangle(False), QKV, mask="causal"),
    Case("triangle, float", lambda: MaskOfATriangle(True), QKV, mask="causal"),
    Case("window, bool", lambda: MaskOfATriangle(False, 4), QKV, mask="sliding", facts={"window": 4}),
    Case("window, float", lambda: MaskOfATriangle(True, 4), QKV, mask="sliding", facts={"window": 4}),
    Case("causal and padding", CausalAndPadding, (*QKV, kept()), mask="causal+padding"),
    Case("repeated", Repeated, GROUPED, mask="causal", dims={"kv_heads": 2}, attributes={"scale": 0.2}),
    Case("mask kept on the module", TiedEmbeddings, (tokens(),), mask="causal"),
    Case("dropout on", lambda: Sdpa(dropout_p=0.5), QKV, sites=0, reason="dropout"),
)
