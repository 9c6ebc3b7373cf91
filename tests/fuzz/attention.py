"""A module that computes an `Attention` in plain PyTorch, stage by stage; twists come in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz import layouts, masks
from tests.fuzz.forms import Attention
from tests.fuzz.layouts import LAYOUTS, SPREADS
from tests.fuzz.scene import Scene
from tests.fuzz.twists import SDPA_DROPOUT, bend

FEATURES = 8
"""Width of the sequences that are projected."""


def _by_hand(x: Tensor) -> Tensor:
    raised = torch.exp(x - x.amax(-1, keepdim=True))
    return raised / raised.sum(-1, keepdim=True)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.softmax(-1),
    "F": lambda x: F.softmax(x, dim=-1),
    "torch": lambda x: torch.softmax(x, x.dim() - 1),
    "wide": lambda x: F.softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype),
    "float32": lambda x: x.float().softmax(-1).to(x.dtype),
    "module": nn.Softmax(dim=-1),
    "by hand": _by_hand,
    "exp of log": lambda x: F.log_softmax(x, dim=-1).exp(),
}


class FuzzedAttention(nn.Module):
    """See `Attention`."""

    def __init__(self, program: Attention) -> None:
        super().__init__()
        self.program = p = program
        self.layout = LAYOUTS[p.layout]
        widths = [p.heads * p.dim, p.groups * p.dim, p.groups * p.value_dim]
        if p.projection == "fused":
            self.qkv = nn.Linear(FEATURES, sum(widths))
        elif p.projection == "separate":
            self.projections = nn.ModuleList(nn.Linear(FEATURES, width, bias=False) for width in widths)
        self.sinks = nn.Parameter(torch.randn(p.heads))
        self.mixing = nn.Parameter(torch.randn(p.heads, p.heads))
        self.table = nn.Parameter(torch.randn(9, p.heads))
        self.dropout = nn.Dropout(0.4 if p.dropout else 0.0)
        self.eval()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The result, and what twists let out of the region."""
        heads, rows = self.layout.axes
        scene = Scene(self.program, self, inputs, bend, self.layout, heads, rows)
        q, k, v = self._operands(scene)
        if self.program.scaled in ("q", "both"):
            q = q * (self.program.scale if self.program.scaled == "q" else self.program.scale**0.5)
        if self.program.scaled in ("k", "both"):
            k = k * (self.program.scale if self.program.scaled == "k" else self.program.scale**0.5)
        q, k, v = scene.at("q", q), scene.at("k", k), scene.at("v", v)
        attend = self._by_sdpa if self.program.product == "sdpa" else self._by_softmax
        out = scene.at("out", attend(scene, q, k, v))
        if self.program.merged:
            out = self.layout.merge(out, self.program.batch if self.program.layout == "sd" else -1, self.program.heads)
        out = scene.at("result", out)
        return (out, *scene.extra) if scene.extra else out

    def _operands(self, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        p = self.program
        if p.projection == "given":
            found = [scene.inputs[name] for name in ("q", "k", "k" if p.shared else "v")]
        else:
            found = self._projected(scene.inputs["x"], scene.inputs.get("y", scene.inputs["x"]))
            if p.shared:
                found[2] = found[1]
        if p.projection == "given" and p.layout in ("nsd", "sd"):
            q, k, v = found
        else:
            spread = SPREADS["broadcast" if p.layout == "bgrsd" or p.ratio == 1 else p.spread]
            k, v = (
                scene.at(f"{name} spread", spread(x, p.ratio, self.layout.heads))
                for name, x in zip("kv", found[1:], strict=True)
            )
            q, k, v = (self.layout.flatten(x, p.groups) for x in (found[0], k, v))
        if scene.bend(scene, "lengths", q) is not q:
            rows = self.layout.axes[1]
            k, v = k.narrow(rows, 1, k.shape[rows] - 1), v.narrow(rows, 0, v.shape[rows] - 1)
        return q, k, k if p.shared else v

    def _projected(self, x: Tensor, y: Tensor) -> list[Tensor]:
        p = self.program
        if p.projection == "fused":
            pieces = list(self.qkv(x).split([p.heads * p.dim, p.groups * p.dim, p.groups * p.value_dim], dim=-1))
        else:
            pieces = [projection(s) for projection, s in zip(self.projections, (x, y, y), strict=True)]
        counts = (p.heads, p.groups, p.groups)
        four = [piece.unflatten(-1, (count, -1)) for piece, count in zip(pieces, counts, strict=True)]
        return four if self.layout.heads == 2 else [piece.transpose(1, 2) for piece in four]

    def _conditions(self, scene: Scene, queries: int, keys: int) -> list[Tensor]:
        found = [masks.CONDITIONS[mask.kind](mask, scene.inputs, queries, keys) for mask in self.program.masks]
        if self.program.joined and found:
            joined = found[0]
            for condition in found[1:]:
                joined = joined & condition
            found = [joined]
        return [scene.at("keep", layouts.per_batch(self.layout, c, self.program.heads)) for c in found]

    def _filled(self, scene: Scene, scores: Tensor, queries: int, keys: int) -> Tensor:
        for mask, keep in zip(self.program.masks, self._conditions(scene, queries, keys), strict=False):
            scores = masks.FILLS[mask.fill](scores, keep, masks.number(mask.value, scores.dtype))
        return scores

    def _bias(self, scene: Scene, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
        p = self.program
        match p.bias:
            case "alibi":
                bias = masks.alibi(p.heads, queries, keys, 0, dtype)
            case "alibi of keys":
                bias = masks.alibi_of_keys(p.heads, queries, keys, 0, dtype)
            case "relative":
                bias = masks.relative(self.table, queries, keys)
            case "input":
                return layouts.per_batch(self.layout, scene.inputs["bias"][:, :queries, :keys], p.heads)
            case _:
                return None
        return layouts.per_head(self.layout, bias, p.batch, p.groups)

    def _by_softmax(self, scene: Scene, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p, rows = self.program, self.layout.axes[1]
        queries, keys = q.shape[rows], k.shape[rows]
        bias = self._bias(scene, queries, keys, q.dtype)
        if p.product == "baddbmm":
            start = q.new_zeros(1, 1, 1) if bias is None else bias
            scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=0.0 if bias is None else 1.0, alpha=p.scale)
            bias = None
        else:
            scores = layouts.scores_of(self.layout, q, k, p.product)
            if p.scaled == "after":
                scores = scores * p.scale
            elif p.scaled == "divided":
                scores = scores / (1 / p.scale)
        scores = scene.at("scores", scores)
        if p.softcap:
            scores = torch.tanh(scores / p.softcap) * p.softcap
        if bias is not None:
            scores = scores + bias
        logits = scene.at("logits", self._filled(scene, scores, queries, keys))
        weights = scene.at("weights", self.dropout(self._softmax(scene, logits)))
        return layouts.values_of(self.layout, weights, v, p.product)

    def _softmax(self, scene: Scene, logits: Tensor) -> Tensor:
        p = self.program
        keys = logits.shape[-1]
        if p.sink:
            sink = layouts.per_head(self.layout, self.sinks.view(-1, 1, 1), p.batch, p.groups)
            sink = sink.to(logits.dtype).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink] if p.sink == "behind" else [sink, logits], dim=-1)
        if p.steadied:
            logits = logits - logits.amax(-1, keepdim=True)
        changed = scene.bend(scene, "softmax", logits)
        weights = changed if changed is not logits else SOFTMAXES[p.softmax](logits)
        if p.sink:
            weights = weights[..., :keys] if p.sink == "behind" else weights[..., 1:]
        return weights

    def _by_sdpa(self, scene: Scene, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.program
        if self.layout.letters == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        queries, keys = q.shape[-2], k.shape[-2]
        whole = len(p.masks) == 1 and p.masks[0].made == "is_causal"
        mask = None if whole or not p.masks else self._sdpa_mask(scene, queries, keys, q.dtype)
        bias = self._bias(scene, queries, keys, q.dtype)
        if bias is not None:
            mask = (
                bias
                if mask is None
                else bias.masked_fill(~mask, float("-inf"))
                if mask.dtype == torch.bool
                else bias + mask
            )
        grouped = p.spread == "broadcast" and p.ratio > 1 and p.layout != "bgrsd"
        out = F.scaled_dot_product_attention(
            *(q, k, v, mask),
            dropout_p=0.4 if SDPA_DROPOUT in p.twists else 0.0,
            scale=p.scale if p.scaled in ("after", "divided") else 1.0,
            is_causal=whole,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2) if self.layout.letters == "bshd" else out

    def _sdpa_mask(self, scene: Scene, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        if self.program.masks[0].fill not in ("masked_fill", "where"):
            return self._filled(scene, torch.zeros(1, 1, dtype=dtype), queries, keys)
        keep = torch.ones(1, 1, dtype=torch.bool)
        for condition in self._conditions(scene, queries, keys):
            keep = keep & condition
        return keep


def inputs_of(p: Attention, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs by name."""
    dtype = getattr(torch, p.dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def picks(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    inputs: dict[str, Tensor] = {}
    if p.projection == "given":
        for name, heads, rows, dim in (
            ("q", p.heads, p.queries, p.dim),
            ("k", p.groups, p.length, p.dim),
            ("v", p.groups, p.length, p.value_dim),
        ):
            shape = (p.batch, heads, rows, dim) if LAYOUTS[p.layout].heads == 1 else (p.batch, rows, heads, dim)
            shape = {"nsd": (p.batch, rows, dim), "sd": (rows, dim)}.get(p.layout, shape)
            inputs[name] = noise(*shape)
        if p.shared:
            del inputs["v"]
    else:
        inputs["x"] = noise(p.batch, p.queries, FEATURES)
        if p.keys:
            inputs["y"] = noise(p.batch, p.keys, FEATURES)
    kinds = {mask.kind for mask in p.masks}
    longest = max(p.queries, p.length)
    if "padding" in kinds:
        inputs["padding"] = picks(0.7, p.batch, p.length) | (torch.arange(p.length) == 0)
    if "numbers" in kinds:
        inputs["numbers"] = (picks(0.7, p.batch, p.length) | (torch.arange(p.length) == 0)).long()
    if "boolean" in kinds:
        inputs["boolean"] = picks(0.6, p.batch, p.queries, p.length) | (torch.arange(p.length) == 0)
    if "documents" in kinds:
        inputs["documents"] = picks(0.3, p.batch, longest).cumsum(-1)
    if p.bias == "input":
        inputs["bias"] = noise(p.batch, p.queries, p.length)
    return inputs


CONDITIONS = ("padding", "numbers", "boolean")
"""Inputs that tell which keys are kept."""


def emptied(inputs: Mapping[str, Tensor], level: float) -> dict[str, Tensor]:
    """The same, with masks that leave some queries no key, and a bias of ``level`` in places and in whole rows."""
    changed = dict(inputs)
    for name in CONDITIONS:
        if name in inputs:
            changed[name] = inputs[name].clone()
            changed[name][0] = 0
    if "bias" in inputs:
        bias = inputs["bias"].masked_fill(inputs["bias"] > 1, level)
        bias[0, 0] = level
        changed["bias"] = bias
    return changed
