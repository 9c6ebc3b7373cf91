"""The second check of a mask: what the model masks with, run at several sizes, against what the op keeps.

The first check reads the mask as index notation. This one knows no notation: it runs the captured nodes in plain
PyTorch, on inputs drawn to look like masks, positions and documents, and compares element by element.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_leaves, tree_map

from kreg.registry.ops import ATTENTION, SPARSE_ATTENTION
from kreg.registry.ops.attention import band, documents_of_queries
from kreg.registry.ops.sparse_attention import ready, selection
from kreg.rewriters.graph import STORED, aten, is_tensor, shape_of, sized
from kreg.rewriters.masks import NEGLIGIBLE
from kreg.rewriters.site import Claim, Extent, Operand, Site

log = logging.getLogger("kreg")

NODES = 600
"""A mask that more nodes compute depends on more than masks, positions and documents."""

LARGEST = 2**26
"""Elements of the largest tensor that is made for a check."""

STRETCHED = 2**25
"""The same where a size is chosen only to reach past a window."""

CHEAP = 2**20
"""Up to so many elements each kind of drawn input is tried."""

SMALL = (5, 7, 9, 11, 13, 6, 8, 10)
ROUND = (24, 32, 48, 64, 80, 96, 128, 256, 384)
"""Sizes to choose from; round ones where a graph asks for multiples of something."""

TRIES = 150
"""Random choices of sizes, until one fits the graph's guards."""

TO_CHOOSE_FROM = 6
"""Of so many that fit, the smallest is taken."""


@dataclass(frozen=True)
class Difference:
    """A key of a query about which model and op disagree."""

    batch: int
    head: int
    query: int
    key: int
    model: float | bool
    op: bool
    shape: tuple[int, ...]

    def __str__(self) -> str:
        model = str(self.model) if isinstance(self.model, float) else _word(self.model)
        sizes = "x".join(map(str, self.shape))
        return (
            f"key {self.key} of query {self.query} is {model} in the model and {_word(self.op)} by the op "
            f"(batch {self.batch}, head {self.head}, of {sizes})"
        )


def _word(kept: bool) -> str:
    return "kept" if kept else "masked"


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        passed: None where it was not run.
        reason: why it was not run, or what is wrong.
        shapes: [batch, heads, queries, keys] that were compared.
        difference: the first one found.
        partial: some of the model's masks have no tensor; only what the others mask was compared.
    """

    passed: bool | None
    reason: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    difference: Difference | None = None
    partial: bool = False


class NotRun(Exception):
    """Why a mask cannot be checked, in words."""


class _Misfit(Exception):
    """Sizes or inputs that the captured code does not take."""


# ── what an op keeps, by its own helpers ──────────────────────────────────────────────────────────────────────

Tensors = Mapping[str, torch.Tensor]
Told = Mapping[str, Any]
CPU = torch.device("cpu")
BAND = ("causal", "window", "chunk", "prefix", "offset")


def _attention_keeps(given: Tensors, told: Told, queries: int, keys: int) -> torch.Tensor:
    kept = band(queries, keys, device=CPU, **{name: told[name] for name in BAND})
    kept = torch.ones(1, 1, dtype=torch.bool) if kept is None else kept
    kept = kept[None, None]
    if "padding" in given:
        kept = kept & given["padding"][:, None, None, :]
    if "documents" in given:
        documents = given["documents"]
        of_queries = documents_of_queries(documents, queries, told["offset"])
        kept = kept & (of_queries[:, None, :, None] == documents[:, None, None, :])
    return kept & given["mask"] if "mask" in given else kept


def _sparse_keeps(given: Tensors, told: Told, queries: int, keys: int) -> torch.Tensor:
    kept = band(queries, keys, causal=True, window=told["window"], offset=told["offset"], device=CPU)
    assert kept is not None
    kept = kept[None]
    if "padding" in given:
        kept = kept & given["padding"][:, None, :]
    if "compressed" in given:
        entries = given["compressed"].shape[1]
        seen = ready(queries, entries, ratio=told["ratio"], offset=told["offset"], device=CPU)[None]
        if "indices" in given:
            seen = selection(given["indices"], entries)
        batch = max(len(kept), len(seen))
        kept = torch.cat([kept.expand(batch, -1, -1), seen.expand(batch, -1, -1)], dim=-1)
    return kept[:, None]


@dataclass(frozen=True)
class Keeping:
    """How an op masks.

    Attributes:
        inputs: the operands that it masks with.
        drawn: those of them that are drawn, not computed: the op that made them vouches for their values.
        keeps: which keys it keeps, from those operands, its attributes, and the number of queries and keys.
    """

    inputs: tuple[str, ...]
    drawn: tuple[str, ...]
    keeps: Callable[[Tensors, Told, int, int], torch.Tensor]


OPS = {
    ATTENTION.name: Keeping(("mask", "padding", "documents"), (), _attention_keeps),
    SPARSE_ATTENTION.name: Keeping(("padding", "indices"), ("indices",), _sparse_keeps),
}


# ── the check ─────────────────────────────────────────────────────────────────────────────────────────────────

_checked: WeakKeyDictionary[GraphModule, dict[Any, Checked]] = WeakKeyDictionary()
"""Layers share their masks: what was found of one holds for all whose masks are computed by the same code."""


def check(module: GraphModule, site: Site) -> Checked:
    """Holds what a site's op keeps against what the captured code masks with; once for all sites that mask alike."""
    keeping = OPS.get(site.op.name)
    if keeping is None or not site.claims:
        return Checked(None, "there is no mask" if keeping else f"{site.op.name} is not checked")
    if all(claim.operand is None for claim in site.claims):
        return Checked(None, "the mask has no tensor of its own")
    try:
        task = _Task(module, site, keeping)
        known = _checked.setdefault(module, {})
        if task.key not in known:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                known[task.key] = task.run()
        return known[task.key]
    except NotRun as reason:
        return Checked(None, str(reason))
    except Exception as error:  # a check that breaks proves nothing, and must not take the model with it
        log.debug("the mask of %s could not be checked", site.id, exc_info=True)
        return Checked(None, f"the check itself failed with {type(error).__name__}: {error}")


