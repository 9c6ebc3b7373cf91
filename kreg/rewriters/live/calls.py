"""A live model: its own layers, answered by rewritten graphs where those cover the inputs.

``nn.Module`` has one place for a compiled call. kreg puts a call of its own there, in each region of the model (a
layer, see `regions`) and in the modules around them, so class, ``forward``, parameters, hooks and ``state_dict`` stay
what they were, and taking them out again restores the model. The modules around run their own code, and `provenance`
notes how they make masks and positions; a region is captured by Dynamo, once for all layers that are alike, and its
guards decide which calls are covered.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _pop_mode_temporarily

from kreg.rewriters.capture import Inputs, failure, first_sentences, split_inputs
from kreg.rewriters.live.account import Account
from kreg.rewriters.live.captured import Known, captured
from kreg.rewriters.live.compiled import CompiledCall
from kreg.rewriters.live.exclusions import ruled_out
from kreg.rewriters.live.provenance import Recorder
from kreg.rewriters.live.regions import larger, regions, scopes
from kreg.rewriters.live.variants import Compiled
from kreg.rewriters.pipeline import Settings
from kreg.rewriters.report import Report

GRAPHS = 32
"""Graphs that Dynamo may capture for one model beyond one for each region; after that, calls that no graph covers
run the original code."""


class RewrittenModel:
    """What the calls in one model share: what was asked, the compiled call, and the account."""

    def __init__(self, model: nn.Module, settings: Settings, fix_first: bool) -> None:
        self.model = model
        self.settings = settings
        self.fix_first = fix_first
        self.name = type(model).__name__
        self.take(regions(model))

    def take(self, regions: Mapping[str, nn.Module]) -> None:
        """Puts calls into regions and the modules around them, in the place of those that were there."""
        detach(self.model)
        self.regions = regions
        self.scopes = scopes(self.model, regions)
        self.begin({})
        for path, module in self.scopes.items():
            if path not in regions:
                module._compiled_call_impl = ScopeCall(module, self, path)
        for path, module in regions.items():
            module._compiled_call_impl = RegionCall(module, self, path)

    def begin(self, decided: Mapping[str, str]) -> None:
        """From nothing, without the kernels that a plan for the whole model rules out, for the reasons given."""
        self.account = Account(self.name, self.settings.environment.device, tuple(self.regions), decided)
        self.known: Known = {}
        self.fixed = self._compiled(dynamic=False)
        self.varying = self._compiled(dynamic=True)

    def _compiled(self, dynamic: bool) -> CompiledCall:
        return CompiledCall(self._backend, dynamic=dynamic, limit=GRAPHS + len(self.regions))

    def _backend(self, module: GraphModule, example_inputs: Any) -> Compiled:
        return captured(module, self.settings, self.account.model, self.account, known=self.known)


class _Call:
    """A module's call, and what it displaced."""

    def __init__(self, module: nn.Module, owner: RewrittenModel, path: str) -> None:
        self.module = module
        self.owner = owner
        self.path = path
        self.displaced = vars(module).get("_compiled_call_impl")
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call; that of the whole model is counted."""
        if _traced():
            return self.module._call_impl(*args, **kwargs)
        if self.path:
            return self.answer(args, kwargs)
        with self.owner.account.call():
            return self.answer(args, kwargs)

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's call gives."""
        raise NotImplementedError

    def first(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """The first tensor among the inputs, in the order of ``forward``."""
        for value in args:
            if isinstance(value, torch.Tensor):
                return value
        for name in self.names:
            if isinstance(value := kwargs.get(name), torch.Tensor):
                return value
        return None


class ScopeCall(_Call):
    """The call of a module around regions: its own code, watched."""

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own answer."""
        if _thread.inside:
            return self.module._call_impl(*args, **kwargs)
        first = self.first(args, kwargs)
        step = first is not None and first.dim() == 2 and first.shape[1] == 1
        watched = not step and self.owner.account.watching
        with Recorder() if watched else _NOTHING:  # type: ignore[no-untyped-call]
            try:  # and no context of its own: an interrupt may come where a function begins
                _thread.modes = torch._C._len_torch_dispatch_stack()
                _thread.inside = "step" if step else "watched" if watched else "call"
                return self.module._call_impl(*args, **kwargs)
            finally:
                _thread.inside = ""


class RegionCall(_Call):
    """The call of a region: compiled, where a graph covers the inputs or may be captured for them.

    The batch and length of the first call are fixed in its graph, which is the cheaper one to capture and to plan;
    with the first call of other sizes a graph for all sizes is captured. A call for a single position, as decoding
    makes them, runs the original code: it has little to gain, and its cache is another one at every step.
    """

    sizes: tuple[int, ...] | None = None

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a rewritten graph gives where one covers the inputs, else the original code."""
        inside = _thread.inside
        if inside == "step":
            return self.module._call_impl(*args, **kwargs)
        first = self.first(args, kwargs)
        if first is None or (first.dim() == 3 and first.shape[1] == 1):
            return self.module._call_impl(*args, **kwargs)
        if inside and torch._C._len_torch_dispatch_stack() != _thread.modes:  # the model's own code put a mode there
            return self.module._call_impl(*args, **kwargs)
        owner = self.owner
        now = owner.account.now
        outer = now.path
        try:
            now.path = self.path
            call = owner.fixed if first.shape[:2] == self.sizes else self._compiled(first, args, kwargs)
            if inside != "watched":
                return call(self.module, args, kwargs)
            with _pop_mode_temporarily():  # Dynamo would not capture under the recorder
                return call(self.module, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything ran
            reason = f"{self.path or 'the model'} cannot be captured: {first_sentences(error, 300)}"
            owner.account.failed(reason)
        finally:
            now.path = outer
        return self.module._call_impl(*args, **kwargs)

    def _compiled(self, first: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledCall:
        sizes = first.shape[:2]
        if self.sizes is None:
            self.sizes = sizes if self.owner.fix_first else ()
        if sizes == self.sizes or not self.owner.settings.dynamic:
            return self.owner.fixed
        _mark_static((args, kwargs), {size for size in sizes if size > 1}, grid=first.dim() > 3)
        return self.owner.varying


def _traced() -> bool:
    """Whether this thread traces the call; ``torch.compiler.is_compiling`` is also true while another one traces."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and get_proxy_mode() is not None


class _Thread(threading.local):
    inside = ""
    """The outermost scope that runs in this thread: "" for none, "step" for one with a single position, "watched"
    under the recorder, else "call"."""
    modes = 0
    """How many dispatch modes there were when it began."""


_thread = _Thread()


_NOTHING = contextlib.nullcontext()


def attach(
    model: nn.Module, settings: Settings, example_inputs: Inputs | None, *, fix_first: bool = True
) -> RewrittenModel:
    """Puts rewritten calls into a model; if anything fails, the model is left as it was.

    With example inputs, or where a ``config`` tells what they are, the model is run once to capture it.

    Args:
        fix_first: fix batch and length of a region's first call in its graph; else the first is for all sizes.

    Raises:
        CaptureError: the model does not run on the example inputs.
    """
    to_come = any(p.is_meta for p in model.parameters())  # such weights are not run: the first call captures
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    if example_inputs is not None:
        inputs = split_inputs(example_inputs)
    elif not to_come:
        inputs = example_inputs_for(model)
    try:
        owner = RewrittenModel(model, settings, fix_first)
        if inputs is not None:
            _capture(model, owner, *inputs)
    except BaseException:
        detach(model)
        raise
    return owner


def _capture(model: nn.Module, owner: RewrittenModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def run() -> None:
        with _state_kept(model), owner.account.uncounted():
            model(*args, **kwargs)

    try:
        run()
        _grow(owner, run)
        if decided := ruled_out(owner.account, owner.settings):
            owner.begin(decided)
            run()
    except Exception as error:
        raise failure(model, error, "captured") from error


def _grow(owner: RewrittenModel, run: Callable[[], None]) -> None:
    """Captures more at once, where what a region gives out keeps a site from being one, if that helps."""
    before, found = owner.regions, owner.account.replaced
    while paths := [path for path in owner.account.cut_short if path]:
        owner.take(larger(owner.model, owner.regions, paths))
        run()
    if owner.regions is not before and owner.account.replaced <= found:
        owner.take(before)
        run()


def analysed(
    model: nn.Module, settings: Settings, inputs: Inputs, mode: FakeTensorMode, *, dynamic: bool = False
) -> Report:
    """The report of a model of fake tensors, layer by layer; the model is left as it was.

    Args:
        dynamic: for all batches and lengths.

    Raises:
        CaptureError: the model does not run on the inputs.
    """
    settings.progress(f"capturing {type(model).__name__} layer by layer")
    with mode:
        owner = attach(model, settings, inputs, fix_first=not dynamic)
    detach(model)
    return owner.account.report()


def attached(model: nn.Module) -> RewrittenModel:
    """What a rewritten model's calls share; raises ValueError if it was not rewritten."""
    call = vars(model).get("_compiled_call_impl")
    if not isinstance(call, _Call):
        raise ValueError(f"this {type(model).__name__} was not rewritten; call kreg.rewrite(model) first")
    return call.owner


def detach(model: nn.Module) -> None:
    """Takes the rewritten calls out of a model again, and puts back what they displaced."""
    for module in model.modules():
        call = vars(module).get("_compiled_call_impl")
        if isinstance(call, _Call):
            del module._compiled_call_impl
            if call.displaced is not None:
                module._compiled_call_impl = call.displaced


def example_inputs_for(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Token ids for a model whose ``config`` names a vocabulary; None for any other."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    length = min(EXAMPLE_LENGTH, int(getattr(config, "max_position_embeddings", None) or EXAMPLE_LENGTH))
    tokens = torch.randint(vocabulary, (2, length), generator=generator, device="cpu")
    return (), {"input_ids": tokens.to(device)}


EXAMPLE_LENGTH = 384
"""Tokens in a derived example: a multiple of 128, as most lengths in use are, and three times that, so that a
model which compresses 128 tokens into an entry has more than one (sizes of 0 and 1 are cases of their own)."""


def _mark_static(inputs: Any, varying: set[int], grid: bool) -> None:
    """Only batch and sequence may change from call to call, wherever they stand; channels, which come last, may not.

    Equal sizes are one symbol, so that a mask is known to be as long as the keys. Of a ``grid`` of pixels or tokens the
    batch alone may: windows and padding of an unknown grid take Dynamo minutes, and a model sees few of them.
    """
    tensors = (leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    for tensor in tensors:
        for d, size in enumerate(tensor.shape):
            if size not in varying or (d > 0 if grid else tensor.dim() == 3 and d == 2):
                torch._dynamo.mark_static(tensor, d)


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Capturing runs the model once: buffers and random number generators are put back."""
    buffers = {name: (_version(b), b.detach().clone()) for name, b in model.named_buffers()}
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                version, value = buffers.get(name, (0, buffer))
                # What the model keeps may have been computed from a buffer: one that nothing wrote into is left alone.
                if _version(buffer) != version and value.shape == buffer.shape:
                    buffer.copy_(value)
        _reshard(model)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written into; one of inference mode does not count, and cannot be put back either."""
    return 0 if tensor.is_inference() else tensor._version


def _reshard(model: nn.Module) -> None:
    """FSDP2 gathers parameters for a forward pass, and gives some back in the backward pass, which never comes here.

    An optimizer made afterwards would hold the gathered ones, and train nothing.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second, for a model that has none of it
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()
