"""A live model's own call, answered by its rewritten graph where that covers the inputs.

``nn.Module`` has one place for a compiled call; kreg puts its own there, so the class, ``forward``, parameters,
hooks and ``state_dict`` stay what they were, and taking it out again restores the model. Which inputs are covered
is decided by Dynamo's guards: once captured, a call that they refuse runs the original code.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from kreg.errors import CaptureError, KregError
from kreg.registry.library import fallbacks
from kreg.rewriters.backend import compile_graph
from kreg.rewriters.capture import Inputs, failure, split_inputs
from kreg.rewriters.pipeline import Settings
from kreg.rewriters.report import Calls, Report

GRAPHS = 8
"""Graphs that Dynamo may capture for one model; after that, calls that no graph covers run the original code."""

PLAIN = (torch.Tensor, bool, int, float, str, type(None))
"""Inputs that a graph is captured for. Others, such as a cache, change from call to call in ways guards pin."""


class RewrittenCall:
    """The call of a rewritten model.

    A graph is captured from the example inputs at once, and later for calls of another form (a padding mask,
    labels, no gradients) when they first come.
    """

    def __init__(self, model: nn.Module, settings: Settings, inputs: Inputs) -> None:
        self.model = model
        self.settings = settings
        self.inputs = split_inputs(inputs)
        self.reports: list[Report] = []
        self.calls: Counter[str] = Counter()
        self.graphs = 0
        self.displaced = vars(model).get("_compiled_call_impl")
        self.before = Counter(fallbacks)
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.compiled: Callable[..., Any] = torch.compile(model._call_impl, backend=self._backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call: rewritten where a graph covers the inputs, else the original code."""
        if torch.compiler.is_compiling():
            return self.model._call_impl(*args, **kwargs)
        args, kwargs = self._named(args, kwargs)
        ran = self.calls["rewritten"]
        with self._capturing((args, kwargs)):
            result = self.compiled(*args, **kwargs)
        if self.calls["rewritten"] == ran:
            self.calls["original"] += 1
        return result

    def capture(self) -> None:
        """Captures and rewrites the graph for the example inputs; the model's state is as before afterwards.

        Raises:
            CaptureError: the model does not run on the example inputs.
        """
        args, kwargs = self._named(*self.inputs)
        counted = Counter(self.calls)
        try:
            with _state_kept(self.model), self._capturing((args, kwargs)):
                self.compiled(*args, **kwargs)
        except KregError:
            raise
        except Exception as error:
            raise failure(self.model, error, "captured") from error
        finally:
            self.calls = counted

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional inputs by keyword, so that both ways to call are one graph; hooks see what they always saw."""
        model = self.model
        if not args or len(args) > len(self.names) or model._forward_hooks or model._forward_pre_hooks:
            return args, kwargs
        named = dict(zip(self.names, args, strict=False))
        kinds = inspect.signature(model.forward).parameters
        if named.keys() & kwargs.keys() or any(kinds[n].kind is not _EITHER for n in named):
            return args, kwargs
        return (), named | kwargs

    def _capturing(self, inputs: Any) -> Any:
        """Lets Dynamo capture a call it has no graph for, if there is a point in it."""
        leaves = torch.utils._pytree.tree_leaves(inputs)
        if self.graphs >= GRAPHS or not all(isinstance(leaf, PLAIN) for leaf in leaves):
            return torch.compiler.set_stance("eager_on_recompile")
        if self.settings.dynamic:
            for leaf in leaves:
                _mark_dynamic(leaf)
        return torch._dynamo.config.patch(specialize_float=True)

    def report(self) -> Report:
        """The report of the capture that replaced most, with every capture's near misses and the calls so far."""
        if not self.reports:
            empty = Report(
                model=type(self.model).__name__,
                device=self.settings.environment.device,
                frontend="dynamo",
                nodes=0,
            )
            return empty.model_copy(update={"calls": self._counts()})
        first = max(self.reports, key=lambda r: sum(site.status == "replaced" for site in r.sites))
        misses = dict.fromkeys(miss for report in self.reports for miss in report.near_misses)
        return first.model_copy(update={"calls": self._counts(), "near_misses": tuple(misses)})

    def _counts(self) -> Calls:
        since = fallbacks - self.before
        return Calls(
            rewritten=self.calls["rewritten"],
            original=self.calls["original"],
            fallbacks={f"{kernel}: {reason}": count for (kernel, reason), count in since.items()},
        )

    def _backend(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled, report = compile_graph(module, self.settings, type(self.model).__name__)
        if report is None:
            return compiled
        self.reports.append(report)
        if not any(site.status == "replaced" for site in report.sites):
            return compiled

        def run(*inputs: Any) -> Any:
            self.calls["rewritten"] += 1
            return compiled(*inputs)

        return run


def attach(model: nn.Module, settings: Settings, example_inputs: Inputs | None) -> RewrittenCall:
    """Puts a rewritten call into a model; if anything fails, the model is left as it was."""
    inputs = example_inputs_for(model) if example_inputs is None else example_inputs
    detach(model)
    call = RewrittenCall(model, settings, inputs)
    call.capture()
    model._compiled_call_impl = call
    return call


def attached(model: nn.Module) -> RewrittenCall:
    """The rewritten call of a model; raises ValueError if it has none."""
    call = vars(model).get("_compiled_call_impl")
    if not isinstance(call, RewrittenCall):
        raise ValueError(f"this {type(model).__name__} was not rewritten; call kreg.rewrite(model) first")
    return call


def detach(model: nn.Module) -> None:
    """Takes the rewritten call out of a model again, and puts back what it displaced."""
    call = vars(model).get("_compiled_call_impl")
    if isinstance(call, RewrittenCall):
        del model._compiled_call_impl
        if call.displaced is not None:
            model._compiled_call_impl = call.displaced


def example_inputs_for(model: nn.Module) -> dict[str, Any]:
    """Token ids for a model whose ``config`` names a vocabulary.

    Raises:
        CaptureError: the model has no such config.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise CaptureError(
            f"no example inputs can be derived for {type(model).__name__}: it has no config with a vocab_size. "
            f"Pass them: example_inputs=(tensor, ...) or a dict of keyword inputs"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    length = min(EXAMPLE_LENGTH, int(getattr(config, "max_position_embeddings", None) or EXAMPLE_LENGTH))
    tokens = torch.randint(vocabulary, (2, length), generator=generator)
    return {"input_ids": tokens.to(device)}


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD

EXAMPLE_LENGTH = 384
"""Tokens in a derived example: a multiple of 128, as most lengths in use are, and three times that, so that a
model which compresses 128 tokens into an entry has more than one (sizes of 0 and 1 are cases of their own)."""


def _mark_dynamic(value: Any) -> None:
    """Batch and sequence may change from call to call; sizes of 1 are cases of their own."""
    if isinstance(value, torch.Tensor):
        for d in range(min(value.dim(), 2)):
            if value.shape[d] > 1:
                torch._dynamo.maybe_mark_dynamic(value, d)


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Capturing runs the model once: buffers, gradients and random number generators are put back."""
    buffers: Mapping[str, torch.Tensor] = {name: b.detach().clone() for name, b in model.named_buffers()}
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
