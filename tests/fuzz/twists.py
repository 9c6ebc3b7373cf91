"""What bends or breaks a program: a table of changes, each at a stage of the computation.

Most are named "stage: change" and made from the tables of changes below; the judge knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz.forms import Attention, Indexed, Program
from tests.fuzz.layouts import scores_of, values_of
from tests.fuzz.scene import Scene

Change = Callable[[Scene, Tensor], Tensor]
Needs = Callable[[Program], bool]


@dataclass(frozen=True)
class Twist:
    """A change at a stage, and the programs it can be applied to."""

    stage: str
    change: Change
    needs: Needs = lambda program: True


SDPA_DROPOUT = "sdpa dropped out"
"""Read by name where the function is called: it changes an argument and no tensor."""


def bend(scene: Scene, stage: str, value: Tensor) -> Tensor:
    """The value after the program's twists of a stage, in order."""
    for name in scene.program.twists:
        if TWISTS[name].stage == stage:
            value = TWISTS[name].change(scene, value)
    return value


# ── what the tables need ──────────────────────────────────────────────────────────────────────────────────


def _eager(p: Program) -> bool:
    return isinstance(p, Attention) and p.product != "sdpa"


def _square(p: Program) -> bool:
    return _eager(p) and isinstance(p, Attention) and p.length == p.queries


def _with_heads(p: Program) -> bool:
    return isinstance(p, Attention) and p.layout in ("bhsd", "bshd", "bgrsd") and p.heads > 1


def _with_head_scores(p: Program) -> bool:
    return _with_heads(p) and _eager(p) and p.layout != "bgrsd"  # type: ignore[union-attr]


def _masked(p: Program) -> bool:
    return isinstance(p, Attention) and bool(p.masks) and all(mask.made != "is_causal" for mask in p.masks)


def _masked_eager(p: Program) -> bool:
    return _masked(p) and _eager(p)


def _batched(p: Program) -> bool:
    return p.batch > 1 and (not isinstance(p, Attention) or p.layout != "sd")


def _indexed(p: Program) -> bool:
    return isinstance(p, Indexed)


# ── changes ───────────────────────────────────────────────────────────────────────────────────────────────


def _leaked(scene: Scene, x: Tensor) -> Tensor:
    scene.extra.append(x)
    return x


def _leaked_view(scene: Scene, x: Tensor) -> Tensor:
    scene.extra.append(x.transpose(-1, -2) if x.dim() > 1 else x.view(-1))
    return x


def _summed_too(scene: Scene, x: Tensor) -> Tensor:
    scene.extra.append((x * x).sum(-1))
    return x


def _leaked_then_mutated(scene: Scene, x: Tensor) -> Tensor:
    mine = x.clone()
    scene.extra.append(mine)
    mine.mul_(1.5)
    return mine


def _mutated(scene: Scene, x: Tensor) -> Tensor:
    x.mul_(0.75)
    return x


def _copied_then_mutated(scene: Scene, x: Tensor) -> Tensor:
    mine = x.clone()
    mine.add_(0.25)
    return x + 0 * mine


def _mutated_by_a_view(scene: Scene, x: Tensor) -> Tensor:
    mine = x.clone()
    mine.select(-1, 0).mul_(2.0)
    return mine


def _rows_mutated_by_a_view(scene: Scene, x: Tensor) -> Tensor:
    mine = x.clone()
    mine.narrow(-2, 0, 1).add_(1.0)
    return mine


