"""One sequence reads another: latents, resamplers, gates, pools, decoders with memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import Case, Sizes, hidden, kept_or_none, lengths, memory, tokens


class Latents(nn.Module):
    """A few learned latents read a long input, then themselves."""

    def __init__(self, latents: int = 5, dim: int = 16, width: int = 12) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.cross_q, self.cross_kv = nn.Linear(dim, dim, bias=False), nn.Linear(width, 2 * dim, bias=False)
        self.self_qkv = nn.Linear(dim, 3 * dim, bias=False)

    @staticmethod
    def attend(q, k, v):
        return torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).mul(q.shape[-1] ** -0.5).softmax(-1), v)

    def forward(self, data):
        x = self.latents.repeat(data.shape[0], 1, 1)
        x = x + self.attend(self.cross_q(x), *self.cross_kv(data).chunk(2, -1))
        return x + self.attend(*self.self_qkv(x).chunk(3, -1))


class Resampler(nn.Module):
    """Latents attend to media and to themselves at once: keys of two origins concatenated."""

    def __init__(self, dim: int = 16, heads: int = 2, latents: int = 4) -> None:
        super().__init__()
        self.heads, self.latents = heads, nn.Parameter(torch.randn(latents, dim))
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim * 2, bias=False)

    def forward(self, x):
        x = self.norm_media(x)
        latents = self.norm_latents(self.latents.unsqueeze(0).expand(x.shape[0], -1, -1))
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=-2)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        sim = torch.einsum("... i d, ... j d  -> ... i j", q * q.shape[-1] ** -0.5, k)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("... i j, ... j d -> ... i d", sim.softmax(dim=-1), v)
        return out.transpose(1, 2).flatten(2)


class GatedMedia(nn.Module):
    """Text reads the image that came before it, told by counting the image tokens; what no image precedes is zero."""

    def __init__(self, dim: int = 16, images: int = 3) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.gate, self.images, self.embed = nn.Parameter(torch.tensor([0.0])), images, nn.Embedding(40, dim)

    def forward(self, ids, media):
        x = self.embed(ids)
        text_time = (ids % 4 == 1).cumsum(dim=-1)
        media_time = torch.arange(self.images).repeat_interleave(media.shape[1] // self.images) + 1
        q, (k, v) = self.to_q(x) * 0.25, self.to_kv(media).chunk(2, dim=-1)
        sim = q @ k.transpose(-1, -2)
        sim = sim.masked_fill(text_time[:, :, None] != media_time[None, None], -torch.finfo(sim.dtype).max)
        attn = sim.softmax(dim=-1).masked_fill((text_time == 0)[:, :, None], 0.0)
        return x + (attn @ v) * self.gate.tanh()


class GatedMediaAfter(GatedMedia):
    """The same with the zeros put on the result, where they do not come between softmax and values."""

    def forward(self, ids, media):
        x = self.embed(ids)
        text_time = (ids % 4 == 1).cumsum(dim=-1)
        media_time = torch.arange(self.images).repeat_interleave(media.shape[1] // self.images) + 1
        q, (k, v) = self.to_q(x) * 0.25, self.to_kv(media).chunk(2, dim=-1)
        sim = q @ k.transpose(-1, -2)
        sim = sim.masked_fill(text_time[:, :, None] != media_time[None, None], -torch.finfo(sim.dtype).max)
        out = (sim.softmax(dim=-1) @ v).masked_fill((text_time == 0)[:, :, None], 0.0)
        return x + out * self.gate.tanh()


class OneQuery(nn.Module):
    """A learned query pools a padded sequence."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.query = heads, nn.Parameter(torch.zeros(1, 1, dim))
        self.kv, self.proj = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask):
        b, n, c = x.shape
        q = self.query.expand(b, -1, -1).view(b, 1, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        score = torch.matmul(q, k.transpose(2, 3)) / (c // self.heads) ** 0.5
        score = score + (1.0 - mask[:, None, None, :].to(score.dtype)) * -1e4
        return self.proj(torch.matmul(torch.softmax(score, -1), v).reshape(b, c))


class VectorQuery(nn.Module):
    """The query is a plain vector: scores are a matrix times a vector, the pool a weighted sum by bmm."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.key, self.context = nn.Linear(dim, dim), nn.Parameter(torch.randn(dim))

    def forward(self, x):
        alpha = torch.softmax(self.key(x) @ self.context, dim=1)
        return torch.bmm(alpha.unsqueeze(1), x).squeeze(1)


class Multiplicative(nn.Module):
    """Luong's attention of a recurrent decoder: states read the encoder's, masked by lengths."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, dim), nn.Linear(16, dim)
        self.w_a = nn.Linear(dim, dim, bias=False)

    def forward(self, target, source, source_lengths):
        memory, state = torch.tanh(self.encoder(source)), torch.tanh(self.decoder(target))
        align = torch.bmm(self.w_a(state), memory.transpose(1, 2))
        mask = torch.arange(source.size(1)).unsqueeze(0) < source_lengths.unsqueeze(1)
        align = align.masked_fill(~mask.unsqueeze(1), -float("inf"))
        context = torch.bmm(F.softmax(align, dim=-1), memory)
        return torch.tanh(torch.cat([context, state], dim=-1))


class Additive(nn.Module):
    """Bahdanau's: the scores are no product of queries and keys."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.W, self.U, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)

    def forward(self, x, source):
        e = self.v(torch.tanh(self.W(x).unsqueeze(2) + self.U(source).unsqueeze(1))).squeeze(-1)
        return torch.bmm(e.softmax(-1), source)


class EncoderDecoder(nn.Module):
    """Extended masks added to scores in all three attentions, causal and padding summed in the decoder."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, dim)
        self.projections = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(9))

    def attend(self, which, x, source, mask):
        three = zip(self.projections[3 * which : 3 * which + 3], (x, source, source), strict=True)
        q, k, v = (p(t).unflatten(-1, (2, -1)).transpose(1, 2) for p, t in three)
        return (torch.softmax(q @ k.transpose(3, 2) + mask, dim=-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, source, target, keep):
        padded = (1.0 - keep[:, None, None, :].float()) * torch.finfo(torch.float32).min
        n = target.shape[1]
        future = (torch.arange(n)[None, :] > torch.arange(n)[:, None]).float() * torch.finfo(torch.float32).min
        x = self.embed(source)
        x = x + self.attend(0, x, x, padded)
        y = self.embed(target)
        y = y + self.attend(1, y, y, future[None, None])
        return y + self.attend(2, y, x, padded)


class BothWays(nn.Module):
    """One product of two sequences, read by rows and by columns: each attends to the other.

    The largest score of all, then that of each column, are taken off, and what is left is kept within bounds.
    """

    def __init__(self, bound: float = 3e4) -> None:
        super().__init__()
        self.bound = bound
        self.words, self.pixels = nn.Linear(16, 48), nn.Linear(12, 48)

    def forward(self, text, image, count):
        words, meaning = self.words(text).unflatten(-1, (3, 16)).split([1, 2], 2)
        pixels, colour = self.pixels(image).unflatten(-1, (3, 16)).split([1, 2], 2)
        both = torch.einsum("bic,bjc->bij", words.squeeze(2), pixels.squeeze(2)) / 4
        both = (both - both.max()).clamp(-self.bound, self.bound)
        there = torch.arange(text.shape[1]) < count[:, None]
        for_pixels = (both - both.amax(1, keepdim=True)).clip(min=-self.bound)
        for_pixels = for_pixels.masked_fill(~there[..., None], -torch.inf)
        read = torch.softmax(both, 2) @ colour.flatten(2)
        return read, torch.einsum("bij,bid->bjd", torch.softmax(for_pixels, 1), meaning.flatten(2))


class SlotAttention(nn.Module):
    """Slots compete for inputs: the softmax runs over the queries, the weights are normalised afterwards."""

    def __init__(self, dim: int = 16, slots: int = 4) -> None:
        super().__init__()
        self.slots, self.kv, self.q = (
            nn.Parameter(torch.randn(slots, dim)),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        q = self.q(self.slots).expand(x.shape[0], -1, -1)
        attn = (q @ k.mT * 0.25).softmax(dim=1) + 1e-8
        return (attn / attn.sum(dim=-1, keepdim=True)) @ v


CASES = (
    Case("latents", Latents, (hidden(12),), sites=2, bfloat16=True),
    Case("resampler", Resampler, (hidden(16),), dims={"queries": 4, "keys": 16}),
    Case("gated media, zeros inside", GatedMedia, (tokens(), memory(16)), sites=0, reason="", sizes=Sizes(2, 12, 6)),
    Case(
        "gated media, zeros on the result",
        GatedMediaAfter,
        (tokens(), memory(16)),
        mask="input",
        sizes=Sizes(2, 12, 6),
        resized=Sizes(3, 17, 9),
    ),
    Case("one query", OneQuery, (hidden(16), kept_or_none()), mask="soft padding", dims={"queries": 1}),
    Case("a vector for a query", VectorQuery, (hidden(16),), either=True),
    Case("multiplicative", Multiplicative, (hidden(16), memory(12), lengths("memory")), mask="padding"),
    Case("additive", Additive, (hidden(16), memory(16)), sites=0, reason=None),
    Case(
        "encoder and decoder",
        EncoderDecoder,
        (tokens("memory"), tokens(), kept_or_none("memory")),
        sites=3,
        mask=("padding", "causal", "padding"),
    ),
    Case(
        "both ways",
        BothWays,
        (hidden(16), memory(12), lengths()),
        sites=2,
        mask=("full", "padding"),
    ),
    Case(
        "both ways, within narrow bounds",
        lambda: BothWays(bound=2.0),
        (hidden(16), memory(12), lengths()),
        sites=0,
        reason="before the softmax",
    ),
    Case("slots", SlotAttention, (hidden(16),), sites=0, reason=""),
)
