"""What is said about a model of this folder: how to build and call it, and what is true about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim

VOCAB = 37


class Sizes(NamedTuple):
    """What the inputs of a model are drawn for; ``memory`` is the length of a second sequence."""

    batch: int = 2
    length: int = 12
    memory: int = 7


KINDS: dict[str, frozenset[str]] = {
    "full": frozenset({"full"}),
    "causal": frozenset({"causal"}),
    "sliding": frozenset({"sliding"}),
    "chunked": frozenset({"causal+chunked"}),
    "prefix": frozenset({"causal+prefix", "input"}),
    "block-causal": frozenset({"block-causal", "input"}),
    # What depends on data is read from an input; what is proven beside it is not in that input any more.
    "input": frozenset({"input"}),
    "padding": frozenset({"padding"}),
    "padding+input": frozenset({"padding+input"}),
    "documents": frozenset({"documents"}),
    "causal+padding": frozenset({"causal+padding"}),
    "causal+documents": frozenset({"causal+documents"}),
    "sliding+documents": frozenset({"sliding+documents"}),
    "causal+input": frozenset({"causal+input"}),
    "selected": frozenset({"selected", "top-k", "input"}),
    "causal+selected": frozenset({"causal+selected", "causal+top-k", "causal+input"}),
    # A bias that masks nothing is an input, but no mask.
    "bias": frozenset({"full", "input"}),
    "causal bias": frozenset({"causal", "input"}),
    "causal+bias": frozenset({"causal", "causal+input"}),
    # Large finite numbers weigh all keys of a row alike when it is masked whole: the proven part may not narrow it.
    "soft padding": frozenset({"padding", "input"}),
    "soft causal+padding": frozenset({"causal+padding", "input"}),
    "soft causal+documents": frozenset({"causal+documents", "input"}),
    "soft sliding+documents": frozenset({"sliding+documents", "input"}),
    "soft causal+selected": frozenset({"causal+selected", "causal+top-k", "causal+input", "input"}),
    # A tensor stored with the model is passed on, or proven by its values.
    "stored": frozenset({"input"}),
    "stored causal": frozenset({"causal", "input", "causal+input"}),
    "stored sliding": frozenset({"sliding", "input", "causal+input", "sliding+input"}),
    # No argument of any kernel: a name of its own, or a tensor.
    "window": frozenset({"local", "sliding", "input"}),
    "blocks": frozenset({"chunked", "input"}),
    "dilated": frozenset({"causal+dilated", "causal+input", "input"}),
    "sliding in blocks": frozenset({"sliding+padding", "sliding+input", "input"}),
    "sliding chunked": frozenset({"sliding+chunked", "sliding+input"}),
    "sliding prefix": frozenset({"sliding+prefix", "causal+input", "input"}),
}
"""The truth about a mask, and what the report may call it."""

Maker = Callable[[Sizes, torch.Generator], torch.Tensor]
"""Draws one input of a model."""

CAPTURED, RESIZED = Sizes(), Sizes(3, 17, 9)


@dataclass(frozen=True)
class Case:
    """One model, and the truth about it.

    Attributes:
        name: in test ids.
        build: makes the module; its parameters are drawn anew afterwards.
        inputs: makers of the positional inputs.
        sites: how many attentions it holds; 0 where nothing may be replaced.
        mask: the truth about each site's mask, one word for all or one a site; see `KINDS`.
        facts: what the report must say besides the kind.
        dims: dimensions of each site that the report must give.
        attributes: arguments of each attention.
        reason: where there are no sites, a fragment of the reason that must be given; None where none is needed.
        either: it may also be left alone, with a reason.
        training: captured in training mode.
        sizes, resized: captured with the first; run with the second if captured with dynamic shapes. Where a size
            is pinned by the model, both have the same; None if the model has no size of its inputs to change.
        bfloat16: also captured in bfloat16.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Maker, ...]
    sites: int = 1
    mask: str | tuple[str, ...] = "full"
    facts: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    either: bool = False
    training: bool = False
    sizes: Sizes = CAPTURED
    resized: Sizes | None = RESIZED
    bfloat16: bool = False

    @property
    def masks(self) -> tuple[str, ...]:
        """The truth about each site's mask."""
        return (self.mask,) * self.sites if isinstance(self.mask, str) else self.mask

    def draw(self, sizes: Sizes, seed: int) -> tuple[torch.Tensor, ...]:
        """Inputs of given sizes."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(make(sizes, generator) for make in self.inputs)


def dynamic_shapes(
    model: nn.Module, inputs: Sequence[torch.Tensor], resized: Sequence[torch.Tensor]
) -> tuple[Any, ...]:
    """Every dimension in which inputs of two sizes differ, as ``torch.export`` takes it: ``*args`` are one argument."""
    shapes = [
        {d: Dim.AUTO for d in range(a.dim()) if a.shape[d] != b.shape[d]} for a, b in zip(inputs, resized, strict=True)
    ]
    parameters = inspect.signature(model.forward).parameters.values()
    named = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), len(shapes))
    return (*shapes[:named], tuple(shapes[named:])) if len(shapes) > named else tuple(shapes)


def fixed(length: int = 12, memory: int = 7) -> dict[str, Sizes]:
    """Sizes of a model that takes any batch, but one length only."""
    return {"sizes": Sizes(2, length, memory), "resized": Sizes(3, length, memory)}


# ── makers ──────────────────────────────────────────────────────────────────────────────────────────────


def hidden(width: int) -> Maker:
    """[batch, length, width]."""
    return lambda s, g: torch.randn(s.batch, s.length, width, generator=g)


def memory(width: int) -> Maker:
    """[batch, memory, width]."""
    return lambda s, g: torch.randn(s.batch, s.memory, width, generator=g)


def length_first(width: int) -> Maker:
    """[length, batch, width], as recurrent networks had it."""
    return lambda s, g: torch.randn(s.length, s.batch, width, generator=g)


def memory_first(width: int) -> Maker:
    """[memory, batch, width]."""
    return lambda s, g: torch.randn(s.memory, s.batch, width, generator=g)


def unbatched(width: int) -> Maker:
    """[length, width]."""
    return lambda s, g: torch.randn(s.length, width, generator=g)


def heads(count: int, width: int, of: str = "length") -> Maker:
    """[batch, heads, length | memory, width]."""
    return lambda s, g: torch.randn(s.batch, count, getattr(s, of), width, generator=g)


def tokens(of: str = "length") -> Maker:
    """[batch, length | memory] of token ids, none of them 0."""
    return lambda s, g: torch.randint(1, VOCAB, (s.batch, getattr(s, of)), generator=g)


def image(channels: int, height: int = 4, width: int = 6) -> Maker:
    """[batch, channels, height, width]."""
    return lambda s, g: torch.randn(s.batch, channels, height, width, generator=g)


def lengths(of: str = "length") -> Maker:
    """[batch]: how much of each row is real, at least one."""
    return lambda s, g: torch.randint(1, getattr(s, of) + 1, (s.batch,), generator=g)


def kept(of: str = "length") -> Maker:
    """[batch, length | memory], True where real: padded on the right, so that no causal query is left empty."""

    def make(s: Sizes, g: torch.Generator) -> torch.Tensor:
        return torch.arange(getattr(s, of)) < lengths(of)(s, g)[:, None]

    return make


def kept_or_none(of: str = "length") -> Maker:
    """`kept`, with a first row of nothing but padding: a large finite mask then weighs all keys alike."""

    def make(s: Sizes, g: torch.Generator) -> torch.Tensor:
        keep = kept(of)(s, g)
        keep[0] = False
        return keep

    return make


def padding(of: str = "length") -> Maker:
    """[batch, length | memory], True where there is padding."""
    return lambda s, g: ~kept(of)(s, g)


def ones_and_zeros(of: str = "length") -> Maker:
    """`kept` as a tokeniser gives it."""
    return lambda s, g: kept(of)(s, g).long()


def documents() -> Maker:
    """[batch, length]: the document of each token, never going down."""
    return lambda s, g: torch.randint(0, 2, (s.batch, s.length), generator=g).cumsum(-1)


def scores(rows: str = "length", columns: str = "length") -> Maker:
    """[rows, columns] of numbers to add to scores."""
    return lambda s, g: torch.randn(getattr(s, rows), getattr(s, columns), generator=g)


def conditions(rows: str = "length", columns: str = "length") -> Maker:
    """[rows, columns] of booleans, with at least one True a row."""

    def make(s: Sizes, g: torch.Generator) -> torch.Tensor:
        keep = torch.rand(getattr(s, rows), getattr(s, columns), generator=g) < 0.6
        keep[:, 0] = True
        return keep

    return make


def dropped(rows: str = "length", columns: str = "length") -> Maker:
    """The opposite of `conditions`: True where a key is not seen."""
    return lambda s, g: ~conditions(rows, columns)(s, g)
