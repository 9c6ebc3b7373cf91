"""What training is compared by: a text, a loop, and what rounding alone does to both.

The judge is the unmodified model in float64. transformers computes norms, softmax and rotary angles in float32
whatever the model's dtype is; under `Widened` they are computed in float64 too, so what the judge says is exact for
our purposes. The distance of the unmodified model in its own dtype from the judge is the noise of that dtype, and a
rewritten model, whose operations round in another order, is held to the same size of error.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import kreg

TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()
"""The one text of the repository that nobody edits, so no test changes with it."""

Batch = dict[str, Any]
Gradients = dict[str, torch.Tensor]

ROUNDING = 3.0
"""How much further from the judge a rewritten model may be than the unmodified one: both distances are the largest
of several roundings, which fell another way."""


def batches(count: int, size: int, length: int) -> list[Batch]:
    """Consecutive stretches of the text, around and around."""
    ids = torch.tensor(list(TEXT))
    found = []
    for i in range(count):
        places = (torch.arange(size * length) + i * size * length) % len(ids)
        rows = ids[places].view(size, length)
        found.append({"input_ids": rows, "labels": rows})
    return found


class Widened(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*wide, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def judge(model: nn.Module) -> nn.Module:
    """A copy of an unmodified model in float64, for use under `Widened`."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide.config, "_experts_implementation"):
        wide.config._experts_implementation = "batched_mm"  # grouped matrix products know no float64
    return wide


Step = Callable[[nn.Module, Batch], torch.Tensor]


def plain(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss, as a loop asks for it."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def autocast(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss in bfloat16 where autocast has it so."""
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, batch)


EPSILON = 1e-5
"""AdamW's. With 1e-8 a gradient that is zero but for rounding is divided by its own size, and rounding makes whole
steps: under the Trainer, which also clips, the unmodified DeepSeek-V4 then strays ten times as far from itself in
float64 as with 1e-6. With 1e-6 single weights whose gradients cancel still do so at the first step."""


def train(
    model: nn.Module, data: Sequence[Batch], lr: float = 3e-3, accumulate: int = 1, step: Step = plain
) -> list[float]:
    """AdamW over the batches; the loss of each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=EPSILON)
    losses = []
    for i, batch in enumerate(data):
        loss = step(model, batch)
        (loss / accumulate).backward()
        losses.append(float(loss.detach()))
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def gradients(model: nn.Module, data: Sequence[Batch], step: Step = plain) -> Gradients:
    """The gradients of all parameters, summed over batches, in float64; the model is left without."""
    model.zero_grad()
    for batch in data:
        step(model, batch).backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def judged(run: Callable[..., Any], model: nn.Module, *arguments: Any, **options: Any) -> Any:
    """What `train` or `gradients` give in float64."""
    with Widened():
        return run(judge(model), *arguments, **options)


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two curves: the largest."""
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def assert_curves(got: Sequence[float], same: Sequence[float], exact: Sequence[float]) -> None:
    """The loss fell, and no further from the judge's curve than the noise of the dtype.

    Args:
        got, same: of the rewritten model, and of the unmodified one in the same dtype.
        exact: the judge's.
    """
    head, tail = (sum(part) / len(part) for part in (exact[:5], exact[-5:]))
    assert tail < head, "the model learnt nothing, so the curves say nothing"
    noise = distance(same, exact)
    assert noise < (head - tail) / 4, f"rounding alone moves the curve by {noise:.1e}: nothing can be told from it"
    allowed = ROUNDING * max(noise, UNIT * len(exact) ** 0.5)
    assert distance(got, exact) <= allowed, f"{distance(got, exact):.1e}, where {noise:.1e} is noise"


UNIT = 2.0**-21
"""The last place of a float32 between 4 and 8, where losses begin. Roundings of so many steps add up as a random walk
does, and a single walk of the unmodified model may happen to end where it began."""


def assert_gradients(got: Gradients, same: Gradients, exact: Gradients, floor: float = 1e-5) -> None:
    """Every parameter's gradient, in the norm, no further from the judge's than the noise of the dtype.

    Args:
        floor: relative to the norm of the judge's gradient. A gradient that is zero but for rounding is compared with
            the largest of all.
    """
    assert got.keys() == same.keys() == exact.keys()
    largest = max(float(g.norm()) for g in exact.values())
    for name, want in exact.items():
        noise = float((same[name] - want).norm())
        scale = max(float(want.norm()), 1e-3 * largest)
        error = float((got[name] - want).norm())
        assert error <= ROUNDING * noise + floor * scale, f"{name}: {error:.1e}, noise {noise:.1e}, scale {scale:.1e}"


def replaced(model: nn.Module) -> dict[str, int]:
    """How many sites of each op run a kernel; none is kept."""
    report = kreg.report(model)
    assert all(site.status == "replaced" for site in report.sites), [s.reason for s in report.sites]
    return {op: row["replaced"] for op, row in report.summary.items()}


@contextlib.contextmanager
def answered(model: nn.Module, calls: int) -> Iterator[None]:
    """So many calls of a rewritten model are made inside, and rewritten graphs answer all of them."""
    before = kreg.report(model).calls
    yield
    now = kreg.report(model).calls
    assert now.fallbacks == before.fallbacks
    assert (now.rewritten - before.rewritten, now.original) == (calls, before.original)