def _under_no_grad(scene: Scene, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1.25


def _sometimes_without_gradient(scene: Scene, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x.detach())


EVERYWHERE: dict[str, Change] = {
    "leaked": _leaked,
    "leaked view": _leaked_view,
    "summed too": _summed_too,
    "leaked then mutated": _leaked_then_mutated,
    "mutated": _mutated,
    "copied then mutated": _copied_then_mutated,
    "mutated by a view": _mutated_by_a_view,
    "rows mutated by a view": _rows_mutated_by_a_view,
    "detached": lambda scene, x: x.detach(),
    "under no_grad": _under_no_grad,
    "half detached": lambda scene, x: x.detach() * 0.5 + x * 0.5,
    "sometimes detached": _sometimes_without_gradient,
    "rounded to bfloat16": lambda scene, x: x.to(torch.bfloat16).to(x.dtype),
    "rounded to float16": lambda scene, x: x.to(torch.float16).to(x.dtype),
    "rounded to integers": lambda scene, x: (x * 4).to(torch.int32).to(x.dtype) / 4,
    "in float64": lambda scene, x: (x.double() * 1.5).to(x.dtype),
    "negated": lambda scene, x: -x,
    "nothing": lambda scene, x: x * 0.0,
    "doubled": lambda scene, x: x * 2,
    "raised by one": lambda scene, x: x + 1.0,
    "flipped channels": lambda scene, x: x.flip(-1),
    "rolled channels": lambda scene, x: x.roll(1, -1),
    "rectified": lambda scene, x: x.relu(),
    "squared": lambda scene, x: x * x,
    "scaled by data": lambda scene, x: x * x.abs().mean(),
    "scaled by its row": lambda scene, x: x * x.abs().amax(-1, keepdim=True),
    "normalised": lambda scene, x: F.normalize(x, dim=-1),
    "scaled by an item": lambda scene, x: x * x.flatten()[0],
    "clamped": lambda scene, x: x.clamp(-1.0, 1.0),
    "summed up": lambda scene, x: x.cumsum(-1),
    "without nan": lambda scene, x: torch.nan_to_num(x),
    "dropped out": lambda scene, x: F.dropout(x, 0.4, training=True),
    "by strides": lambda scene, x: x.contiguous().as_strided(x.shape, x.contiguous().stride()),
    "contiguous": lambda scene, x: x.contiguous(),
}
"""Changes to any tensor of numbers."""


def _rolled_rows(scene: Scene, x: Tensor) -> Tensor:
    return x.roll(1, scene.rows)


def _flipped_rows(scene: Scene, x: Tensor) -> Tensor:
    return x.flip(scene.rows)


def _shifted_rows(scene: Scene, x: Tensor) -> Tensor:
    rows = scene.rows
    return torch.cat([torch.zeros_like(x.narrow(rows, 0, 1)), x.narrow(rows, 0, x.shape[rows] - 1)], dim=rows)


def _viewed_untransposed(scene: Scene, x: Tensor) -> Tensor:
    """Rows and channels read in the wrong order: right only in size."""
    return x.transpose(scene.rows, -1).reshape(x.shape)


def _heads_and_rows_mixed(scene: Scene, x: Tensor) -> Tensor:
    assert scene.heads is not None
    return x.transpose(scene.heads, scene.rows).reshape(x.shape)


def _heads_flipped(scene: Scene, x: Tensor) -> Tensor:
    assert scene.heads is not None
    return x.flip(scene.heads)


def _heads_averaged(scene: Scene, x: Tensor) -> Tensor:
    assert scene.heads is not None
    return x.mean(scene.heads, keepdim=True).expand_as(x)


def _by_head(scene: Scene, x: Tensor) -> Tensor:
    assert scene.heads is not None
    return x * torch.arange(1, x.shape[scene.heads] + 1).view(-1, *[1] * (x.dim() - scene.heads - 1)).to(x.dtype)


OPERANDS: dict[str, tuple[Change, Needs]] = {
    "rolled rows": (_rolled_rows, lambda p: True),
    "flipped rows": (_flipped_rows, lambda p: True),
    "shifted rows": (_shifted_rows, lambda p: True),
    "viewed untransposed": (_viewed_untransposed, lambda p: True),
    "heads and rows mixed": (_heads_and_rows_mixed, _with_heads),
    "heads flipped": (_heads_flipped, _with_heads),
    "heads averaged": (_heads_averaged, _with_heads),
    "scaled by head": (_by_head, _with_heads),
    "batch flipped": (lambda scene, x: x.flip(0), _batched),
    "batch rolled": (lambda scene, x: x.roll(1, 0), _batched),
    "batch shared": (lambda scene, x: x[:1].expand_as(x), _batched),
    "scaled by the queries": (lambda scene, x: x * scene.held["q"].abs().mean(), lambda p: True),
}
"""Changes to queries, keys or values, which have heads and rows."""


def _mixed_heads(scene: Scene, x: Tensor) -> Tensor:
    return torch.einsum("bhst,hg->bgst", x, scene.module.mixing.to(x.dtype))  # type: ignore[operator]


def _first_key_only(scene: Scene, x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[-1]) == 0, x, x * 0.5)


