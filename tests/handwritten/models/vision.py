"""Images: patches, shifted windows, axes, pooling, and the one-head blocks of generators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import Case, Sizes, hidden, image

ANY_BATCH = {"sizes": Sizes(2), "resized": Sizes(3)}
"""The extents of an image are the model's own."""


class PatchAttention(nn.Module):
    """qkv reshaped and permuted at once, optional norms on queries and keys."""

    def __init__(self, dim: int = 24, num_heads: int = 3, qk_norm: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = num_heads, dim // num_heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj = nn.Dropout(0.1), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class RelativePositions(nn.Module):
    """A table of biases looked up by a buffer of indices, for a grid of patches."""

    def __init__(self, dim: int = 24, heads: int = 3, side: tuple[int, int] = (3, 4)) -> None:
        super().__init__()
        self.heads, (h, w) = heads, side
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), heads))
        coords = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
        relative = coords[:, :, None] - coords[:, None, :] + torch.tensor([h - 1, w - 1]).view(2, 1, 1)
        self.register_buffer("index", relative[0] * (2 * w - 1) + relative[1], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = q * (c // self.heads) ** -0.5 @ k.mT + bias.unsqueeze(0)
        return (F.softmax(attn, dim=-1) @ v).transpose(1, 2).reshape(b, n, c)


class ShiftedWindows(nn.Module):
    """Windows of an image, rolled; the mask parts what the roll brought together. One mask a window."""

    def __init__(self, dim: int = 16, heads: int = 2, side: int = 8, window: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.heads, self.window, self.shift, self.side = heads, window, shift, side
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, window * window, window * window))
        if shift:
            regions = torch.zeros(1, side, side, 1)
            spans = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for i, (h, w) in enumerate((h, w) for h in spans for w in spans):
                regions[:, h, w, :] = i
            flat = self.partition(regions).squeeze(-1)
            apart = flat.unsqueeze(1) - flat.unsqueeze(2)
            self.register_buffer("attn_mask", apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0))

    def partition(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        s = self.window
        return x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = self.partition(x)
        n_windows, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(n_windows, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attn = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        if self.shift:
            each = self.attn_mask.shape[0]
            attn = attn.view(n_windows // each, each, self.heads, n, n) + self.attn_mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.heads, n, n)
        out = self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(n_windows, n, c))
        s = self.window
        out = out.view(b, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return torch.roll(out, shifts=(self.shift, self.shift), dims=(2, 3)) if self.shift else out


class CosineWindows(nn.Module):
    """Cosine of queries and keys under a clamped learned scale for each head; biases from a small network."""

    def __init__(self, dim: int = 16, heads: int = 2, side: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((heads, 1, 1))))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(inplace=True), nn.Linear(16, heads, bias=False))
        grid = (
            torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).float()
        )
        self.register_buffer("offsets", grid[:, None] - grid[None])
        self.qkv = nn.Linear(dim, dim * 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        bias = 16 * torch.sigmoid(self.cpb_mlp(self.offsets).permute(2, 0, 1))
        return ((attn + bias.unsqueeze(0)).softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)


class SelfAttentionGan(nn.Module):
    """Channels first, one head, keys transposed by hand, a gate that begins at zero."""

    def __init__(self, in_dim: int = 16) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(in_dim, in_dim // 4, 1), nn.Conv2d(in_dim, in_dim // 4, 1)
        self.value_conv, self.gamma = nn.Conv2d(in_dim, in_dim, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, C, width, height = x.size()
        proj_query = self.query_conv(x).view(b, -1, width * height).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(b, -1, width * height)
        attention = F.softmax(torch.bmm(proj_query, proj_key), dim=-1)
        proj_value = self.value_conv(x).view(b, -1, width * height)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1))
        return self.gamma * out.view(b, C, width, height) + x


class NonLocal(nn.Module):
    """Keys and values pooled, so that there are fewer of them than queries."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        half = channels // 2
        self.theta, self.g = nn.Conv2d(channels, half, 1), nn.Sequential(nn.Conv2d(channels, half, 1), nn.MaxPool2d(2))
        self.phi, self.W = nn.Sequential(nn.Conv2d(channels, half, 1), nn.MaxPool2d(2)), nn.Conv2d(half, channels, 1)

    def forward(self, x):
        theta_x = self.theta(x).flatten(2).transpose(1, 2)
        f = torch.matmul(theta_x, self.phi(x).flatten(2))
        y = torch.matmul(F.softmax(f, dim=-1), self.g(x).flatten(2).transpose(1, 2))
        return self.W(y.transpose(1, 2).reshape(x.size(0), -1, *x.shape[2:])) + x


class UNetBlock(nn.Module):
    """A diffusion model's: the softmax over keys in the last place, the values multiplied from the left."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        w_ = torch.nn.functional.softmax(torch.bmm(q, k) * (int(c) ** (-0.5)), dim=2)
        v = v.reshape(b, c, h * w)
        return x + self.proj_out(torch.bmm(v, w_.permute(0, 2, 1)).reshape(b, c, h, w))


class GuidedDiffusion(nn.Module):
    """Heads folded into the batch, channels first, the scale split evenly over queries and keys."""

    def __init__(self, channels: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Conv1d(channels, channels * 3, 1)

    def forward(self, x):
        b, c, *spatial = x.shape
        bs, width, length = (qkv := self.qkv(x.reshape(b, c, -1))).shape
        ch = width // (3 * self.heads)
        q, k, v = qkv.reshape(bs * self.heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return x + torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, *spatial)


class Axial(nn.Module):
    """Rows attend within rows, columns within columns; the other axis is folded into the batch."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.row, self.column = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)

    def attend(self, x, projection):
        n, t, c = x.shape
        q, k, v = projection(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return (
            (torch.softmax(q @ k.transpose(-1, -2) / (c // self.heads) ** 0.5, -1) @ v).transpose(1, 2).reshape(n, t, c)
        )

    def forward(self, x):
        b, c, h, w = x.shape
        rows = self.attend(x.permute(0, 2, 3, 1).reshape(b * h, w, c), self.row).view(b, h, w, c)
        columns = self.attend(rows.permute(0, 2, 1, 3).reshape(b * w, h, c), self.column).view(b, w, h, c)
        return columns.permute(0, 3, 2, 1)


class AxialUnfolded(nn.Module):
    """Row attention with the other axis kept as a batch dimension of the products: five dimensions."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Conv2d(dim, 3 * dim, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, 3, self.heads, c // self.heads, h, w).unbind(1)
        logits = torch.einsum("bndhw,bndhv->bnhwv", q, k) * (c // self.heads) ** -0.5
        return torch.einsum("bnhwv,bndhv->bndhw", logits.softmax(-1), v).reshape(b, c, h, w)


class AttentionPool(nn.Module):
    """The mean asks all patches, by the functional multi-head attention with separate projections."""

    def __init__(self, dim: int = 16, heads: int = 2, patches: int = 24) -> None:
        super().__init__()
        self.positional_embedding, self.heads = nn.Parameter(torch.randn(patches + 1, dim)), heads
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        x = x.flatten(start_dim=2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0) + self.positional_embedding[:, None, :].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return x.squeeze(0)


class ReducedKeys(nn.Module):
    """Keys and values from a strided convolution of the same image."""

    def __init__(self, dim: int = 16, heads: int = 2, ratio: int = 2) -> None:
        super().__init__()
        self.heads, self.sr = heads, nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.q, self.kv, self.norm = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.LayerNorm(dim)

    def forward(self, x):
        b, c, h, w = x.shape
        q = self.q(x.flatten(2).transpose(1, 2)).reshape(b, h * w, self.heads, -1).permute(0, 2, 1, 3)
        reduced = self.norm(self.sr(x).reshape(b, c, -1).permute(0, 2, 1))
        k, v = self.kv(reduced).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)


class CrossCovariance(nn.Module):
    """Channels attend to channels: softmax attention all the same, with channels for positions."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(dim, dim * 3)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        attn = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * self.temperature
        return (attn.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c)


IMAGE = (image(16),)
CASES = (
    Case("patches", PatchAttention, (hidden(24),), dims={"heads": 3, "head_dim": 8}, bfloat16=True),
    Case("patches, normed", lambda: PatchAttention(qk_norm=True), (hidden(24),)),
    Case("patches, fused function", lambda: PatchAttention(fused=True), (hidden(24),)),
    Case("relative positions", RelativePositions, (hidden(24),), mask="bias", **ANY_BATCH),
    Case("windows", lambda: ShiftedWindows(shift=0), (image(16, 8, 8),), mask="bias", **ANY_BATCH),
    Case("shifted windows", ShiftedWindows, (image(16, 8, 8),), mask="bias", **ANY_BATCH),
    Case("cosine windows", CosineWindows, (hidden(16),), mask="bias", sizes=Sizes(2, 9), resized=Sizes(3, 9)),
    Case("self-attention gan", SelfAttentionGan, IMAGE, attributes={"scale": 1.0}, **ANY_BATCH),
    Case("non-local", NonLocal, IMAGE, dims={"queries": 24, "keys": 6}, **ANY_BATCH),
    Case("u-net block", UNetBlock, IMAGE, attributes={"scale": 0.25}, **ANY_BATCH),
    Case("guided diffusion", GuidedDiffusion, IMAGE, dims={"head_dim": 8}, **ANY_BATCH),
    Case("axial", Axial, IMAGE, sites=2, **ANY_BATCH),
    Case("axial, unfolded", AxialUnfolded, IMAGE, **ANY_BATCH),
    Case("attention pool", AttentionPool, IMAGE, dims={"queries": 1, "keys": 25}, **ANY_BATCH),
    Case("reduced keys", ReducedKeys, IMAGE, dims={"queries": 24, "keys": 6}, **ANY_BATCH),
    Case("cross-covariance", CrossCovariance, (hidden(16),), either=True),
)
