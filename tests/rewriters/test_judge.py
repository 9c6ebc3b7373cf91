"""The judge of a site computes what the site computes, and not what gives it a dtype or a shape alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kreg.api import analyse
from kreg.rewriters import program as programs
from kreg.rewriters import verify as verification
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find
from kreg.rewriters.site import Site
from kreg.rewriters.sizes import Sizes


class Block(nn.Module):
    """Attention whose queries and keys are normalised in float32 and come back as the dtype they were of."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(2, 12, 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (F.rms_norm(y.float(), (16,)).type_as(y) for y in (q, k))
        # Captured as a view of the strides that the fused attention gives, and its plain form does not.
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 12, 32)
        added: torch.Tensor = x + self.o(attended)
        return added


def test_layers_before_a_site_are_no_part_of_its_verification(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    computed: list[int] = []
    original = verification._old

    def counted(site: Site, outputs: list, inner: list, sizes: object) -> object:  # type: ignore[type-arg]
        computed.append(len(inner))
        return original(site, outputs, inner, sizes)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "_old", counted)
    monkeypatch.setattr("kreg.rewriters.repeats.Repeats.first", lambda self, site, *rest: site)
    program = export_model(nn.Sequential(Block(), Block(), Block()), torch.randn(2, 12, 32))
    report = analyse(program, None, device="cpu", verify=True)
    attentions = [site for site in report.sites if site.op == "attention"]
    assert [site.status for site in attentions] == ["replaced"] * 3, [site.reason for site in attentions]
    assert max(computed) <= 10


class Excluding(nn.Module):
    """Three inputs, each of which says what is not kept."""

    def forward(self, q, k, v, keys, queries, pairs):  # type: ignore[no-untyped-def]
        scores = q @ k.mT
        for excluded in (keys[:, None, None], queries[:, None, :, None], pairs[:, None]):
            scores = scores.masked_fill(excluded, -1e30)
        return scores.softmax(-1) @ v


def test_conditions_are_drawn_so_that_together_they_leave_keys() -> None:
    q, k, v = torch.randn(3, 2, 2, 16, 8)
    excluded = [torch.zeros(shape, dtype=torch.bool) for shape in ((2, 16), (2, 16), (2, 16, 16))]
    graph = programs.functional(export_model(Excluding(), (q, k, v, *excluded), None)).module
    (site,) = find(graph.graph).sites
    values = verification._draw(site, [], Sizes(graph.graph, verification._sized(site)), torch.Generator(), {})
    kept = torch.ones(2, 2, 16, 16, dtype=torch.bool)
    for name in ("padding", "mask"):
        value = site.operands[name].value(values)
        kept &= value[:, None, None] if name == "padding" else value
    assert 0.3 < kept.float().mean() < 0.7