def _one_column_set(scene: Scene, x: Tensor) -> Tensor:
    mine = x.clone()
    mine[..., 0] = 0.5
    return mine


def _one_row_set(scene: Scene, x: Tensor) -> Tensor:
    mine = x.clone()
    mine[..., 0, :] = 0.5
    return mine


def _topped(scene: Scene, x: Tensor) -> Tensor:
    """Only the largest of each row."""
    best = x.topk(min(2, x.shape[-1]), dim=-1).values[..., -1:]
    return x.masked_fill(x < best, float("-inf"))


SCORES: dict[str, tuple[Change, Needs]] = {
    "transposed": (lambda scene, x: x.mT, _square),
    "viewed transposed": (lambda scene, x: x.mT.reshape(x.shape), _eager),
    "symmetric": (lambda scene, x: x + x.mT, _square),
    "rolled keys": (lambda scene, x: x.roll(1, -1), _eager),
    "rolled queries": (lambda scene, x: x.roll(1, -2), _eager),
    "flipped keys": (lambda scene, x: x.flip(-1), _eager),
    "flipped queries": (lambda scene, x: x.flip(-2), _eager),
    "batch flipped": (lambda scene, x: x.flip(0), _eager),
    "batch centred": (lambda scene, x: x - x.mean(0, keepdim=True), _eager),
    "centred by row": (lambda scene, x: x - x.mean(-1, keepdim=True), _eager),
    "centred by key": (lambda scene, x: x - x.mean(-2, keepdim=True), _eager),
    "steadied": (lambda scene, x: x - x.amax(-1, keepdim=True), _eager),
    "steadied by a detached row": (lambda scene, x: x - x.amax(-1, keepdim=True).detach(), _eager),
    "steadied by key": (lambda scene, x: x - x.amax(-2, keepdim=True), _eager),
    "heads mixed": (_mixed_heads, _with_head_scores),
    "heads flipped": (lambda scene, x: x.flip(1), _with_head_scores),
    "heads centred": (lambda scene, x: x - x.mean(1, keepdim=True), _with_head_scores),
    "keys weighed": (_first_key_only, _eager),
    "first column set": (_one_column_set, _eager),
    "first row set": (_one_row_set, _eager),
    "topped": (_topped, _eager),
    "sunk": (lambda scene, x: x - 1e4, _eager),
    "divided by the keys": (lambda scene, x: x / x.shape[-1], _eager),
}
"""Changes to what ends in queries and keys: scores, logits, weights."""


def _masked_afterwards(scene: Scene, x: Tensor) -> Tensor:
    return x * scene.held["keep"]


def _filled_afterwards(scene: Scene, x: Tensor) -> Tensor:
    return x.masked_fill(~scene.held["keep"], 0.0)


def _renormalised(scene: Scene, x: Tensor) -> Tensor:
    return x / (x.sum(-1, keepdim=True) + 1e-6)


def _second_product(scene: Scene, x: Tensor) -> Tensor:
    scene.extra.append(x @ torch.ones(x.shape[-1], 2, dtype=x.dtype))
    return x


def _gated(scene: Scene, x: Tensor) -> Tensor:
    return x * torch.sigmoid(scene.held["scores"])


WEIGHTS: dict[str, tuple[Change, Needs]] = {
    "masked afterwards": (_masked_afterwards, _masked_eager),
    "filled afterwards": (_filled_afterwards, _masked_eager),
    "renormalised": (_renormalised, _eager),
    "second product": (_second_product, _eager),
    "gated": (_gated, _eager),
    "from one": (lambda scene, x: 1 - x, _eager),
    "softmax again": (lambda scene, x: x.softmax(-1), _eager),
}


