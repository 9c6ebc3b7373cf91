"""A soft cap is the op's where it is around the product alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kreg

CAP = 5.0


class Capped(nn.Module):
    """Keys by their distance are a second product of the queries, added before the cap or after it."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before, self.distances = before, nn.Parameter(torch.randn(9, 9, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, added = q @ k.mT * 0.3, torch.einsum("bhsd,std->bhst", q, self.distances)
        if self.before:
            return (torch.tanh((scores + added) / CAP) * CAP).softmax(-1) @ v
        return (torch.tanh(scores / CAP) * CAP + added).softmax(-1) @ v


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(3))
    return q, k, v


def test_a_product_that_is_added_after_the_cap_is_a_bias() -> None:
    (site,) = kreg.analyse(Capped(before=False), inputs()).sites
    assert site.status == "replaced", site.reason
    assert site.mask is not None
    assert site.mask["input"] == ["bias"]
    assert site.verify is not None
    assert site.verify.passed


def test_one_that_is_added_before_it_is_refused() -> None:
    report = kreg.analyse(Capped(before=True), inputs())
    assert not report.sites
    (miss,) = report.near_misses
    assert "added to the scores before they are capped" in miss.reason
