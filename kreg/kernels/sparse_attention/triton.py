"""``sparse_attention`` on CUDA and ROCm GPUs, in Triton: forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from triton import cdiv

from kreg.kernels.gpu import Launch, Target, current_target, launch, record
from kreg.kernels.sparse_attention import triton_gradients as gradients
from kreg.kernels.sparse_attention.triton_call import TABLE, Call, processors
from kreg.kernels.sparse_attention.triton_forward import combine_kernel, forward_kernel

TABLES = (TABLE,)

MOST_SPLITS = 32
"""Parts of one softmax: each costs a float32 row of the output, written and read."""


def attend(call: Call, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, queries, heads, head_dim] and lse [batch, heads, queries] of a call."""
    q = call.q
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim, dtype=out_dtype)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    target = current_target(q.device)
    config = call.pick("forward_kernel", target, call.mode == "selected")
    block_h = call.block_heads(config["BLOCK_M"])
    programs = batch * cdiv(queries, config["BLOCK_M"] // block_h) * cdiv(heads, block_h)
    free = processors(q.device) // max(programs, 1)
    splits = max(1, min(free, MOST_SPLITS, ceil(call.longest() / config["BLOCK_N"])))
    rows = batch * queries * heads
    parts = q.new_empty(splits, rows, dim, dtype=torch.float32) if splits > 1 else out
    logarithms = q.new_empty(splits, rows, dtype=torch.float32) if splits > 1 else lse
    launch(
        forward_kernel,
        (programs, splits),
        config,
        **call.arguments(),
        sinks=call.sinks,
        out=parts,
        lse=logarithms,
        batch=batch,
        splits=splits,
        SINKS=call.sinks is not None,
        SPLIT=splits > 1,
        BLOCK_H=block_h,
    )
    if splits > 1:
        config = TABLE.pick("combine_kernel", target)
        launch(
            combine_kernel,
            (cdiv(rows, config["BLOCK_R"]), cdiv(dim, config["BLOCK_C"])),
            config,
            parts=parts,
            logarithms=logarithms,
            out=out,
            lse=lse,
            rows=rows,
            queries=queries,
            heads=heads,
            splits=splits,
            HEAD_DIM=dim,
        )
    return out, lse


def forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of the op."""
    call = Call.of(q, kv, compressed, indices, sinks, padding, scale=scale, window=window, ratio=ratio, offset=offset)
    out, lse = attend(call, q.dtype)
    return out.transpose(1, 2), lse


def backward(
    grads: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor, ...],
    needs: frozenset[str],
    *,
    q: torch.Tensor,
    kv: torch.Tensor,
    compressed: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    scale: float,
    window: int,
    ratio: int = 0,
    offset: int = 0,
    deterministic: bool = False,
) -> dict[str, torch.Tensor]:
    """Gradients from the saved output and lse, that of lse included; see `triton_backward`.

    Args:
        deterministic: add up what selected entries receive in a fixed order, instead of by atomic additions; so it
            is too under ``torch.use_deterministic_algorithms``.
    """
    arguments = {"q": q, "kv": kv, "compressed": compressed, "sinks": sinks}
    wanted = {name: value for name, value in arguments.items() if name in needs and value is not None}
    if (grads[0] is None and grads[1] is None) or not q.numel():
        return {name: torch.zeros_like(value) for name, value in wanted.items()}
    call = Call.of(q, kv, compressed, indices, sinks, padding, scale=scale, window=window, ratio=ratio, offset=offset)
    grad = torch.zeros_like(outputs[0]) if grads[0] is None else grads[0]
    saved = gradients.Saved.of(call, grad, grads[1], *outputs)
    found = {}
    if "sinks" in wanted:
        found["sinks"] = gradients.grad_of_sinks(wanted["sinks"], saved)
    gives = "compressed" in wanted and call.mode == "selected"
    if "q" in wanted:
        found["q"] = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if gives:
        entries = wanted["compressed"]
        found["compressed"] = torch.zeros(entries.shape, dtype=torch.float32, device=q.device)
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if "q" in wanted or gives:
        target = found.get("compressed") if gives else None
        if gives and deterministic:
            assert target is not None
            gradients.in_order(call, saved, found.get("q"), target)
        else:
            gradients.queries(call, saved, found.get("q"), target, "add" if gives else "")
    if "kv" in wanted:
        found["kv"] = gradients.keys(call, saved, ready=False)
    if "compressed" in wanted and not gives:
        entries = wanted["compressed"]
        found["compressed"] = (
            torch.zeros_like(entries) if call.compressed is None else gradients.keys(call, saved, ready=True)
        )
    return {name: found[name].to(value.dtype) for name, value in wanted.items()}


def backward_in_order(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """`backward`, with equal bits for equal inputs."""
    return backward(*args, **kwargs, deterministic=True)


BUILT = (
    # mode, dtype, heads, head_dim, batch, queries
    ("selected", torch.bfloat16, 64, 512, 1, 256),
    ("ready", torch.float16, 64, 512, 1, 256),
    ("selected", torch.bfloat16, 64, 512, 64, 1),
    ("selected", torch.bfloat16, 8, 512, 64, 1),
    ("window", torch.bfloat16, 64, 512, 1, 256),
    ("selected", torch.bfloat16, 64, 384, 1, 256),
    ("selected", torch.bfloat16, 32, 256, 1, 256),
    ("ready", torch.bfloat16, 64, 192, 1, 256),
    ("selected", torch.float32, 64, 512, 1, 256),
    ("ready", torch.float32, 64, 384, 1, 256),
    ("selected", torch.float32, 64, 256, 1, 256),
    ("ready", torch.float32, 64, 192, 1, 256),
    ("selected", torch.float32, 64, 128, 1, 256),
)
"""The calls that are built ahead of time: DeepSeek-V4's, prefill and decode, and what else takes other blocks."""


def builds(target: Target) -> Iterator[Launch]:
    """The launches of `BUILT`, forward and, but for decoding, backward as the specs have it; the first one's both."""
    for number, (mode, dtype, heads, dim, batch, length) in enumerate(BUILT):
        call = example(mode, dtype, heads, dim, batch, length)
        yield from record(target, forward, **call)
        if length == 1:
            continue
        grad = torch.empty(batch, length, heads, dim, dtype=dtype, device="meta").transpose(1, 2)
        outputs = grad, torch.empty(batch, heads, length, device="meta")
        needs = frozenset(("q", "kv", "compressed", "sinks"))
        if dtype is not torch.float32:
            yield from record(target, backward, (grad, None), outputs, needs, **call)
        if dtype is torch.float32 or number == 0:
            yield from record(target, backward_in_order, (grad, None), outputs, needs, **call)


def example(mode: str, dtype: torch.dtype, heads: int, dim: int, batch: int, length: int) -> dict[str, Any]:
    """Arguments without data: window 128, and 512 of 4096 entries, 512 entries of 128 positions each, or padding."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    keys = max(length, 128)
    call = {
        "q": empty(batch, length, heads, dim).transpose(1, 2),
        "kv": empty(batch, keys, dim),
        "sinks": empty(heads, dtype=torch.float32),
        "scale": dim**-0.5,
        "window": 128,
        "offset": keys - length,
    }
    if mode == "selected":
        selection = empty(batch, length, 512, dtype=torch.int64)
        call |= {"compressed": empty(batch, 4096, dim), "indices": selection, "ratio": 4}
    if mode == "window":
        call["padding"] = empty(batch, keys, dtype=torch.bool)
    if mode == "ready":
        call |= {"compressed": empty(batch, 512, dim), "ratio": 128}
    return call