def _softmax_over(dim: int) -> Change:
    return lambda scene, x: x.softmax(dim)


def _one_more(scene: Scene, x: Tensor) -> Tensor:
    """A sink of logit 0, as a one in the denominator."""
    return x.exp() / (1 + x.exp().sum(-1, keepdim=True))


def _softmax_without_grad(scene: Scene, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.softmax(-1)


SOFTMAX: dict[str, Change] = {
    "over the queries": _softmax_over(-2),
    "over the first dimension": _softmax_over(0),
    "over all": lambda scene, x: x.flatten(-2).softmax(-1).view(x.shape),
    "sigmoid": lambda scene, x: x.sigmoid(),
    "one more": _one_more,
    "without gradient": _softmax_without_grad,
    "unsteadied": lambda scene, x: x.exp() / x.exp().sum(-1, keepdim=True),
    "sum of queries": lambda scene, x: x.exp() / x.exp().sum(-2, keepdim=True),
    "sum of absolutes": lambda scene, x: x / x.abs().sum(-1, keepdim=True),
    "in bfloat16": lambda scene, x: x.bfloat16().softmax(-1).to(x.dtype),
    "to bfloat16": lambda scene, x: torch.softmax(x, -1, dtype=torch.bfloat16).to(x.dtype),
    "of a softmax": lambda scene, x: x.softmax(-1).softmax(-1),
    "of its logarithm": lambda scene, x: x.log_softmax(-1).softmax(-1),
    "minus another": lambda scene, x: x.softmax(-1) - 0.5 * (-x).softmax(-1),
}


def _with_the_diagonal(scene: Scene, keep: Tensor) -> Tensor:
    return keep | torch.eye(keep.shape[-2], keep.shape[-1], dtype=torch.bool)


def _moved_by_data(scene: Scene, keep: Tensor) -> Tensor:
    queries, keys = keep.shape[-2], keep.shape[-1]
    shift = (scene.held["q"].sum() > 0).long()
    return keep & (torch.arange(keys) <= torch.arange(queries)[:, None] + shift + 1)


def _mutated_after_use(scene: Scene, keep: Tensor) -> Tensor:
    """The mask that the model used is another one by the time it is returned."""
    mine = keep.clone()
    scene.extra.append(mine)
    used = mine & True
    mine.fill_(True)
    return used


def _first_column_opened(scene: Scene, keep: Tensor) -> Tensor:
    mine = keep.clone()
    mine[..., 0] = True
    return mine


def _first_row_closed(scene: Scene, keep: Tensor) -> Tensor:
    mine = keep.clone()
    mine[..., 0, :] = False
    return mine


def _last_row_closed(scene: Scene, keep: Tensor) -> Tensor:
    mine = keep.clone()
    mine[..., -1, :].fill_(False)
    return mine


def _by_other_scores(scene: Scene, keep: Tensor) -> Tensor:
    """A selection from scores that are not the attention's own: the sums of the keys."""
    sums = scene.held["k"].sum(-1).flatten()[: keep.shape[-1]]
    if sums.shape[0] < keep.shape[-1]:
        return keep
    best = sums.topk(min(2, keep.shape[-1])).indices
    return keep & torch.zeros(keep.shape[-1], dtype=torch.bool).index_fill(0, best, True)


def _changed_between(scene: Scene, keep: Tensor) -> Tensor:
    """One mask for two attentions, opened in place after the first has used it."""
    mine = keep.clone()
    first = torch.where(mine, 1.0, float("-inf")).softmax(-1)
    scene.extra.append(first)
    mine[..., 0] = True
    return mine


KEEP: dict[str, Change] = {
    "inverted": lambda scene, keep: ~keep,
    "inverted in place": lambda scene, keep: keep.clone().logical_not_(),
    "moved by a key": lambda scene, keep: keep.roll(1, -1),
    "moved by a query": lambda scene, keep: keep.roll(1, -2),
    "flipped": lambda scene, keep: keep.flip(-1),
    "with the diagonal": _with_the_diagonal,
    "without the diagonal": lambda scene, keep: keep ^ torch.eye(*keep.shape[-2:], dtype=torch.bool),
    "moved by data": _moved_by_data,
    "by other scores": _by_other_scores,
    "leaked": _leaked,
    "used twice and changed between": _changed_between,
    "mutated after use": _mutated_after_use,
    "first column opened": _first_column_opened,
    "first row closed": _first_row_closed,
    "last row closed": _last_row_closed,
    "all": lambda scene, keep: keep | True,
    "none": lambda scene, keep: keep & False,
    "even keys": lambda scene, keep: keep & (torch.arange(keep.shape[-1]) % 2 == 0),
    "every other query": lambda scene, keep: keep | (torch.arange(keep.shape[-2]) % 2 == 0)[:, None],
    "squared": lambda scene, keep: (keep.long() * keep.long()).bool(),
    "as numbers": lambda scene, keep: keep.to(torch.float32) > 0.5,
    "doubly negated": lambda scene, keep: ~(~keep),
}


def _attended_again(scene: Scene, out: Tensor) -> Tensor:
    """A second attention, whose queries are the first one's result."""
    assert scene.layout is not None
    scores = scores_of(scene.layout, out, scene.held["k"], "matmul")
    return values_of(scene.layout, scores.softmax(-1), scene.held["v"], "matmul")


def _attended_by_themselves(scene: Scene, scores: Tensor) -> Tensor:
    """Two softmaxes of the same scores, one before the masks."""
    assert scene.layout is not None
    scene.extra.append(values_of(scene.layout, scores.softmax(-1), scene.held["v"], "matmul"))
    return scores


def _alias(scene: Scene, out: Tensor) -> Tensor:
    scene.extra.append(out.transpose(-1, -2))
    return out


def _inputs_returned(scene: Scene, out: Tensor) -> Tensor:
    scene.extra.extend(t for t in scene.inputs.values() if t.is_floating_point())
    return out


def _view_of_an_input(scene: Scene, out: Tensor) -> Tensor:
    scene.extra.append(next(iter(scene.inputs.values())).transpose(0, -1))
    return out


def _alias_mutated(scene: Scene, out: Tensor) -> Tensor:
    mine = out.clone()
    scene.extra.append(mine.transpose(0, -1))
    mine.add_(1.0)
    return mine


def _input_mutated_after(scene: Scene, out: Tensor) -> Tensor:
    """Too late to matter to the result, but the caller sees it."""
    next(t for t in reversed(scene.inputs.values()) if t.is_floating_point()).mul_(2.0)
    return out


RESULT: dict[str, Change] = {
    "alias returned": _alias,
    "returned twice": lambda scene, out: scene.extra.append(out) or out,  # type: ignore[func-returns-value]
    "inputs returned": _inputs_returned,
    "view of an input returned": _view_of_an_input,
    "alias mutated": _alias_mutated,
    "added to in place": lambda scene, out: out.add_(1.0),
    "input mutated after": _input_mutated_after,
    "residual": lambda scene, out: out + next(t for t in scene.inputs.values() if t.is_floating_point()).sum(),
    "merged untransposed": lambda scene, out: out.transpose(0, -1).reshape(out.shape),
}


def _unspread(scene: Scene, x: Tensor) -> Tensor:
    """Heads in the other order of a grouping: ``h % groups`` instead of ``h // ratio``."""
    p = scene.program
    assert isinstance(p, Attention)
    heads = 1 if p.layout != "bshd" else 2
    return x.unflatten(heads, (p.groups, p.ratio)).transpose(heads, heads + 1).flatten(heads, heads + 1)


def _regrouped(p: Program) -> bool:
    return (
        isinstance(p, Attention)
        and p.groups > 1
        and p.ratio > 1
        and p.layout in ("bhsd", "bshd", "bmm")
        and p.spread != "broadcast"
    )


def _can_be_shifted(p: Program) -> bool:
    return isinstance(p, Attention) and p.length > 2


def _dims_agree(p: Program) -> bool:
    return isinstance(p, Attention) and p.dim == p.value_dim


def _by_sdpa(p: Program) -> bool:
    return isinstance(p, Attention) and p.product == "sdpa"


# ── indexers ──────────────────────────────────────────────────────────────────────────────────────────────


def _duplicated(scene: Scene, picks: Tensor) -> Tensor:
    return torch.cat([picks[..., :1], picks[..., :-1]], dim=-1)


def _other_indices(scene: Scene, picks: Tensor) -> Tensor:
    return scene.inputs["indices"][..., : picks.shape[-1]]


def _sorted_picks(scene: Scene, picks: Tensor) -> Tensor:
    return picks.sort(dim=-1).values


INDEXER: dict[str, tuple[str, Change]] = {
    "smallest instead": ("selection scores", lambda scene, x: -x),
    "no rectifying": ("rectified", lambda scene, x: scene.held["products"]),
    "rectified after a change of sign": ("rectified", lambda scene, x: (-scene.held["products"]).relu()),
    "rectified by absolutes": ("rectified", lambda scene, x: scene.held["products"].abs()),
    "rectified softly": ("rectified", lambda scene, x: F.gelu(scene.held["products"])),
    "rectified after the scale by data": ("products", lambda scene, x: x * x.abs().mean()),
    "products rounded": ("products", lambda scene, x: x.to(torch.bfloat16).to(x.dtype)),
    "products shifted": ("products", lambda scene, x: x + 0.5),
    "weights by softmax": ("head weights", lambda scene, x: x.softmax(-1)),
    "weights rolled": ("head weights", lambda scene, x: x.roll(1, -1)),
    "weights per entry": ("rectified", lambda scene, x: x * torch.arange(1, x.shape[-1] + 1)),
    "ready one too early": ("ready", lambda scene, x: x.roll(-1, -2) | x),
    "ready one too late": ("ready", lambda scene, x: x.roll(1, -2) & x),
    "ready by key": ("ready", lambda scene, x: x.roll(1, -1)),
    "all ready": ("ready", lambda scene, x: x | True),
    "selection scores leaked": ("selection scores", _leaked),
    "selection scores biased": ("selection scores", lambda scene, x: x + torch.arange(x.shape[-1]).to(x.dtype) * 0.1),
    "selection scores scaled": ("selection scores", lambda scene, x: x * x.abs().mean()),
    "selection scores flipped": ("selection scores", lambda scene, x: x.flip(-1)),
    "selection scores of another batch": ("selection scores", lambda scene, x: x.flip(0)),
    "selection scores rolled": ("selection scores", lambda scene, x: x.roll(1, 1)),
    "picks leaked": ("picks", _leaked),
    "picks duplicated": ("picks", _duplicated),
    "picks from another tensor": ("picks", _other_indices),
    "picks sorted": ("picks", _sorted_picks),
    "picks moved": ("picks", lambda scene, x: (x + 1) % scene.held["entries"].shape[1]),
    "picks flipped": ("picks", lambda scene, x: x.flip(1)),
    "picks of another batch": ("picks", lambda scene, x: x.flip(0)),
    "picks cut": ("picks", lambda scene, x: x[..., :-1] if x.shape[-1] > 1 else x),
    "slots leaked": ("slots", _leaked),
    "slots moved": ("slots", lambda scene, x: (x - 1).clamp(min=0)),
    "selection inverted": ("seen", lambda scene, x: ~x if x.dtype == torch.bool else x.roll(1, -1)),
    "selection rolled": ("seen", lambda scene, x: x.roll(1, -1)),
    "selection of another query": ("seen", lambda scene, x: x.roll(1, -2)),
    "selection used twice": ("seen", _leaked),
    "window and ready": ("seen", lambda scene, x: x & scene.held["ready"] if x.dtype == torch.bool else x),
    "entries are not values": ("values", lambda scene, x: x.flip(1)),
    "values moved": ("values", lambda scene, x: x.roll(1, 1)),
    "values of another batch": ("values", lambda scene, x: x.flip(0)),
    "entries detached": ("entries", lambda scene, x: x.detach()),
    "window one wider": ("near", lambda scene, x: x | x.roll(1, -2)),
    "window closed": ("near", lambda scene, x: x & False),
    "masked scores doubled": ("logits", lambda scene, x: x * 2),
    "weights over": ("weights", lambda scene, x: x.relu() + 0.1),
    "weights leaked": ("weights", _leaked),
    "weights detached": ("weights", lambda scene, x: x.detach()),
    "weights dropped out": ("weights", lambda scene, x: F.dropout(x, 0.4, training=True)),
}


def _table() -> dict[str, Twist]:
    table: dict[str, Twist] = {}
    operands, scores = ("q", "k", "v"), ("scores", "logits", "weights")
    for stage in (*operands, *scores, "out"):
        needs = _eager if stage in scores else lambda p: isinstance(p, Attention)
        table |= {f"{stage}: {name}": Twist(stage, change, needs) for name, change in EVERYWHERE.items()}
    for stage in operands:
        table |= {f"{stage}: {name}": Twist(stage, *entry) for name, entry in OPERANDS.items()}
    for stage in scores:
        table |= {f"{stage}: {name}": Twist(stage, *entry) for name, entry in SCORES.items()}
    table |= {f"weights: {name}": Twist("weights", *entry) for name, entry in WEIGHTS.items()}
    table |= {f"softmax: {name}": Twist("softmax", change, _eager) for name, change in SOFTMAX.items()}
    table |= {f"mask: {name}": Twist("keep", change, _masked) for name, change in KEEP.items()}
    table |= {
        f"result: {name}": Twist("result", change, lambda p: isinstance(p, Attention))
        for name, change in RESULT.items()
    }
    table |= {f"{name}: other grouping": Twist(f"{name} spread", _unspread, _regrouped) for name in "kv"}
    table["keys and values one apart"] = Twist("lengths", lambda scene, x: x * 1, _can_be_shifted)
    table["out: attended again"] = Twist("out", _attended_again, _dims_agree)
    table["scores: attended by themselves"] = Twist("scores", _attended_by_themselves, _eager)
    table[SDPA_DROPOUT] = Twist("sdpa", lambda scene, x: x, _by_sdpa)
    table |= {f"indexer: {name}": Twist(stage, change, _indexed) for name, (stage, change) in INDEXER.items()}
    return table


TWISTS: dict[str, Twist] = _table()


def applicable(program: Program) -> list[str]:
    """Names of the twists that a program can take."""
    return [name for name, twist in TWISTS.items() if twist.needs(program)]


STEPS = {
    "rounded to bfloat16": torch.finfo(torch.bfloat16).eps,
    "rounded to float16": torch.finfo(torch.float16).eps,
    "rounded to integers": 0.25,
}
"""What rounds may come out one step apart, if what it rounds is off by any error at all; gradients pass it too."""


GROWTH = {"squared", "scaled by data", "scaled by its row", "scaled by an item", "scaled by the queries"}
"""Changes that multiply by numbers as large as the inputs: what is "large" is so once more."""


def growth_of(program: Program) -> int:
    """How many factors as large as the inputs the twists put before the softmax, or into the values.

    With a single key the gradient of a score is a difference of equal numbers, which are as large as the values.
    """
    before = [tuple(name.split(": ")) for name in program.twists]
    once = sum(twist[0] in ("q", "k", "v", "scores", "logits") and twist[-1] in GROWTH for twist in before)
    return once + sum(twist in {("scores", "squared"), ("logits", "squared")} for twist in before)


def step_of(program: Program, stages: tuple[str, ...] = ()) -> float:
    """The largest step of a program's twists, of those at some stages if any are given; 0 for none."""
    at = (name.split(": ") for name in program.twists)
    return max((STEPS.get(change[-1], 0.0) for change in at if not stages or change[0] in stages), default=0.0)
