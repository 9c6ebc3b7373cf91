"""A module's call compiled by Dynamo, and called past Dynamo's own wrapper where one of its graphs is known to hold.

Around every call ``torch.compile`` puts away and restores a dozen settings in Python: some times what the guards take,
which are in C++. The guards and the code that Dynamo made for them are objects that can be called; the wrapper is
left for what has to be captured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import eval_frame
from torch._dynamo.guards import GuardManagerWrapper

Backend = Callable[..., Callable[..., Any]]

GRAPH = "__compiled_fn"
"""How the names begin that Dynamo gives to graphs."""


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


class CompiledCall:
    """The call of any module.

    Args:
        backend: what makes a callable of a graph.
        dynamic, limit: as ``torch.compile`` takes them: sizes may vary; the graphs it may capture.
    """

    def __init__(self, backend: Backend, *, dynamic: bool, limit: int) -> None:
        self._compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
            _call, backend=backend, dynamic=dynamic, recompile_limit=limit, isolate_recompiles=True
        )
        self._graphs: tuple[tuple[GuardManagerWrapper, FunctionType], ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's call gives.

        Raises:
            torch._dynamo.exc.TorchDynamoException: it cannot be captured; nothing has run.
        """
        if self._graphs and _is_plain():
            given = {"module": module, "args": args, "kwargs": kwargs}
            for guards, run in self._graphs:
                if guards.cache_entry is not None and guards.root.check(given):
                    return run(module, *args, **kwargs)
        before = len(self._entries())
        try:
            with _capturing():
                return self._compiled(module, *args, **kwargs)
        finally:
            if len(self._entries()) != before or any(guards.cache_entry is None for guards, _ in self._graphs):
                self._graphs = tuple(self._callable())

    def _entries(self) -> list[Any]:
        region: int = self._compiled._isolate_recompiles_id  # type: ignore[attr-defined]
        return eval_frame._get_cache_entries_for_region(_call, region)

    def _callable(self) -> Iterator[tuple[GuardManagerWrapper, FunctionType]]:
        """Guards and code of the cached graphs that are all of their call."""
        for entry in self._entries():
            if _is_whole(entry.code):
                yield entry.guard_manager, FunctionType(entry.code, _bare_globals(entry.code))


def _bare_globals(code: CodeType) -> dict[str, Any]:
    """What code that Dynamo made refers to, its graphs without the wrapper that hides them from a running Dynamo."""
    known = _call.__globals__
    graphs = {name: known[name] for name in code.co_names if name.startswith(GRAPH)}
    return known | {name: getattr(graph, "_torchdynamo_orig_callable", graph) for name, graph in graphs.items()}


def _is_whole(code: CodeType) -> bool:
    """Whether code that Dynamo made calls a graph and goes on in no further frame, which Dynamo would have to see."""
    calls = any(name.startswith(GRAPH) for name in code.co_names)
    return calls and not any(name.startswith("__resume_at") for name in code.co_names)


def _is_plain() -> bool:
    """Whether nobody asked for anything else: no other frame of Dynamo's runs, and no stance was set."""
    stance = eval_frame._stance
    return get_eval_frame_callback() is None and stance.stance == "default" and stance.backend is None


class _Thread(threading.local):
    capturing = False

    def __init__(self) -> None:
        # A scale or an epsilon is part of the code, and no input. Made once: making it takes longer than entering it.
        # Sizes that depend on data (a boolean index) stay in the graph; hooks that come later are seen; no graph
        # announces its calls to the profiler, which costs as much as a small operator.
        self.settings = torch._dynamo.config.patch(
            specialize_float=True,
            capture_dynamic_output_shape_ops=True,
            skip_nnmodule_hook_guards=False,
            record_runtime_overhead=False,
        )


_thread = _Thread()


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    """While Dynamo may capture."""
    if _thread.capturing:
        yield
        return
    with _thread.settings:
        try:
            _thread.capturing = True
            yield
        finally:
            _thread.capturing = False
