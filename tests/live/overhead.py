"""What a rewritten model's call costs beside calling the kernel by hand: ``python -m tests.live.overhead``.

The variants are the same small model: rewritten; with the kernel's own functions registered as transformers'
attention, called by the original code; and unmodified. They take turns, so that what else the machine does falls on
all of them; what is printed are medians over turns. The sizes are so small that arithmetic hardly counts.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import kreg
from kreg.registry.catalogue import catalogue
from tests import models

Call = Callable[[], object]


class ByHand(torch.autograd.Function):
    """A kernel's two functions as anyone would join them."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        out, lse = kernel.entry_point()(q, k, v, scale=scale, causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.scale = kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        names = frozenset("qkv")
        found = ctx.kernel.backward_point()(
            (grad, None), (out, lse), names, q=q, k=k, v=v, scale=ctx.scale, causal=True
        )
        return None, found["q"], found["k"], found["v"], None


def by_hand(model: nn.Module, kernel: str) -> nn.Module:
    """The model with a kernel as its attention, for prompts without padding."""
    spec = catalogue().kernel(kernel)
    forward = spec.entry_point()

    def attention(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, scaling: float, **rest: Any
    ) -> tuple[torch.Tensor, None]:
        if torch.is_grad_enabled() and q.requires_grad:
            out = ByHand.apply(spec, q, k, v, scaling)
        else:
            out, _ = forward(q, k, v, scale=scaling, causal=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", sdpa_mask)  # none, where causal is all there is
    model.set_attn_implementation("by_hand")  # type: ignore[operator]
    return model


def forward(model: nn.Module, ids: torch.Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return call


def recorded(model: nn.Module, ids: torch.Tensor) -> Call:
    return lambda: model(input_ids=ids, use_cache=False).logits


def backward(model: nn.Module, ids: torch.Tensor) -> Call:
    def call() -> object:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        return model.zero_grad()

    return call


MODES = {"forward, no gradients": forward, "forward, gradients recorded": recorded, "forward and backward": backward}


def medians(calls: dict[str, Call], turns: int) -> dict[str, tuple[float, float]]:
    """Microseconds of a call by variant: wall and processor time, each variant once in each turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for name in calls if turn % 2 else reversed(calls):
                wall, processor = time.perf_counter(), time.process_time()
                calls[name]()
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    finally:
        gc.enable()
    return {name: tuple(1e6 * statistics.median(t) for t in zip(*taken[name], strict=True)) for name in calls}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=300)
    given = parser.parse_args()
    original = models._decoder(
        "Qwen3Config", torch.float32, 0, num_hidden_layers=given.layers, attn_implementation="sdpa"
    )
    ids = models.tokens(1, given.tokens)
    rewritten = copy.deepcopy(original)
    with contextlib.redirect_stdout(io.StringIO()):
        kreg.rewrite(rewritten, verify=False, example_inputs={"input_ids": ids, "use_cache": False})
    (kernel,) = {site.kernel for site in kreg.report(rewritten).sites}
    nodes = kreg.report(rewritten).summary["attention"]["replaced"]
    assert kernel is not None
    variants = {"kreg": rewritten, "by hand": by_hand(copy.deepcopy(original), kernel), "original": original}
    print(
        f"{nodes} nodes of {kernel}, {given.tokens} tokens, torch {torch.__version__}: us per call, in processor time"
    )
    for mode, call_of in MODES.items():
        calls = {name: call_of(model, ids) for name, model in variants.items()}
        for call in calls.values():
            for _ in range(3):
                call()
        before = kreg.report(rewritten).calls
        found = medians(calls, given.turns)
        assert kreg.report(rewritten).calls.original == before.original, "a call was not rewritten"
        row = ", ".join(f"{name} {wall:,.0f} ({processor:,.0f})" for name, (wall, processor) in found.items())
        (wall, processor), (by, by_processor) = found["kreg"], found["by hand"]
        print(f"{mode}: {row}; per node {(wall - by) / nodes:+.1f} ({(processor - by_processor) / nodes:+.1f})")


if __name__ == "__main__":
    main()
