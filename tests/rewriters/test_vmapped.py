"""Masks that were made under vmap are read as those that were not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._functorch import predispatch
from torch.export import Dim
from torch.fx import GraphModule

import kreg
from kreg.rewriters.vmapped import without_vmap

LENGTH, WINDOW = 12, 4


def mapped(condition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A condition on one query and one key, on all of them."""
    by_key = torch.vmap(condition, in_dims=(None, 0))
    return torch.vmap(by_key, in_dims=(0, None))


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        keep = mapped(lambda i, j: (j <= i) & (i - j < WINDOW))(place, place)
        return (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v


class Padded(nn.Module):
    """With the keys that are kept looked at one by one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        by_key = torch.vmap(lambda i, j, kept: (j <= i) & kept, in_dims=(None, 0, 0))
        by_query = torch.vmap(by_key, in_dims=(0, None, None))
        kept = torch.vmap(by_query, in_dims=(None, None, 0))(place, place, keep)
        return (q @ k.mT * 0.3).masked_fill(~kept[:, None], -1e9).softmax(-1) @ v


def heads(length: int = LENGTH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 2, length, 8, generator=generator) for _ in range(3))


def maps(module: GraphModule) -> bool:
    return any(getattr(node.target, "__module__", "") == predispatch.__name__ for node in module.graph.nodes)


def test_a_mask_under_vmap_is_written_out_and_computes_the_same() -> None:
    program = torch.export.export(Attention(), heads(), strict=False)
    before = str(program.graph)
    plain = without_vmap(program.graph_module)
    assert maps(program.graph_module) and not maps(plain)
    assert str(program.graph) == before
    torch.testing.assert_close(plain(*heads())[0], Attention()(*heads()))
    assert all("val" in node.meta for node in plain.graph.nodes if node.op == "call_function")


def test_a_graph_without_vmap_is_not_copied() -> None:
    program = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),), strict=False)
    assert without_vmap(program.graph_module) is program.graph_module


@pytest.mark.parametrize(
    "function",
    [lambda x: x.sum() * x, lambda x: x + torch.rand_like(x), lambda x: x.clone().add_(1)],
    ids=["floats", "random numbers", "writes"],
)
def test_what_is_more_than_a_mask_stays_under_vmap(function: Callable[[Tensor], Tensor]) -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(function, randomness="different")(x)

    program = torch.export.export(Mapped(), (torch.randn(4, 3),), strict=False)
    assert without_vmap(program.graph_module) is program.graph_module and maps(program.graph_module)


def test_a_mask_of_symbolic_sizes_stays_under_vmap() -> None:
    sizes = {2: Dim("length", min=3, max=64)}
    program = torch.export.export(Attention(), heads(), dynamic_shapes=(sizes, sizes, sizes), strict=False)
    assert without_vmap(program.graph_module) is program.graph_module


def test_a_window_that_was_made_under_vmap_is_a_window() -> None:
    program = kreg.export(Attention(), heads())
    report = kreg.program_report(program)
    assert report is not None
    (site,) = report.sites
    assert site.status == "replaced" and site.mask == {"kind": "sliding", "window": WINDOW}
    torch.testing.assert_close(program.module()(*heads()), Attention()(*heads()), rtol=1e-4, atol=1e-5)


def test_padding_that_is_looked_up_under_vmap_is_what_it_was() -> None:
    keep = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])
    program = kreg.export(Padded(), (*heads(), keep))
    report = kreg.program_report(program)
    assert report is not None
    (site,) = report.sites
    assert site.status == "replaced" and site.mask == {"kind": "causal+padding", "input": ["padding"]}
    torch.testing.assert_close(program.module()(*heads(), keep), Padded()(*heads(), keep), rtol=1e-4, atol=1e-5)


class Indexed(nn.Module):
    """With an index by position, as the mask functions of FlexAttention write it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        documents, place = starts.cumsum(-1), torch.arange(q.shape[2])

        def kept(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (documents[b, i] == documents[b, j])

        by_key = torch.vmap(kept, in_dims=(None, None, 0))
        by_query = torch.vmap(by_key, in_dims=(None, 0, None))
        with TransformGetItemToIndex():
            keep = torch.vmap(by_query, in_dims=(0, None, None))(torch.arange(q.shape[0]), place, place)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])


def test_an_index_by_position_under_vmap_is_read_as_an_index() -> None:
    inputs = *heads(), (torch.arange(2 * LENGTH).reshape(2, LENGTH) % 5 == 0).long()
    program = kreg.export(Indexed(), inputs)
    report = kreg.program_report(program)
    assert report is not None and [(s.status, s.mask) for s in report.sites] == [
        ("replaced", {"kind": "causal+documents", "input": ["documents"]})
    ]
    torch.testing.assert_close(program.module()(*inputs), Indexed()(*inputs))
