"""``torch.compile(model, backend="kreg")``: Dynamo as a front end for whatever it captures.

Guards, caches, recompilation and side effects are Dynamo's. A graph that cannot be rewritten runs as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from kreg.registry.catalogue import catalogue
from kreg.registry.environment import Environment
from kreg.registry.selection import selected, selection_from_environment
from kreg.rewriters.live.captured import captured
from kreg.rewriters.live.variants import Compiled
from kreg.rewriters.pipeline import Settings

OPTIONS = ("device", "enable", "disable", "verify", "rest")
REST = ("eager", "inductor")


def backend(
    module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Compiled:
    """A ``torch.compile`` backend.

    Args:
        options: "device" (default: where the inputs are), "enable", "disable", "verify", as for `kreg.rewrite`;
            "rest": what runs what kreg does not replace, "eager" (the default) or "inductor".

    Raises:
        SelectionError: an unknown device or kernel, or kernels that exclude each other.
        ValueError: an unknown option.
    """
    given = dict(options or {})
    unknown = [name for name in given if name not in OPTIONS]
    if unknown:
        raise ValueError(f"the kreg backend has no option {', '.join(map(repr, unknown))}; it has {', '.join(OPTIONS)}")
    rest = given.get("rest", "eager")
    if rest not in REST:
        raise ValueError(f"the kreg backend's option 'rest' is one of {', '.join(REST)}; found {rest!r}")
    device = given.get("device")
    if device is None:
        device = next((t.device for t in example_inputs if isinstance(t, torch.Tensor)), torch.device("cpu"))
    enable, disable = selection_from_environment(given.get("enable", ()), given.get("disable", ()))
    selected(catalogue(), enable, disable)  # a graph that cannot be planned runs as it is: this has to be told first
    settings = Settings(Environment.detect(device), enable, disable, given.get("verify", True))
    return captured(module, settings, "GraphModule", finish=_inductor if rest == "inductor" else None)


def _inductor(module: GraphModule, inputs: Sequence[Any]) -> Compiled:
    """The rewritten graph compiled by Inductor, to which an op is a call like any other."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, list(inputs))  # type: ignore[return-value]
