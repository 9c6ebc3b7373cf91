"""A module that computes an `Indexed` in plain PyTorch: an indexer, its selection, and the attention that reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.fuzz import masks
from tests.fuzz.forms import Indexed
from tests.fuzz.scene import Scene
from tests.fuzz.twists import bend

INF = float("-inf")


class FuzzedIndexer(nn.Module):
    """See `Indexed`."""

    def __init__(self, program: Indexed) -> None:
        super().__init__()
        self.program = program
        self.sinks = nn.Parameter(torch.randn(program.heads))
        self.eval()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The result, and what twists let out of the region."""
        p = self.program
        scene = Scene(p, self, inputs, bend)
        q = scene.at("q", inputs["q"])
        entries = scene.at("entries", inputs["entries"])
        queries, count = q.shape[2], entries.shape[1]
        position = torch.arange(queries)[:, None]
        ready = scene.at("ready", (torch.arange(count) + 1) * p.ratio <= position + 1)
        slots = scene.at("slots", self._slots(scene, ready, count))
        seen = scene.at("seen", self._seen(slots, (slots.shape[0], queries, count)))
        keys, mask = entries, seen
        if p.window:
            i, j = position, torch.arange(queries)
            near = scene.at("near", (j <= i) & (j > i - p.window)).expand(seen.shape[0], -1, -1)
            if seen.dtype != torch.bool:
                near = torch.zeros(near.shape, dtype=seen.dtype).masked_fill(~near, torch.finfo(seen.dtype).min)
            mask = torch.cat([near, seen], dim=-1)
            keys = torch.cat([inputs["kv"], entries], dim=1)
        values = scene.at("values", keys)
        scores = q @ keys[:, None].mT * 0.5
        mask = mask[:, None]
        filled = scores + mask if mask.dtype != torch.bool else masks.FILLS[p.fill](scores, mask, INF)
        logits = scene.at("logits", filled)
        if p.sink:
            sink = self.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = scene.at("weights", logits.softmax(-1)[..., : keys.shape[1]])
        out = scene.at("result", weights @ values[:, None])
        return (out, *scene.extra) if scene.extra else out

    def _slots(self, scene: Scene, ready: Tensor, count: int) -> Tensor:
        """Where each pick is written: its entry, or one place behind all entries for a pick that is none."""
        p, inputs = self.program, scene.inputs
        products = scene.at("products", torch.einsum("bshd,bjd->bshj", inputs["iq"], inputs["ik"]))
        rectified = scene.at("rectified", products.relu())
        weights = scene.at("head weights", inputs["iw"])
        match p.weighted:
            case "mul":
                scores = (rectified * 0.5 * weights.unsqueeze(-1)).sum(2)
            case "matmul":
                scores = (weights.unsqueeze(2) @ rectified).squeeze(2)
            case _:
                scores = torch.einsum("bsh,bshj->bsj", weights * 0.5, rectified)
        scores = scene.at("selection scores", scores)
        if p.future:
            scores = masks.FILLS[p.future](scores, ready, INF)
        picks = scene.at("picks", scores.topk(min(p.topk, p.entries), dim=-1).indices)
        late = (picks + 1) * p.ratio > torch.arange(picks.shape[1])[:, None] + 1
        if p.sentinel == "where":
            picks = torch.where(late, -1, picks)
        elif p.sentinel == "masked_fill":
            picks = picks.masked_fill(late, -1)
        return torch.where(picks >= 0, picks, count)

    def _seen(self, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The selection as a mask: additive zeros in -inf, or booleans."""
        batch, queries, count = shape
        if self.program.scatter == "bias":
            dtype = getattr(torch, self.program.dtype)
            return torch.full((batch, queries, count + 1), INF, dtype=dtype).scatter(-1, slots, 0.0)[..., :count]
        if self.program.scatter == "bool":
            return torch.zeros(batch, queries, count + 1, dtype=torch.bool).scatter(-1, slots, True)[..., :count]
        return ~torch.ones(batch, queries, count + 1, dtype=torch.bool).scatter_(-1, slots, False)[..., :-1]


def inputs_of(p: Indexed, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs by name. One head's products are positive, so that no two scores are equal."""
    dtype = getattr(torch, p.dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    iq = noise(p.batch, p.queries, p.index_heads, p.index_dim)
    return {
        "q": noise(p.batch, p.heads, p.queries, p.dim),
        "kv": noise(p.batch, p.queries, p.dim),
        "entries": noise(p.batch, p.entries, p.dim),
        "iq": torch.cat([iq[:, :, :1].abs(), iq[:, :, 1:]], dim=2),
        "ik": noise(p.batch, p.entries, p.index_dim).abs(),
        "iw": noise(p.batch, p.queries, p.index_heads),
        "indices": torch.randint(0, p.entries, (p.batch, p.queries, p.entries), generator=generator),
    }
