"""What stands behind an op sees its result in another order in memory, through whatever passes that order on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kreg


class BehindImages(nn.Module):
    """Attention between pixels, an operator that keeps channels last, and a view that they allow."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.qkv, self.behind = nn.Conv2d(8, 24, 1), behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(-1, 1, 8, 16).transpose(-1, -2) for t in self.qkv(x).chunk(3, 1))
        out = torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v)
        out = out.reshape(-1, 1, 4, 4, 8).permute(0, 1, 4, 2, 3).reshape(-1, 8, 4, 4)
        out = self.behind(out).permute(0, 2, 3, 1)
        return out.view(out.shape[0], -1)


@pytest.mark.parametrize(
    "behind", [nn.Conv2d(8, 8, 1), nn.AvgPool2d(2), nn.BatchNorm2d(8).eval(), nn.Upsample(scale_factor=2), nn.PReLU()]
)
def test_a_view_behind_operators_on_images_need_not_fit(behind: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = BehindImages(behind), torch.randn(2, 8, 4, 4)
    program = kreg.export(model, (x,), device="cpu")
    report = kreg.program_report(program)
    assert report is not None and [site.status for site in report.sites] == ["replaced"]
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


class Dropped(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        scores = (k @ q.mT).mT.contiguous().mT.clone().mT
        scores.masked_fill_(~keep, -torch.inf)
        return F.dropout(scores, 0.4, training=True).softmax(-1) @ k


def test_a_program_without_ops_draws_the_random_numbers_that_it_drew() -> None:
    q, k = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    keep = torch.rand(2, 1, 5, 5) < 0.7
    program = kreg.export(Dropped(), (q, k, keep), device="cpu")
    found = []
    for module in (Dropped(), program.module()):
        torch.manual_seed(3)
        found.append(module(q, k, keep))
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert any(str(node.target) == "aten.masked_fill_.Scalar" for node in program.graph.nodes)
