"""What one measured call does: a forward pass, a training step, a prompt into a cache, or a token behind one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[[], object]
Inputs = dict[str, Any]

WITH_CACHE = ("prefill", "decode")
CACHED: Inputs = {"use_cache": True}


def takes_cache(model: nn.Module) -> bool:
    """Whether a model's call can fill a cache, as those of transformers do."""
    return {"use_cache", "past_key_values"} <= inspect.signature(model.forward).parameters.keys()


def step_of(step: str, model: nn.Module, inputs: Inputs) -> Call:
    """The call to measure; what it needs and is no part of it, such as a filled cache, is made here."""
    return STEPS[step](model, inputs)


def _forward(model: nn.Module, inputs: Inputs) -> Call:
    def forward() -> object:
        with torch.no_grad():
            return model(**inputs)

    return forward


def _training(model: nn.Module, inputs: Inputs) -> Call:
    def training() -> object:
        for p in model.parameters():
            p.grad = None
        out = model(**inputs)
        out = next(v for v in (out.values() if isinstance(out, dict) else (out,)) if isinstance(v, torch.Tensor))
        loss = out.float().square().mean()
        loss.backward()
        return loss

    return training


def _prefill(model: nn.Module, inputs: Inputs) -> Call:
    """A prompt into a fresh cache; logits of its last position only, as generation asks for them."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return _forward(model, inputs | CACHED | last)


def _decode(model: nn.Module, inputs: Inputs) -> Call:
    """One token behind a cache of the prompt, which grows by it: variants that take turns see equal lengths."""
    cache: Any = _prefill(model, inputs)().past_key_values  # type: ignore[attr-defined]
    token = {"input_ids": inputs["input_ids"][:, -1:].contiguous()}

    def decode() -> object:
        with torch.no_grad():
            return model(**token, past_key_values=cache, **CACHED)

    return decode


STEPS: dict[str, Callable[[nn.Module, Inputs], Call]] = {
    "forward": _forward,
    "training": _training,
    "prefill": _prefill,
    "decode": _decode,
}