class _Task:
    """The nodes to run for a site's masks, in order, and the sizes to run them at."""

    def __init__(self, module: GraphModule, site: Site, keeping: Keeping) -> None:
        self.module, self.site, self.keeping = module, site, keeping
        self.claims = [claim for claim in site.claims if claim.operand is not None]
        self.inputs = {name: site.operands[name] for name in keeping.inputs if name in site.operands}
        self.others = {name: operand for name, operand in site.operands.items() if name not in self.inputs}
        self.drawn = {self.inputs[name].node: name for name in keeping.drawn if name in self.inputs}
        compared = [*(claim.operand for claim in self.claims), *self.inputs.values()]
        operands = [operand for operand in compared if operand is not None]
        self.read = dict.fromkeys(node for operand in operands for node in _values_of(operand))
        try:
            self.order = _in_order(list(self.read), self.drawn)
        except NotRun:  # what the op takes as tensors may as well be drawn: the rest of the mask is beside it
            self.drawn = {node: name for name, operand in self.inputs.items() for node in _values_of(operand)}
            self.order = _in_order(list(self.read), self.drawn)
        self.draws = any(node in self.drawn or _is_drawn(module, node) for node in self.order)
        self.sized = list(dict.fromkeys(node for o in (*operands, *self.others.values()) for node in o.nodes))
        self.shapes = {shape_of(node): node.meta["val"].shape for node in self.order if is_tensor(node)}.values()
        self.key = self._key(operands)

    def _key(self, operands: Sequence[Operand]) -> Any:
        """What the result depends on: the code that computes the masks, whichever layer it stands in."""
        names = {node: f"%{i}" for i, node in enumerate(self.order)}

        def named(argument: Any) -> Any:
            return str(map_arg(argument, lambda n: names.get(n) or _shape(n)))

        def part(argument: Any) -> Any:
            if isinstance(argument, Operand):
                node = argument.node
                return names.get(node, _shape(node)), [(str(target), part(args)) for target, args in argument.calls]
            if isinstance(argument, Extent):
                return sized(argument.node.meta["val"].shape[argument.dim])
            return [part(a) for a in argument] if isinstance(argument, (list, tuple)) else argument

        code: list[tuple[str, str]] = []
        for node in self.order:
            if node in self.drawn:
                code.append((self.drawn[node], _shape(node)))
            elif not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                code.append(("size", _shape(node)))
            elif node.op == "call_function":
                code.append((str(node.target), named((node.args, node.kwargs))))
            else:
                code.append((node.op, node.name))
        told = {n: _shape(v) if isinstance(v, Node) else v for n, v in self.site.attributes.items() if n in TOLD}
        shapes = [(name, _shape(operand.node)) for name, operand in self.others.items()]
        levels = [claim.levels for claim in self.site.claims]
        return str((self.site.op.name, told, [part(operand) for operand in operands], levels, shapes, code))

    def run(self) -> Checked:
        """Compares at every size that is found; of several choices of a size, at the first that runs."""
        partial = len(self.claims) < len(self.site.claims)
        shapes: list[tuple[int, ...]] = []
        refusal = "no sizes fit the guards of the graph"
        for choices in self._sizes():
            before = len(shapes)
            for sizes in choices:
                count = self._largest(sizes)
                if count > LARGEST:
                    refusal = f"a tensor of {count / 2**20:.0f} million elements is needed"
                    continue
                for kind in range(len(KINDS) if self.draws and count <= CHEAP else 1):
                    try:
                        shape, wrong, difference = self._compare(sizes, kind, partial)
                    except _Misfit as error:
                        refusal = str(error)
                        continue
                    shapes.append(shape)
                    if wrong:
                        return Checked(False, self._told(wrong), tuple(shapes), difference, partial)
                if len(shapes) > before:
                    break
        if not shapes:
            raise NotRun(refusal)
        return Checked(True, shapes=tuple(shapes), partial=partial)

    def _told(self, wrong: str) -> str:
        mask = self.site.mask.to_json() if self.site.mask else {}
        kind, facts = mask.pop("kind", "a mask"), ", ".join(f"{name} {value}" for name, value in mask.items())
        return f"the mask was read as {kind}{f' ({facts})' if facts else ''}, but {wrong}"

    # ── sizes ─────────────────────────────────────────────────────────────────────────────────────────────

    def _sizes(self) -> Iterator[Iterable[dict[sympy.Symbol, int]]]:
        """Choices of the example's sizes, of small odd ones, and for each symbol of some that pass every window."""
        numbers = [v for v in self.site.attributes.values() if isinstance(v, Node)]
        found = [s for node in (*self.order, *self.sized, *numbers) for s in _symbolic(node.meta.get("val"))]
        if not found:
            yield [{}]
            return
        environment = found[0].node.shape_env
        symbols = _Symbols(environment, set().union(*(s.node.expr.free_symbols for s in found)))
        steps = [self.site.attributes.get(name) for name in ("window", "chunk", "prefix", "offset", "ratio")]
        reach = 3 + sum(abs(step) for step in steps if isinstance(step, int))
        yield [symbols.hints]
        small = list(islice(filter(self._agrees, symbols.choices()), TO_CHOOSE_FROM))
        yield sorted(small, key=self._largest)
        for symbol, hint in symbols.hints.items():
            past = [place for far in (2 * reach, reach, 2 * hint + 1) for place in (far, -(-far // 128) * 128)]
            beyond = chain.from_iterable(symbols.choices({symbol: place}) for place in past)
            yield (sizes for sizes in beyond if self._agrees(sizes) and self._largest(sizes) <= STRETCHED)

    def _agrees(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the operands' sizes are the op's: queries and keys may come with symbols of their own."""
        try:
            self._dims(sizes)
        except ValueError:
            return False
        return True

    def _largest(self, sizes: Mapping[sympy.Symbol, int]) -> int:
        """Elements of the largest tensor on the way, the comparison's among them."""
        made: list[int] = [math.prod(_numbers(shape, sizes)) for shape in self.shapes]
        dims = self._dims(sizes)
        return max([*made, dims["batch"] * dims["queries"] * dims["keys"]])

    def _dims(self, sizes: Mapping[sympy.Symbol, int]) -> dict[str, int]:
        dims: dict[str, int] = self.site.op.dims(self._shapes(sizes))
        return dims

    def _shapes(self, sizes: Mapping[sympy.Symbol, int]) -> dict[str, torch.Tensor]:
        """The operands that the op does not mask with, by their shapes alone."""
        blank = {node: _blank(node, sizes) for operand in self.others.values() for node in operand.nodes}
        return {name: operand.value(blank) for name, operand in self.others.items()}

    # ── values ────────────────────────────────────────────────────────────────────────────────────────────

    def _compare(
        self, sizes: Mapping[sympy.Symbol, int], kind: int, partial: bool
    ) -> tuple[tuple[int, ...], str, Difference | None]:
        """The shape that was compared, what is wrong in words, and where."""
        shapes = self._shapes(sizes)
        values: dict[Node, Any] = {node: _blank(node, sizes) for node in self.sized}
        values |= self._computed(sizes, kind, shapes)
        dims = self._dims(sizes)
        told = {name: self._number(value, sizes) for name, value in self.site.attributes.items()}
        try:
            originals = [(claim, claim.operand.value(values)) for claim in self.claims if claim.operand]
            model = _conjunction([_kept(claim, value) for claim, value in originals])
            sound = _conjunction([_is_sound(claim, value) for claim, value in originals])
            given = shapes | {name: operand.value(values) for name, operand in self.inputs.items()}
        except RuntimeError as error:
            raise _Misfit(f"the masks' sizes do not agree: {_line(error)}") from error
        try:
            op = self.keeping.keeps(given, told, dims["queries"], dims["keys"])
        except ValueError as error:
            return (dims["batch"], 1, dims["queries"], dims["keys"]), str(error), None
        try:
            model, op, sound = torch.broadcast_tensors(model, op, sound)
        except RuntimeError as error:
            raise _Misfit(f"the masks' sizes do not agree: {_line(error)}") from error
        wrong = (op & ~model if partial else op ^ model) | ~sound
        shape = tuple(wrong.shape)
        if not bool(wrong.any()):
            return shape, "", None
        b, h, s, t = (int(i) for i in torch.unravel_index(wrong.flatten().to(torch.uint8).argmax(), shape))
        added = [float(value.expand(shape)[b, h, s, t]) for claim, value in originals if claim.levels]
        found: float | bool = next((value for value in added if value != 0), bool(model[b, h, s, t]))
        difference = Difference(b, h, s, t, model=found, op=bool(op[b, h, s, t]), shape=shape)
        return shape, str(difference), difference

    def _computed(
        self, sizes: Mapping[sympy.Symbol, int], kind: int, shapes: Mapping[str, torch.Tensor]
    ) -> dict[Node, Any]:
        """The values of the nodes that are read, the others freed as soon as they are used up."""
        generator = torch.Generator().manual_seed(kind)
        waiting = Counter(source for node in self.order if node not in self.drawn for source in _sources(node))
        values: dict[Node, Any] = {}
        drawn = 0
        for node in self.order:
            if node in self.drawn:
                name = self.drawn[node]
                shape, dtype = _numbers(node.meta["val"].shape, sizes), node.meta["val"].dtype
                fill = self.site.op.fill.get(name)
                values[node] = fill(shape, dtype, generator, shapes) if fill else _runs(shape, dtype, generator)
            elif _is_drawn(self.module, node):
                shape, dtype = _numbers(node.meta["val"].shape, sizes), node.meta["val"].dtype
                values[node] = KINDS[(kind + drawn) % len(KINDS)](shape, dtype, generator)
                drawn += 1
            else:
                values[node] = self._value(node, values, sizes)
            for source in _sources(node) if node not in self.drawn else ():
                waiting[source] -= 1
                if not waiting[source] and source not in self.read:
                    del values[source]
        return values

    def _value(self, node: Node, values: Mapping[Node, Any], sizes: Mapping[sympy.Symbol, int]) -> Any:
        if STORED in node.meta:
            return node.meta[STORED].detach().to(CPU)
        if node.op == "get_attr":
            return _attribute(self.module, node).detach().to(CPU)
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return self._number(node, sizes)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else _hollow(n, sizes))
        args, kwargs = tree_map(lambda a: CPU if isinstance(a, torch.device) else a, (args, kwargs))
        try:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError) as error:
            raise _Misfit(f"the mask does not run on what was drawn: {node.name}: {_line(error)}") from error
        if isinstance(value, torch.Tensor) and value.shape != _numbers(node.meta["val"].shape, sizes):
            raise _Misfit(f"the mask does not run at other sizes: {node.name} has another shape")
        return value

    @staticmethod
    def _number(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
        return _numbers((value.meta["val"] if isinstance(value, Node) else value,), sizes)[0]


TOLD = frozenset({*BAND, "ratio"})


def _kept(claim: Claim, value: torch.Tensor) -> torch.Tensor:
    return value == 0 if claim.levels else value.bool()


def _is_sound(claim: Claim, value: torch.Tensor) -> torch.Tensor:
    """Whether what is added is 0, or no less negligible than what was read; half of it leaves room for rounding."""
    if not claim.levels:
        return torch.ones((), dtype=torch.bool)
    least = max((level for level in claim.levels if level < 0), default=NEGLIGIBLE)
    return (value == 0) | (value <= least / 2)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _conjunction(conditions: Sequence[torch.Tensor]) -> torch.Tensor:
    first, *others = conditions
    for other in others:
        first = first & other
    return first


# ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_order(wanted: Sequence[Node], stops: Mapping[Node, str]) -> list[Node]:
    """What is needed to compute some nodes, sources first.

    Raises:
        NotRun: too much.
    """
    order: dict[Node, None] = {}
    entered: set[Node] = set()
    pending = list(reversed(wanted))
    while pending:
        node = pending[-1]
        if node in entered or node in stops:
            order[pending.pop()] = None  # a second time changes nothing
            continue
        entered.add(node)
        if len(entered) > NODES:
            raise NotRun(f"the mask is computed by more than {NODES} nodes")
        pending.extend(source for source in reversed(_sources(node)) if source not in order)
    return list(order)


LIKE = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 0,
    aten.full_like.default: 0,
    aten.empty_like.default: 0,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 0,
    aten.new_full.default: 0,
    aten.new_empty.default: 0,
    aten.expand_as.default: 1,
    aten.view_as.default: 1,
    aten.type_as.default: 1,
    aten.to.other: 1,
}
"""Operators with an argument of which the shape or the dtype is taken, not the value; and which one."""


def _sources(node: Node) -> list[Node]:
    """The nodes whose values a node is computed from; sizes are known without their tensors."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return []
    if node.target not in LIKE:
        return node.all_input_nodes
    like = node.args[LIKE[node.target]]
    rest = [argument for argument in tree_leaves((node.args, node.kwargs)) if argument is not like]
    return list(dict.fromkeys(argument for argument in rest if isinstance(argument, Node)))


def _hollow(node: Node, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """A stand-in for a value of which only shape and dtype are asked."""
    value = node.meta["val"]
    return torch.zeros((), dtype=value.dtype).expand(_numbers(value.shape, sizes))


def _values_of(operand: Operand) -> Iterator[Node]:
    """The nodes whose values an operand is made of; of the others it takes the sizes."""
    yield operand.node
    for part in tree_leaves([args for _, args in operand.calls]):
        if isinstance(part, Operand):
            yield from _values_of(part)


def _is_drawn(module: GraphModule, node: Node) -> bool:
    """Whether a node is an input without a known value."""
    if STORED in node.meta or not is_tensor(node):
        return False
    return node.op == "placeholder" or (node.op == "get_attr" and _attribute(module, node) is None)


def _attribute(module: GraphModule, node: Node) -> Any:
    """A tensor of the graph's module; None where it is fake, and stands for any."""
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    is_real = isinstance(value, torch.Tensor) and not value.is_meta and not hasattr(value, "fake_mode")
    return value if is_real else None


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{list(map(sized, value.shape))}" if isinstance(value, torch.Tensor) else str(value)


def _blank(node: Node, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(_numbers(value.shape, sizes), dtype=value.dtype, device="meta")


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _symbolic(value: Any) -> list[Any]:
    """The symbolic sizes of a value."""
    values = list(value.shape) if isinstance(value, torch.Tensor) else [value]
    return [s for s in values if isinstance(s, torch.SymInt) and not s.node.expr.is_Integer]


def _numbers(values: Sequence[Any], sizes: Mapping[sympy.Symbol, int]) -> tuple[Any, ...]:
    """Sizes, or values made of sizes, as numbers."""
    numbers: list[Any] = []
    for value in values:
        if isinstance(value, torch.SymInt):
            numbers.append(int(value.node.expr.xreplace(dict(sizes))))
        elif isinstance(value, (torch.SymFloat, torch.SymBool)):
            numbers.append(value.node.expr.xreplace(sizes))
        else:
            numbers.append(value)
    return tuple(numbers)


class _Symbols:
    """Numbers for symbolic sizes, within what the graph's guards allow."""

    def __init__(self, environment: Any, needed: set[sympy.Symbol]) -> None:
        known = environment.backed_var_to_val
        if not needed <= known.keys():
            raise NotRun("a size depends on data")
        guards = [environment.replace(guard.expr) for guard in environment.guards]
        symbols = needed | {s for guard in guards for s in guard.free_symbols if s in known}
        self.hints = {s: int(known[s]) for s in sorted(symbols, key=str)}
        self.ranges = {s: environment.var_to_range[s] for s in self.hints}
        self.guards = guards

    def choices(self, fixed: Mapping[sympy.Symbol, int] = MappingProxyType({})) -> Iterator[dict[sympy.Symbol, int]]:
        """Choices of numbers, small ones first: all different, then few different ones, for some have to be equal."""
        generator = random.Random(0)
        free = {s: hint for s, hint in self.hints.items() if s not in fixed}
        for attempt in range(TRIES):
            if attempt < TRIES // 3 and len(free) <= len(SMALL):
                sizes = dict(zip(free, generator.sample(SMALL, k=len(free)), strict=True))
            elif attempt < 2 * TRIES // 3:
                pool = [generator.choice(SMALL), *fixed.values()]
                sizes = {s: generator.choice(pool) for s in free}
            else:
                pool = [generator.choice(SMALL), generator.choice(ROUND), *fixed.values()]
                sizes = {s: generator.choice((*pool, hint, 2 * hint)) for s, hint in free.items()}
            sizes |= fixed
            if self._fits(sizes):
                yield sizes

    def _fits(self, sizes: dict[sympy.Symbol, int]) -> bool:
        inside = all(self.ranges[s].lower <= number <= self.ranges[s].upper for s, number in sizes.items())
        if not inside:
            return False
        for place, guard in enumerate(self.guards):
            if guard.xreplace(sizes) is sympy.false:
                self.guards.insert(0, self.guards.pop(place))  # what failed once is asked first
                return False
        return True


# ── inputs ────────────────────────────────────────────────────────────────────────────────────────────────────


def _runs(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """1 but for runs of padding, on the left, the right or both; and a row with holes."""
    length = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    first, last = (torch.randint(0, length + 1, (rows, 1), generator=generator) for _ in range(2))
    side = torch.randint(0, 4, (rows, 1), generator=generator)
    place = torch.arange(length)
    left, right = place >= first // 2, place < length - last // 2
    holes = torch.rand(rows, length, generator=generator) < 0.7
    kept = torch.where(side == 0, left, torch.where(side == 1, right, torch.where(side == 2, left & right, holes)))
    return kept.reshape(shape).to(dtype)


def _documents(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Numbers of documents that lie one after the other."""
    return (torch.rand(shape, generator=generator) < 0.3).long().cumsum(-1).to(dtype) if shape else _one(dtype)


def _positions(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Positions that start again at 0 with each document."""
    if not shape:
        return _one(dtype)
    place = torch.arange(shape[-1]).expand(shape)
    starts = torch.rand(shape, generator=generator) < 0.3
    return (place - (place * starts).cummax(-1).values).to(dtype)


def _one(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((), dtype=dtype)


def _unless_boolean(kind: Kind) -> Kind:
    def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return (_runs if dtype is torch.bool or dtype.is_floating_point else kind)(shape, dtype, generator)

    return draw


Kind = Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor]
KINDS: tuple[Kind, ...] = (_runs, _unless_boolean(_positions), _unless_boolean(_documents))
"""What an input of a mask may look like; each input is drawn as each of them in turn."""
