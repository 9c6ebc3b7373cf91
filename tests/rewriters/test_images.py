"""Attention over an image: places are rows and columns, and what is added to the scores knows them one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kreg
from kreg.rewriters import program
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find

ROWS, COLUMNS, CHANNELS = 4, 3, 8
PLACES = ROWS * COLUMNS


class Decomposed(nn.Module):
    """A product of queries with the keys, one with rows and one with columns by their distance (arXiv:2112.01526)."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.rows, self.columns = (nn.Parameter(torch.randn(2 * s - 1, CHANNELS)) for s in (ROWS, COLUMNS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, places, channels = q.shape
        image = q.reshape(batch * heads, ROWS, COLUMNS, channels)
        by_row, by_column = (
            table[torch.arange(s)[:, None] - torch.arange(s) + s - 1]
            for table, s in ((self.rows, ROWS), (self.columns, COLUMNS))
        )
        rows = torch.einsum("bhwc,hkc->bhwk", image, by_row)
        columns = torch.einsum("bhwc,wkc->bhwk", image, by_column)
        if self.form == "fused":
            bias = (rows[..., :, None] + columns[..., None, :]).reshape(batch, heads, places, places)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        scores = q.flatten(0, 1) * channels**-0.5 @ k.flatten(0, 1).mT
        apart = scores.view(batch * heads, ROWS, COLUMNS, ROWS, COLUMNS)
        apart = apart + rows[..., :, None] + columns[..., None, :]
        weights = apart.view(batch * heads, places, places).softmax(-1)
        return (weights @ v.flatten(0, 1)).view(batch, heads, places, channels)


class OfBlocks(nn.Module):
    """A mask of rows by rows, which holds for all places of two rows."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        apart = (q @ k.mT * 0.3).view(*q.shape[:2], ROWS, COLUMNS, ROWS, COLUMNS)
        kept = apart.masked_fill(~rows[:, None, :, None, :, None], -torch.inf)
        return kept.view(*q.shape[:2], PLACES, PLACES).softmax(-1) @ v


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, PLACES, CHANNELS, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("form", ["added", "fused"])
def test_products_with_rows_and_columns_are_a_bias(form: str) -> None:
    (site,) = kreg.analyse(Decomposed(form), inputs()).sites
    assert site.status == "replaced", site.reason
    assert site.mask is not None
    assert site.mask["input"] == ["bias"]
    assert site.dims["head_dim"] == CHANNELS
    assert site.dims["keys"] == PLACES
    assert site.verify is not None
    assert site.verify.passed
    assert site.verify.max_grad_error is not None


def test_a_mask_of_rows_is_one_of_their_places() -> None:
    rows = torch.tensor([[True, False, True, False], [False, True, True, True]])[:, None, :] | torch.eye(4).bool()
    report = kreg.analyse(OfBlocks(), (*inputs(), rows))
    (site,) = report.sites
    assert site.status == "replaced", site.reason
    assert site.mask == {"kind": "input", "input": ["mask"]}
    assert site.verify is not None
    assert site.verify.passed


class ByDistance(nn.Module):
    """A product of queries with the keys, and one with a vector for each pair of places."""

    def __init__(self, keys_first: bool) -> None:
        super().__init__()
        self.keys_first, self.pairs = keys_first, nn.Parameter(torch.randn(PLACES, PLACES, CHANNELS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        products = q @ k.mT, torch.einsum("bhsd,std->bhst", q, self.pairs)
        one, other = products if self.keys_first else products[::-1]
        return ((one + other) * 0.3).softmax(-1) @ v


@pytest.mark.parametrize("keys_first", [True, False])
def test_of_two_products_of_the_queries_that_with_what_the_values_stand_beside_is_with_the_keys(
    keys_first: bool,
) -> None:
    module = program.functional(export_model(ByDistance(keys_first), inputs())).module
    (site,) = find(module.graph).sites
    assert site.operands["k"].node.name == "k"
    assert "bias" in site.operands
