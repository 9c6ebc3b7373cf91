"""The Dynamo front end: ``torch.compile(model, backend="kreg")``, and what `kreg.rewrite` runs live models by.

Guards, caches, recompilation and side effects are Dynamo's. A graph that cannot be rewritten runs as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from kreg.registry.environment import Environment
from kreg.registry.selection import selection_from_environment
from kreg.rewriters.functional import functionalize
from kreg.rewriters.graph import aten
from kreg.rewriters.memory import reuse
from kreg.rewriters.pipeline import Clock, Settings, rewrite_graph
from kreg.rewriters.report import Report

log = logging.getLogger("kreg")

Compiled = Callable[..., Any]


def backend(
    module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Compiled:
    """A ``torch.compile`` backend.

    Args:
        options: "device" (default: where the inputs are), "enable", "disable", "verify", as for `kreg.rewrite`.

    Raises:
        SelectionError: an unknown device or kernel, or kernels that exclude each other.
    """
    given = dict(options or {})
    device = given.pop("device", None)
    if device is None:
        device = next((t.device for t in example_inputs if isinstance(t, torch.Tensor)), torch.device("cpu"))
    enable, disable = selection_from_environment(given.pop("enable", ()), given.pop("disable", ()))
    verify = given.pop("verify", True)
    if given:
        raise ValueError(
            f"the kreg backend has no option {', '.join(map(repr, given))}; it has device, enable, disable, verify"
        )
    settings = Settings(Environment.detect(device), enable, disable, verify)
    compiled, _ = compile_graph(module, settings, "GraphModule")
    return compiled


def compile_graph(module: GraphModule, settings: Settings, model: str) -> tuple[Compiled, Report | None]:
    """A graph of Dynamo's, rewritten; the graph itself, and no report, where it cannot be captured."""
    clock = Clock()
    try:
        with clock.stage("capture"):
            inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
            functional, signature = functionalize(module, inputs)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        log.warning("a graph runs as it was, for it cannot be made functional: %s: %s", type(error).__name__, reason)
        return module.forward, None
    done = rewrite_graph(functional, settings, model=model, frontend="dynamo", clock=clock)
    if not any(site.status == "replaced" for site in done.report.sites):
        return module.forward, done.report
    reuse(done.module)
    return _callable(done.module, signature), done.report


def _callable(module: GraphModule, signature: Any) -> Compiled:
    """The graph as Dynamo calls it: new values of mutated inputs, which come first, are written back."""
    targets = [signature.user_inputs.index(name) for name in signature.user_inputs_to_mutate.values()]
    if not targets:
        return module.forward

    def run(*inputs: Any) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = module.forward(*inputs)
        for position, value in zip(targets, outputs, strict=False):
            aten.copy_.default(inputs[position], value)
        return outputs[len(targets) :]

    return run
