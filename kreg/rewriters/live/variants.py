"""One graph of Dynamo's and its rewritten variants: one for each way in which its masks and positions are made.

Dynamo's guards say for which calls the graph holds. Among those, a variant that rests on how an input was made
answers the calls in which it was made so; the variant that rests on nothing answers the others. Whatever fails on the
way, the graph as Dynamo gave it is the answer.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import sympy
import torch
import torch.utils.checkpoint
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from kreg.registry.direct import direct
from kreg.registry.plan import SiteFacts
from kreg.rewriters.capture import first_sentences
from kreg.rewriters.facts import op_nodes
from kreg.rewriters.functional import functionalize
from kreg.rewriters.graph import aten
from kreg.rewriters.live.bindings import bind
from kreg.rewriters.live.continued import Continuation, continue_past, settle, symbols_of, values
from kreg.rewriters.live.dry import remembered
from kreg.rewriters.live.provenance import Made, origin_of, written
from kreg.rewriters.memory import reuse
from kreg.rewriters.pipeline import Clock, Settings, rewrite_graph
from kreg.rewriters.report import Report
from kreg.rewriters.views import compose

log = logging.getLogger("kreg")

Compiled = Callable[..., Any]
Conditions = tuple[Callable[[Mapping[Any, int]], bool], ...]
Finish = Callable[[GraphModule, Sequence[Any]], Compiled]

VARIANTS = 8
"""Ways in which the inputs of one graph may be made that are tried; calls beyond them rest on nothing."""


PASSED_ON = (torch.OutOfMemoryError, torch.utils.checkpoint._StopRecomputationError)
"""Raised in the middle of a graph, and no failure of it."""


class Listener(Protocol):
    """Who keeps the account of what graphs were made and ran."""

    @property
    def excluded(self) -> Mapping[str, str]:
        """The kernels that are off because of others in the model, and why."""

    @property
    def watching(self) -> bool:
        """Whether it is noted how masks and positions are made."""

    def added(self, variant: Variant) -> None:
        """A variant was made."""

    def ran(self, variant: Variant) -> None:
        """A variant is about to answer: by its original graph, where nothing is replaced in it."""

    def failed(self, reason: str) -> None:
        """The original code answered, for this reason."""

    def watch(self) -> None:
        """How inputs are made matters to a graph that was called: note it at the next call too."""


@dataclass(eq=False)
class Variant:
    """A rewritten graph, and what it rests on.

    Attributes:
        run: the graph as Dynamo calls it, with the further inputs after its own.
        report: what was replaced.
        facts: of its sites, for plans.
        graph: tells the variants of one graph from those of others.
        continuation: how inputs have to have been made, or None.
        conditions: what the sizes of a call have to be, beyond Dynamo's guards.
        broken: it raised once, and is not asked again.
        cut_short: as `Rewritten` says it of the graph.
    """

    run: Compiled
    report: Report
    facts: tuple[SiteFacts, ...]
    graph: int
    continuation: Continuation | None = None
    conditions: Conditions = ()
    broken: bool = False
    cut_short: bool = False
    replaced: bool = field(init=False)

    def __post_init__(self) -> None:
        self.replaced = any(site.status == "replaced" for site in self.report.sites)

    @property
    def rests_on(self) -> Set[int]:
        """The inputs whose makers are part of the graph."""
        return set() if self.continuation is None else self.continuation.patterns.keys()

    def further(self, made: Mapping[int, Made], sizes: Mapping[Any, int]) -> list[Any] | None:
        """The further inputs for a call, by how its inputs were made; None if the variant does not cover it."""
        if self.broken or not all(condition(sizes) for condition in self.conditions):
            return None
        return [] if self.continuation is None else self.continuation.given(made, sizes)


class CapturedGraph:
    """A graph of Dynamo's as something to call.

    Args:
        module: the graph.
        settings: what was asked.
        model: its name, for reports.
        listener: who wants to know what happens.
        finish: what makes a callable of a rewritten graph; its ``forward``, by default.
    """

    def __init__(
        self,
        module: GraphModule,
        settings: Settings,
        model: str,
        listener: Listener | None = None,
        finish: Finish | None = None,
    ) -> None:
        self.original: Compiled = module.forward
        self.settings = settings
        self.model = model
        self.listener = listener
        self.finish = finish
        self.variants: list[Variant] = []
        self.base: Variant | None = None
        self.refused: list[Continuation] = []
        self.misfits = 0
        self.hopeless = False
        self.lock = threading.RLock()
        self.clock = Clock()
        self.functional: GraphModule | None = None
        self.assumed: Conditions = ()
        self.writes: Sequence[int] = range(len(module.graph.find_nodes(op="placeholder")))  # none is known not to be
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        guards = _guards(placeholders, "example_value")
        before = len(guards)
        try:
            with self.clock.stage("capture"):
                fakes = [node.meta["example_value"] for node in placeholders]
                self.functional, self.signature = functionalize(module, fakes)
        except Exception as error:
            self._failed("a graph cannot be made functional", error)
            return
        self.writes = tuple(self.signature.written)
        if settings.dry_run and not self.writes:
            self.original = remembered(module.forward)
        inputs = [node for node in self.functional.graph.nodes if node.op == "placeholder"]
        self.symbols = symbols_of(inputs)
        self.watched = [i for i, node in enumerate(inputs) if _may_be_made(node, placeholders[i])]
        with self.lock:  # now, so that what is assumed of sizes becomes Dynamo's guards
            examples = _examples(placeholders)
            self._add(self._makers(examples) if examples else {}, examples)
        self.assumed = _conditions(guards[before:])
        if self.listener is not None:
            self.listener.watch()

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether what was assumed of sizes for this graph, beyond its operators, is so in a call of the same code."""
        if not self.assumed:
            return True
        sizes = values(self.symbols, inputs)
        return all(condition(sizes) for condition in self.assumed)

    def __call__(self, *inputs: Any) -> Any:
        """The graph's outputs."""
        if not self.writes:
            return self._answer(inputs)
        try:
            return self._answer(inputs)
        finally:
            for position in self.writes:
                written(inputs[position])

    def _answer(self, inputs: tuple[Any, ...]) -> Any:
        if self.functional is None:
            return self.original(*inputs)
        variant, further = (self.base, []) if self._is_settled() else self._choose(inputs)
        if self.listener is not None:
            if self.tried:
                self.listener.watch()
            if variant is not None:
                self.listener.ran(variant)
        if variant is None or not variant.replaced or self.settings.dry_run:
            return self.original(*inputs)
        try:
            return variant.run(*inputs, *further)
        except PASSED_ON:
            raise
        except Exception as error:
            outputs = self.original(*inputs)  # an error of the model's own is raised here
            variant.broken = True
            self._failed("a rewritten graph failed while running", error)
        return outputs

    def _is_settled(self) -> bool:
        """Whether the variant that rests on nothing answers whatever call comes."""
        if self.base is None or self.base.broken or self.base.conditions or self.variants:
            return False
        return not self.watched or (self.listener is not None and not self.listener.watching)

    def _choose(self, inputs: Sequence[Any]) -> tuple[Variant | None, list[Any]]:
        """The variant that rests on most of how the inputs of a call were made, and the further inputs for it."""
        made, sizes = self._makers(inputs), values(self.symbols, inputs)
        second: tuple[Variant | None, list[Any]] | None = None
        for variant in self.variants:
            further = variant.further(made, sizes)
            if further is not None and variant.rests_on >= made.keys():
                return variant, further
            if further is not None and second is None:
                second = variant, further
        if made or self.base is None:
            with self.lock:
                if made and self._is_new(made, sizes):
                    new = self._add(made, inputs)
                    further = None if new is None else new.further(made, sizes)
                    if further is not None:
                        return new, further
                if second is not None:
                    return second
                if self.base is None and not self.hopeless:
                    self._add({}, ())
        if self.base is None or self.base.further(made, sizes) is None:
            return None, []
        return self.base, []

    @property
    def tried(self) -> int:
        """How many ways in which inputs were made a variant was tried for."""
        return len(self.variants) + len(self.refused) + self.misfits

    def _makers(self, inputs: Sequence[Any]) -> dict[int, Made]:
        """How inputs of a call were made, by position, where that is known."""
        return {i: origin for i in self.watched if isinstance(origin := origin_of(inputs[i]), Made)}

    def _is_new(self, made: Mapping[int, Made], sizes: Mapping[Any, int]) -> bool:
        """Whether inputs were made in a way that was not tried yet, and another one may be tried."""
        if self.tried >= VARIANTS:
            return False
        return all(continuation.given(made, sizes) is None for continuation in self.refused)

    def _add(self, made: dict[int, Made], inputs: Sequence[Any]) -> Variant | None:
        """Makes the variant for a call; the one that rests on nothing where nothing is known of its inputs."""
        try:
            return self._made(made, inputs)
        except Exception as error:
            self.misfits += 1
            self.hopeless = self.hopeless or not made
            self._failed("a graph cannot be rewritten", error)
            return None

    def _made(self, made: dict[int, Made], inputs: Sequence[Any]) -> Variant:
        assert self.functional is not None
        small = {i: o for i, o in made.items() if inputs[i].dim() < 3}
        for chosen in ([made] if made else []) + ([small] if small and len(small) < len(made) else []):
            continuation = continue_past(self.functional, chosen, inputs)
            if continuation is None:
                self.misfits += 1
                continue
            variant = self._variant(continuation.module, continuation)
            if variant is not None:
                self.variants.append(variant)
                return variant
            self.refused.append(continuation)
        if self.base is None:
            self.base = self._variant(self.functional, None)
            assert self.base is not None
        return self.base

    def _variant(self, module: GraphModule, continuation: Continuation | None) -> Variant | None:
        guards = _guards(module.graph.nodes, "val")
        before = len(guards)
        settings = self.settings
        if self.listener is not None:
            settings = replace(settings, elsewhere=self.listener.excluded)
        with _apart():
            done = rewrite_graph(module, settings, model=self.model, frontend="dynamo", clock=self.clock)
        self.clock = Clock()
        if not settle(done.module):
            return None
        conditions = () if torch._guards.TracingContext.try_get() else _conditions(guards[before:])
        run = self.original
        if any(site.status == "replaced" for site in done.report.sites) and not self.settings.dry_run:
            reuse(done.module)
            _return_tuple(done.module)
            run = self._callable(done.module)
        variant = Variant(run, done.report, done.facts, id(self), continuation, conditions, cut_short=done.cut_short)
        if self.listener is not None:
            self.listener.added(variant)
        return variant

    def _callable(self, module: GraphModule) -> Compiled:
        """The graph as Dynamo calls it: new values of mutated inputs, which come first, are written back."""
        fakes = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        forward = _called_directly(module) if self.finish is None else self.finish(module, fakes)
        targets = self.signature.written
        if not targets:
            return forward

        def run(*inputs: Any) -> tuple[Any, ...]:
            outputs: tuple[Any, ...] = forward(*inputs)
            for position, value in zip(targets, outputs, strict=False):
                aten.copy_.default(inputs[position], value)
            return tuple(outputs[len(targets) :])

        return run

    def _failed(self, what: str, error: Exception) -> None:
        reason = f"{what}: {type(error).__name__}: {first_sentences(error, 300)}"
        log.debug("%s", reason, exc_info=error)
        if self.listener is not None:  # who says it, and counts it
            self.listener.failed(reason)
        elif reason not in _logged:
            _logged.add(reason)
            log.warning("%s. The original code answers", reason)


