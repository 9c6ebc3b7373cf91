"""Positions that start again with each packed sequence: compared within a document, they are places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kreg
from kreg.rewriters import program
from kreg.rewriters.capture import export_model
from kreg.rewriters.find import find
from kreg.rewriters.mask_check import check
from kreg.rewriters.report import SiteReport

QUIET = settings(
    database=None, deadline=None, derandomize=True, max_examples=40, suppress_health_check=list(HealthCheck)
)
WINDOW = 4
LENGTH = 12
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0]])
ILL_FORMED = torch.tensor([[3, 4, 5, 9, 9, 8, 7, 8, 9, 10, 2, 3], [-2, -1, 0, 1, 1, 2, 1, 2, 1, 2, 3, 5]])


# ── transformers ──────────────────────────────────────────────────────────────────────────────────────────────

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "causal": ("Llama", {}, {"kind": "causal+documents"}),
    "sliding": ("Mistral", {"sliding_window": WINDOW}, {"kind": "sliding+documents", "window": WINDOW}),
}


def decoder(kind: str, implementation: str) -> nn.Module:
    """Two layers with random weights."""
    import transformers

    family, options, _ = CONFIGS[kind]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation=implementation,
        **options,
    )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.eval()


def tokens(positions: Tensor, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 64, positions.shape, generator=generator), "position_ids": positions}


def assert_read(site: SiteReport, kind: str) -> None:
    """Replaced, verified, and nothing but documents is an input of the mask."""
    assert site.status == "replaced", site.reason
    assert site.mask == CONFIGS[kind][2] | {"input": ["documents"]}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_model_needs_no_mask_but_documents(kind: str, implementation: str, dynamic: bool) -> None:
    model, sizes = decoder(kind, implementation), {0: Dim("batch"), 1: Dim("length")}
    shapes = {"input_ids": sizes, "position_ids": sizes} if dynamic else None
    program = kreg.export(model, tokens(PACKED), dynamic_shapes=shapes)
    report = kreg.program_report(program)
    assert report is not None and len(report.sites) == 2
    for site in report.sites:
        assert_read(site, kind)
        assert site.verify is not None and site.verify.passed
    others = [PACKED, PACKED.flip(0), ILL_FORMED]
    if dynamic:
        others += [torch.arange(17).remainder(7).expand(3, 17)]
    for positions in others:
        inputs = tokens(positions, seed=1)
        with torch.no_grad():
            got, want = program.module()(**inputs), model(**inputs)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_live_model_that_is_called_with_packed_positions_reads_how_its_mask_was_made(kind: str) -> None:
    model, reference = decoder(kind, "sdpa"), decoder(kind, "sdpa")
    kreg.rewrite(model, example_inputs=tokens(PACKED) | {"use_cache": False})
    sites = kreg.report(model).sites
    assert len(sites) == 2
    for site in sites:
        assert_read(site, kind)
    for seed, positions in enumerate((PACKED, ILL_FORMED, torch.arange(LENGTH).expand(2, LENGTH))):
        inputs = tokens(positions, seed) | {"use_cache": False}
        with torch.no_grad():
            got, want = model(**inputs), reference(**inputs)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert kreg.report(model).calls.rewritten == 3


# ── by hand ───────────────────────────────────────────────────────────────────────────────────────────────────

Mask = Callable[[Tensor], Tensor]
"""Positions [batch, length] -> [batch, length, length]."""


def numbered(begins: Tensor) -> Tensor:
    return begins.cumsum(-1)


def by_diff(p: Tensor) -> Tensor:
    return numbered(torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1)


def by_pad(p: Tensor) -> Tensor:
    return numbered(F.pad(p[:, 1:] != p[:, :-1] + 1, (1, 0)))


def by_cat(p: Tensor) -> Tensor:
    goes_on = p[:, 1:] - p[:, :-1] == 1
    return numbered(torch.cat([torch.ones_like(p[:, :1]), (~goes_on).long()], dim=-1)) - 1


def by_columns(p: Tensor) -> Tensor:
    """The same, [length, batch] on the way."""
    return torch.diff(p.T, prepend=p.T[:1] - 1, dim=0).ne(1).int().cumsum(0).T


def same(d: Tensor) -> Tensor:
    return d[:, :, None] == d[:, None, :]


def causal(p: Tensor) -> Tensor:
    return p[:, None, :] <= p[:, :, None]


def sliding(p: Tensor) -> Tensor:
    return causal(p) & (p[:, None, :] > p[:, :, None] - WINDOW)


def near(p: Tensor) -> Tensor:
    return (p[:, None, :] - p[:, :, None]).abs() < WINDOW


def chunked(p: Tensor) -> Tensor:
    return causal(p) & (p[:, None, :] // WINDOW == p[:, :, None] // WINDOW)


PROVEN: dict[str, tuple[Mask, dict[str, Any]]] = {
    "differences": (lambda p: same(by_diff(p)) & causal(p), {"kind": "causal+documents"}),
    "positions first": (lambda p: causal(p) & same(by_diff(p)), {"kind": "causal+documents"}),
    "padded": (lambda p: same(by_pad(p)) & causal(p), {"kind": "causal+documents"}),
    "concatenated": (lambda p: same(by_cat(p)) & causal(p), {"kind": "causal+documents"}),
    "columns": (lambda p: same(by_columns(p)) & causal(p), {"kind": "causal+documents"}),
    "in 32 bits": (lambda p: same(by_diff(p.int())) & causal(p.int()), {"kind": "causal+documents"}),
    "moved": (lambda p: same(by_diff(p)) & causal(p + 3), {"kind": "causal+documents"}),
    "a window": (lambda p: same(by_diff(p)) & sliding(p), {"kind": "sliding+documents", "window": WINDOW}),
    "a window both ways": (lambda p: same(by_pad(p)) & near(p), {"kind": "local+documents", "window": WINDOW}),
    "strictly before the next": (
        lambda p: same(by_diff(p)) & ~(p[:, None, :] - 1 >= p[:, :, None]),
        {"kind": "causal+documents"},
    ),
    "before and at": (
        lambda p: same(by_diff(p)) & causal(p) & (torch.arange(p.shape[1]) <= torch.arange(p.shape[1])[:, None]),
        {"kind": "causal+documents"},
    ),
}

KEPT: dict[str, Mask] = {
    "no documents": causal,
    "a window without documents": sliding,
    "or documents": lambda p: same(by_diff(p)) | causal(p),
    "steps of 2": lambda p: same(numbered(torch.diff(p, prepend=p[:, :1] - 2, dim=-1) != 2)) & causal(p),
    "steps that are 1": lambda p: same(numbered(torch.diff(p, prepend=p[:, :1] - 1, dim=-1) == 1)) & causal(p),
    "steps of 1 or 2": lambda p: same(numbered(torch.diff(p, prepend=p[:, :1] - 1, dim=-1) > 2)) & causal(p),
    "steps down": lambda p: same(numbered(torch.diff(p, prepend=p[:, :1] - 1, dim=-1) < 0)) & causal(p),
    "zeros": lambda p: same(numbered(p == 0)) & causal(p),
    "signed steps": lambda p: same((torch.diff(p, prepend=p[:, :1] - 1, dim=-1) - 1).cumsum(-1)) & causal(p),
    "weighted steps": lambda p: same((torch.diff(p, prepend=p[:, :1] - 1, dim=-1).ne(1) * p).cumsum(-1)) & causal(p),
    "one shifted": lambda p: same(by_diff(p).roll(1, -1)) & causal(p),
    "backwards": lambda p: same(by_diff(p).flip(-1)) & causal(p),
    "other rows": lambda p: same(by_diff(p.flip(0))) & causal(p),
    "other positions": lambda p: same(by_diff(p)) & causal(p * p),
    "along the batch": lambda p: same(torch.diff(p, prepend=p[:, :1] - 1, dim=-1).ne(1).cumsum(0)) & causal(p),
    "counted twice": lambda p: same(by_diff(p).cumsum(-1)) & causal(p),
    "counted in 8 bits": lambda p: (
        same(torch.diff(p, prepend=p[:, :1] - 1, dim=-1).ne(1).cumsum(-1, dtype=torch.int8)) & causal(p)
    ),
    "positions in 8 bits": lambda p: same(by_diff(p.to(torch.uint8))) & causal(p.to(torch.uint8)),
    "steps in 8 bits": lambda p: same(by_diff(p.to(torch.int8))) & causal(p),
    "chunks": lambda p: same(by_diff(p)) & chunked(p),
}
"""Near enough to be mistaken for it: in these places and positions are not the same."""


class Packed(nn.Module):
    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).masked_fill(~self.mask(positions)[:, None], torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v


def inputs(positions: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (positions.shape[0], 2, positions.shape[1], 8)
    return (*(torch.randn(shape, generator=generator) for _ in range(3)), positions)


@cache
def exported(name: str, dynamic: bool) -> tuple[nn.Module, ExportedProgram]:
    module = Packed(PROVEN[name][0] if name in PROVEN else KEPT[name])
    b, s = Dim("batch", min=2), Dim("length", min=3)
    heads = {0: b, 2: s}
    shapes = (heads, heads, heads, {0: b, 1: s}) if dynamic else None
    return module, kreg.export(module, inputs(PACKED), dynamic_shapes=shapes)


def assert_same(name: str, positions: Tensor, dynamic: bool = False, seed: int = 0) -> None:
    module, program = exported(name, dynamic)
    given = inputs(positions, seed)
    torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROVEN)
def test_positions_beside_their_documents_are_places(name: str, dynamic: bool) -> None:
    report = kreg.program_report(exported(name, dynamic)[1])
    assert report is not None
    (site,) = report.sites
    assert site.status == "replaced", site.reason
    assert site.verify is not None and site.verify.passed
    assert site.mask == PROVEN[name][1] | {"input": ["documents"]}
    for positions in (PACKED, ILL_FORMED):
        assert_same(name, positions, dynamic)
    if dynamic:
        assert_same(name, torch.randint(-2, 3, (3, 7), generator=torch.Generator().manual_seed(2)), dynamic)


@pytest.mark.parametrize("name", KEPT)
def test_other_positions_stay_positions(name: str) -> None:
    report = kreg.analyse(exported(name, False)[0], inputs(PACKED))
    for site in report.sites:
        assert site.mask is None or "input" in site.mask["kind"], site.mask
    for positions in (PACKED, ILL_FORMED):
        assert_same(name, positions)


def rows() -> st.SearchStrategy[list[int]]:
    """Positions: packed, with odd steps among them, or any."""
    steps = st.lists(st.sampled_from([1, 1, 1, 1, 0, 2, -1, -4, 256]), min_size=LENGTH, max_size=LENGTH)
    anything = st.lists(st.integers(-3, 3), min_size=LENGTH, max_size=LENGTH)
    return steps.map(lambda each: torch.tensor(each).cumsum(0).tolist()) | anything


@QUIET
@given(st.lists(rows(), min_size=2, max_size=2), st.sampled_from([*PROVEN, *KEPT]))
def test_whatever_the_positions_are_the_result_is_the_models(positions: list[list[int]], name: str) -> None:
    assert_same(name, torch.tensor(positions))


@pytest.mark.parametrize("name", PROVEN)
def test_the_second_check_fails_where_positions_were_misread(name: str) -> None:
    captured = program.functional(export_model(Packed(PROVEN[name][0]), inputs(PACKED), None)).module
    (site,) = find(captured.graph).sites
    assert check(captured, site).passed, check(captured, site).reason
    window = site.attributes["window"]
    for change in ({"window": window + 1}, {"window": 2}, {"causal": not site.attributes["causal"]}):
        wrong = replace(site, attributes=site.attributes | change)
        assert check(captured, wrong).passed is False, change


STILL_PLACES = {"counted twice", "signed steps", "steps of 2"}
"""Causal all the same, by other proofs than the one there is."""
NOT_SEEN = {"counted in 8 bits", "positions in 8 bits", "steps in 8 bits", "chunks", "no documents", "or documents"}
"""Wrong only for numbers that are not drawn, or of another kind altogether."""


@pytest.mark.parametrize("name", sorted(KEPT.keys() - STILL_PLACES - NOT_SEEN))
def test_the_second_check_fails_where_other_positions_are_taken_for_places(name: str) -> None:
    """Each is what the first check must not take it for: causal, or a window, in documents."""
    captured = program.functional(export_model(Packed(KEPT[name]), inputs(PACKED), None)).module
    (site,) = find(captured.graph).sites
    operands = {operand: value for operand, value in site.operands.items() if operand != "mask"}
    window = WINDOW if name.startswith("a window") else 0
    wrong = replace(site, operands=operands, attributes=site.attributes | {"causal": True, "window": window})
    assert check(captured, wrong).passed is False
