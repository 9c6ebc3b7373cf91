"""PyTorch's own modules and functions, with the arguments that people give them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.handwritten.case import (
    Case,
    dropped,
    hidden,
    length_first,
    memory,
    memory_first,
    padding,
    scores,
    unbatched,
)

E, H = 16, 2


class Mha(nn.Module):
    """nn.MultiheadAttention with options of the module and of the call; attention of the first input to the last."""

    def __init__(self, call=None, names=(), **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, **({"batch_first": True} | options))
        self.call, self.names = call or {"need_weights": False}, names

    def forward(self, *inputs):
        tensors, named = inputs[: len(inputs) - len(self.names)], inputs[len(inputs) - len(self.names) :]
        query, key = tensors[0], tensors[-1]
        arguments = dict(zip(self.names, named, strict=True)) | self.call
        return self.attention(query, key, key, **arguments)[0]


class MhaCausal(nn.Module):
    """The mask of nn.Transformer, made anew for each length, with the hint that it is causal or without."""

    def __init__(self, hint: bool) -> None:
        super().__init__()
        self.attention, self.hint = nn.MultiheadAttention(E, H, batch_first=True), hint

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return self.attention(x, x, x, attn_mask=mask, is_causal=self.hint, need_weights=False)[0]


class MhaWithWeights(nn.Module):
    """The weights are asked for and used: they leave the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=True)
        return out, weights


class Functional(nn.Module):
    """F.multi_head_attention_forward with packed projections, a key and a value of its own, a zero key."""

    def __init__(self, bias: bool = False, zero: bool = False) -> None:
        super().__init__()
        self.in_proj, self.in_bias = nn.Parameter(torch.empty(3 * E, E)), nn.Parameter(torch.zeros(3 * E))
        self.out_proj, self.zero = nn.Linear(E, E), zero
        self.bias_k = nn.Parameter(torch.zeros(1, 1, E)) if bias else None
        self.bias_v = nn.Parameter(torch.zeros(1, 1, E)) if bias else None

    def forward(self, x):
        return F.multi_head_attention_forward(
            *(x, x, x, E, H, self.in_proj, self.in_bias, self.bias_k, self.bias_v, self.zero, 0.0),
            *(self.out_proj.weight, self.out_proj.bias),
            training=self.training,
            need_weights=False,
        )[0]


class Encoder(nn.Module):
    """Two layers with padding; trained without dropout, or evaluated with gradients."""

    def __init__(self, **options) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 24, **({"dropout": 0.0, "batch_first": True} | options))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, pad):
        return self.encoder(x, src_key_padding_mask=pad)


class CausalEncoder(nn.Module):
    """A decoder-only model made of encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, H, 24, 0.0, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x):
        n = x.shape[1]
        return self.layer(x, src_mask=torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1))


class Decoder(nn.Module):
    """Masked self attention, then attention to a padded memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, batch_first=True)

    def forward(self, x, memory, pad):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=pad)


class Seq2Seq(nn.Module):
    """nn.Transformer, sequence first as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(E, H, 1, 1, 24, dropout=0.0)

    def forward(self, source, target):
        mask = self.transformer.generate_square_subsequent_mask(target.size(0))
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


class QueriesOnObjects(nn.Module):
    """Learned queries read an encoded image: positions are added to queries and keys, not to values."""

    def __init__(self, queries: int = 5) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(queries, E)
        self.self_attn, self.multihead_attn = nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)

    def forward(self, memory, pos, pad):
        query_pos = self.query_embed.weight.unsqueeze(1).repeat(1, memory.shape[1], 1)
        tgt = torch.zeros_like(query_pos)
        q = k = tgt + query_pos
        tgt = tgt + self.self_attn(q, k, value=query_pos)[0]
        reads = self.multihead_attn(query=tgt + query_pos, key=memory + pos, value=memory, key_padding_mask=pad)
        return tgt + reads[0]


WEIGHED = {"need_weights": True}
PER_HEAD = {"need_weights": True, "average_attn_weights": False}
UNWEIGHED = {"need_weights": False}
CASES = (
    Case("mha", Mha, (hidden(E),), bfloat16=True),
    Case("mha, weights asked for and not used", lambda: Mha(WEIGHED), (hidden(E),)),
    Case("mha, weights by head not used", lambda: Mha(PER_HEAD), (hidden(E),)),
    Case("mha, training", Mha, (hidden(E),), training=True),
    Case("mha, length first", lambda: Mha(batch_first=False), (length_first(E),)),
    Case("mha, no batch", Mha, (unbatched(E),)),
    Case("mha, no bias, own widths", lambda: Mha(bias=False, kdim=12, vdim=12), (hidden(E), memory(12))),
    Case("mha, cross", lambda: Mha(batch_first=False), (length_first(E), memory_first(E))),
    Case("mha, padding", lambda: Mha(UNWEIGHED, ("key_padding_mask",)), (hidden(E), padding()), mask="padding"),
    Case("mha, padding, weighed", lambda: Mha(WEIGHED, ("key_padding_mask",)), (hidden(E), padding()), mask="padding"),
    Case("mha, bool mask", lambda: Mha(UNWEIGHED, ("attn_mask",)), (hidden(E), dropped()), mask="input"),
    Case("mha, float mask", lambda: Mha(UNWEIGHED, ("attn_mask",)), (hidden(E), scores()), mask="bias"),
    Case("mha, float mask, weighed", lambda: Mha(WEIGHED, ("attn_mask",)), (hidden(E), scores()), mask="bias"),
    Case("mha, causal with a hint", lambda: MhaCausal(True), (hidden(E),), mask="causal"),
    Case("mha, causal without a hint", lambda: MhaCausal(False), (hidden(E),), mask="causal"),
    Case("mha, key and value of its own", lambda: Mha(add_bias_kv=True), (hidden(E),), either=True),
    Case("mha, zero key", lambda: Mha(add_zero_attn=True), (hidden(E),), either=True),
    Case("mha, weights used", MhaWithWeights, (hidden(E),), sites=0, reason="used"),
    Case("functional", Functional, (length_first(E),)),
    Case("functional, key of its own and zero key", lambda: Functional(True, True), (length_first(E),), either=True),
    Case("encoder, training", Encoder, (hidden(E), padding()), sites=2, mask="padding", training=True),
    Case("encoder, evaluated", lambda: Encoder(dropout=0.1), (hidden(E), padding()), sites=2, mask="padding"),
    Case("causal encoder", CausalEncoder, (hidden(E),), mask="causal", training=True),
    Case(
        "decoder",
        Decoder,
        (hidden(E), memory(E), padding("memory")),
        sites=2,
        mask=("causal", "padding"),
        training=True,
    ),
    Case(
        "seq2seq", Seq2Seq, (memory_first(E), length_first(E)), sites=3, mask=("full", "causal", "full"), training=True
    ),
    Case("objects", QueriesOnObjects, (memory_first(E), memory_first(E), padding("memory")), 2, ("full", "padding")),
)