def _return_tuple(module: GraphModule) -> None:
    """As Dynamo's graphs do; a checkpoint takes a list for something that has no gradient."""
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    output.args = (tuple(output.args[0]),)
    module.recompile()


def _called_directly(module: GraphModule) -> Compiled:
    """The graph with its ops called without the dispatcher, and the rest in the quickest way there is."""
    for node, op in list(op_nodes(module.graph)):
        given = {**dict(zip(op.arguments, node.args, strict=False)), **node.kwargs}
        calls = [
            n for n in (*op.tensors, *op.attributes) if any(isinstance(x, Node) for x in tree_leaves(given.get(n)))
        ]
        alone = op.outputs > 1 and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        node.target = direct(op, calls, {n: value for n, value in given.items() if n not in calls}, alone=alone)
        node.args, node.kwargs = tuple(given[n] for n in calls), {}
        for user in list(node.users) if alone else ():
            node.meta = dict(user.meta)
            user.replace_all_uses_with(node)
            module.graph.erase_node(user)
    compose(module)
    bind(module)
    forward: Compiled = module.forward
    return forward


_logged: set[str] = set()


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Apart from the call in whose middle a graph is made: its autocast, its checkpoint, its random numbers."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", accelerator.type if accelerator is not None else "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.device("cpu"))  # the default of constructors, which may have been changed
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        stack.enter_context(torch.random.fork_rng())
        yield


