"""Grouped matrix products are recognised by PyTorch's own operator too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import grouped_mm

import kreg
from kreg.rewriters.report import Report

ENDS = torch.tensor([3, 3, 8, 10], dtype=torch.int32)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 16, 8, generator=generator).bfloat16())

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return grouped_mm(x, self.weight, offs=ends).sin()


class ByColumns(nn.Module):
    """Two matrices and groups of what is summed over: the product of a weight's gradient."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return grouped_mm(x, y, offs=ends).sin()


def rewritten(model: nn.Module, *inputs: Any) -> tuple[Any, Report]:
    program = kreg.export(model, inputs)
    report = kreg.program_report(program)
    assert report is not None
    return program.module()(*inputs), report


def test_a_product_of_rows_and_a_matrix_for_each_group_is_raised_and_verified() -> None:
    model, x = Experts(), torch.randn(10, 16).bfloat16()
    got, report = rewritten(model, x, ENDS)
    (site,) = report.sites
    assert (site.op, site.status) == ("grouped_matmul", "replaced")
    assert site.verify is not None and site.verify.passed and site.verify.max_grad_error is not None
    torch.testing.assert_close(got, model(x, ENDS))


def test_rows_behind_the_last_group_are_no_obstacle() -> None:
    model, x = Experts(), torch.randn(14, 16).bfloat16()
    got, report = rewritten(model, x, ENDS)
    assert [site.status for site in report.sites] == ["replaced"]
    torch.testing.assert_close(got[:10], model(x, ENDS)[:10])


def test_a_product_by_groups_of_columns_is_another_one_and_stays() -> None:
    x, y, ends = torch.randn(8, 16).bfloat16(), torch.randn(16, 8).bfloat16(), ENDS + 6
    got, report = rewritten(ByColumns(), x, y, ends)
    assert not report.sites
    (miss,) = report.near_misses
    assert "not one of rows and a matrix for each group" in miss.reason
    torch.testing.assert_close(got, ByColumns()(x, y, ends))
