"""Which programs must be rewritten: every one that no twist has touched, but for what is said here.

Without this, a kreg that raises nothing would pass the fuzz.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.fuzz import masks
from tests.fuzz.forms import Attention, Indexed, Program


def _may_leave_no_keys(p: Attention) -> bool:
    """Whether some query has no key, or may have none, by all masks together."""
    if any(mask.kind in masks.FROM_INPUTS for mask in p.masks):
        return True
    keep = torch.ones(1, p.queries, p.length, dtype=torch.bool)
    for mask in p.masks:
        keep = keep & masks.CONDITIONS[mask.kind](mask, {}, p.queries, p.length)
    return not bool(keep.any(-1).all())


def _fills_meet(p: Program) -> bool:
    """Two masks fill in their own ways, and what a query without keys gets is a mixture of both."""
    return isinstance(p, Attention) and len(p.masks) > 1 and not p.joined and not p.sink and _may_leave_no_keys(p)


def _bias_may_outdo_a_fill(p: Program) -> bool:
    """A bias from an input may be -inf at all keys that are kept; the finite fill of the others then wins."""
    return isinstance(p, Attention) and p.bias == "input" and any(mask.value != "-inf" for mask in p.masks)


def _narrows(p: Program) -> bool:
    """A softmax in float32 of float64 scores is less than the op computes."""
    return isinstance(p, Attention) and p.dtype == "float64" and p.softmax == "float32"


def _no_choice(p: Program) -> bool:
    return isinstance(p, Attention) and p.length == 1


def _one_pick(p: Program) -> bool:
    """The best of all is a place without an index of its own, which the indexer's rule does not read."""
    return isinstance(p, Indexed) and p.topk == 1


EXEMPT: dict[str, Callable[[Program], bool]] = {
    "two fills meet": _fills_meet,
    "a bias may outdo a fill": _bias_may_outdo_a_fill,
    "the softmax narrows its scores": _narrows,
    "there is a single key": _no_choice,
    "a single entry is selected": _one_pick,
}


def expected_ops(program: Program) -> frozenset[str]:
    """The ops that must be raised in a program; empty where it may be left as it is."""
    if program.twists or any(applies(program) for applies in EXEMPT.values()):
        return frozenset()
    if isinstance(program, Attention):
        return frozenset({"attention or sparse_attention or selected_attention"})
    whole = program.future != "" and program.sentinel != "" and program.entries > 1
    ops = {"lightning_indexer"} if whole else set()
    return frozenset(
        ops
        | (
            {"sparse_attention"}
            if whole and program.window
            else {"attention or sparse_attention or selected_attention"}
        )
    )


def missing_ops(program: Program, raised: tuple[str, ...]) -> list[str]:
    """What should have been raised and was not."""
    return sorted(op for op in expected_ops(program) if not set(op.split(" or ")) & set(raised))