def _may_be_made(node: Node, placeholder: Node) -> bool:
    """Whether an input may be a mask or positions: no weight, and no activation that gradients flow from."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or node.meta.get("trains", False):
        return False
    return not isinstance(placeholder.meta.get("example_value"), torch.nn.Parameter)


def _examples(placeholders: Sequence[Node]) -> list[Any]:
    """The real inputs of the call for which Dynamo captures the graph; none where they are gone already."""
    try:
        return [_example(node) for node in placeholders]
    except Exception:
        return []


def _example(placeholder: Node) -> Any:
    """What is given for an input; of what another part of the graph makes, only the sizes."""
    arg = placeholder.meta.get("grapharg")
    value = placeholder.meta["example_value"] if arg is None else arg.example
    if isinstance(value, torch.SymInt):
        return value.node.hint  # int(value) would fix the size
    if arg is None and isinstance(value, torch.Tensor):
        sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta")
    return value


def _guards(nodes: Iterable[Node], value: str) -> list[Any]:
    """The guards on sizes so far, in a list that grows."""
    for node in nodes:
        found = node.meta.get(value)
        environment = getattr(getattr(found, "fake_mode", None), "shape_env", None)
        if environment is not None:
            guards: list[Any] = environment.guards
            return guards
    return []


def _conditions(guards: Sequence[Any]) -> Conditions:
    """Guards on sizes as questions about the sizes of a call."""

    def condition(expression: Any) -> Callable[[Mapping[Any, int]], bool]:
        return lambda sizes: bool(expression.subs(sizes) == sympy.true)

    return tuple(condition(guard.expr) for guard in guards)
