"""One check: the nodes to run for a site's masks, the sizes to run them at, and the comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_map

from kreg.rewriters.graph import STORED, is_tensor, shape_of, sized
from kreg.rewriters.mask_check.claims import CLOSE, conjunction, fused_causal, is_sound, kept, weights
from kreg.rewriters.mask_check.inputs import COMPUTED, KINDS, runs
from kreg.rewriters.mask_check.keeps import CPU, TOLD, Keeping
from kreg.rewriters.mask_check.nodes import attribute, blank, form, hollow, in_order, is_drawn, sources, values_of
from kreg.rewriters.mask_check.outcome import Checked, Difference, Misfit, NotRun
from kreg.rewriters.mask_check.sizes import Symbols, numbers, symbolic
from kreg.rewriters.site import Claim, Extent, Operand, Site

LARGEST = 2**26
"""Elements of the largest tensor that is made for a check."""

STRETCHED = 2**25
"""The same where a size is chosen only to reach past a window."""

CHEAP = 2**20
"""Up to so many elements each kind of drawn input is tried."""

TO_CHOOSE_FROM = 6
"""Of so many sizes that fit, the smallest is taken."""

STEPS = ("window", "chunk", "prefix", "offset", "ratio", "block")
"""Attributes that sizes have to pass to show."""

STILL = {"q": 0.0, "k": 1.0}
"""Operands that stand for any, where all that is added to their product is looked at, and what they are then."""

Sizes = Mapping[sympy.Symbol, int]
Claimed = Sequence[tuple[Claim, torch.Tensor]]
Compared = tuple[tuple[int, ...], str, Difference | None]
"""The shape that was compared, what is wrong in words, and where."""


class Task:
    """The nodes to run for a site's masks, in order, and the sizes to run them at."""

    def __init__(self, module: GraphModule, site: Site, keeping: Keeping) -> None:
        self.module, self.site, self.keeping = module, site, keeping
        self.claims = [claim for claim in site.claims if claim.operand is not None or claim.of == "causal"]
        self.adds = any(claim.of == "scores" for claim in self.claims)
        masking = (*keeping.inputs, "bias") if self.adds else keeping.inputs
        self.inputs = {name: site.operands[name] for name in masking if name in site.operands}
        self.others = {name: operand for name, operand in site.operands.items() if name not in self.inputs}
        self.drawn = {self.inputs[name].node: name for name in keeping.drawn if name in self.inputs}
        still = STILL.items() if self.adds else ()
        self.still = {node: value for name, value in still for node in values_of(site.operands[name])}
        compared = [*(claim.operand for claim in self.claims), *self.inputs.values()]
        operands = [operand for operand in compared if operand is not None]
        self.read = dict.fromkeys(node for operand in operands for node in values_of(operand))
        self.leaves: set[Node] = set()
        try:
            self.order = in_order(list(self.read), {**self.drawn, **self.still})
        except NotRun:  # the reading holds for any values of what it does not look into, so these may be drawn
            self.leaves = {leaf for claim in self.claims for leaf in claim.leaves} - {*self.drawn, *self.still}
            self.order = in_order(list(self.read), {*self.drawn, *self.still, *self.leaves})
        self.draws = any(node in self.drawn or self._is_input(node) for node in self.order)
        self.sized = list(dict.fromkeys(node for o in (*operands, *self.others.values()) for node in o.nodes))
        self.shapes = {shape_of(node): node.meta["val"].shape for node in self.order if is_tensor(node)}.values()
        self.key = self._key(operands)

    def _is_input(self, node: Node) -> bool:
        return node in self.leaves or (node not in self.still and is_drawn(self.module, node))

    def _key(self, operands: Sequence[Operand]) -> Any:
        """What the result depends on: the code that computes the masks, whichever layer it stands in."""
        names = {node: f"%{i}" for i, node in enumerate(self.order)}

        def named(argument: Any) -> Any:
            return str(map_arg(argument, lambda n: names.get(n) or form(n)))

        def part(argument: Any) -> Any:
            if isinstance(argument, Operand):
                node = argument.node
                return names.get(node, form(node)), [(str(target), part(args)) for target, args in argument.calls]
            if isinstance(argument, Extent):
                return sized(argument.node.meta["val"].shape[argument.dim])
            return [part(a) for a in argument] if isinstance(argument, (list, tuple)) else argument

        code: list[tuple[str, str]] = []
        for node in self.order:
            if node in self.drawn:
                code.append((self.drawn[node], form(node)))
            elif node in self.still:
                code.append((str(self.still[node]), form(node)))
            elif not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                code.append(("size", form(node)))
            elif node in self.leaves:
                code.append(("drawn", form(node)))
            elif node.op == "call_function":
                code.append((str(node.target), named((node.args, node.kwargs))))
            else:
                code.append((node.op, node.name))
        told = {n: form(v) if isinstance(v, Node) else v for n, v in self.site.attributes.items() if n in TOLD}
        shapes = [(name, form(operand.node), part(operand)) for name, operand in self.others.items()]
        claims = [(claim.of, claim.levels, claim.operand is None) for claim in self.site.claims]
        return str((self.site.op.name, told, [part(operand) for operand in operands], claims, shapes, code))

    def run(self) -> Checked:
        """Compares at every size that is found; of several choices of a size, at the first that runs."""
        partial = not self.adds and len(self.claims) < len(self.site.claims)
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
                        shape, wrong, difference = self._compare(sizes, kind)
                    except Misfit as error:
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
        given = [v for v in self.site.attributes.values() if isinstance(v, Node)]
        found = [s for node in (*self.order, *self.sized, *given) for s in symbolic(node.meta.get("val"))]
        if not found:
            yield [{}]
            return
        environment = found[0].node.shape_env
        symbols = Symbols(environment, set().union(*(s.node.expr.free_symbols for s in found)))
        steps = [self.site.attributes.get(name) for name in STEPS]
        reach = 3 + sum(abs(step) for step in steps if isinstance(step, int))
        yield [symbols.hints]
        small = list(islice(filter(self._agrees, symbols.choices()), TO_CHOOSE_FROM))
        yield sorted(small, key=self._largest)
        for symbol, hint in symbols.hints.items():
            past = [place for far in (2 * reach, reach, 2 * hint + 1) for place in (far, -(-far // 128) * 128)]
            beyond = chain.from_iterable(symbols.choices({symbol: place}) for place in past)
            yield (sizes for sizes in beyond if self._agrees(sizes) and self._largest(sizes) <= STRETCHED)

    def _agrees(self, sizes: Sizes) -> bool:
        """Whether the operands' sizes are the op's: queries and keys may come with symbols of their own."""
        try:
            self._dims(sizes)
        except ValueError:
            return False
        return True

    def _largest(self, sizes: Sizes) -> int:
        """Elements of the largest tensor on the way, the comparison's among them."""
        made: list[int] = [math.prod(numbers(shape, sizes)) for shape in self.shapes]
        dims = self._dims(sizes)
        return max([*made, dims["batch"] * dims["queries"] * dims["keys"]])

    def _dims(self, sizes: Sizes) -> dict[str, int]:
        dims: dict[str, int] = self.site.op.dims(self._shapes(sizes))
        return dims

    def _shapes(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        """The operands that the op does not mask with, by their shapes alone."""
        without = {node: blank(node, sizes) for operand in self.others.values() for node in operand.nodes}
        return {name: operand.value(without) for name, operand in self.others.items()}

    # ── values ────────────────────────────────────────────────────────────────────────────────────────────

    def _compare(self, sizes: Sizes, kind: int) -> Compared:
        shapes, dims = self._shapes(sizes), self._dims(sizes)
        values: dict[Node, Any] = {node: blank(node, sizes) for node in self.sized}
        told = {name: self._number(value, sizes) for name, value in self.site.attributes.items()}
        values |= self._computed(sizes, kind, shapes | told)
        try:
            tensors = [(claim, claim.operand.value(values)) for claim in self.claims if claim.operand is not None]
            given = shapes | {name: operand.value(values) for name, operand in self.inputs.items()}
            try:
                op = self.keeping.keeps(given, told | dims, dims["queries"], dims["keys"])
            except ValueError as error:
                return (dims["batch"], 1, dims["queries"], dims["keys"]), str(error), None
            shape, wrong, difference = self._kept(tensors, op, dims)
            added = [value for claim, value in tensors if claim.of == "scores"]
            return (shape, wrong, difference) if wrong or not added else self._weighed(added[0], given, op)
        except RuntimeError as error:
            raise Misfit(f"the masks' sizes do not agree: {_line(error)}") from error

    def _kept(
        self, tensors: Sequence[tuple[Claim, torch.Tensor]], op: torch.Tensor, dims: Mapping[str, int]
    ) -> Compared:
        """Which keys are kept, by the model's masks and by the op."""
        originals = [(claim, value) for claim, value in tensors if claim.of == "keys"]
        causal = [fused_causal(dims["queries"], dims["keys"])] if any(c.of == "causal" for c in self.claims) else []
        model = conjunction([*causal, *(kept(claim, value) for claim, value in originals)])
        sound = conjunction([is_sound(claim, value) for claim, value in originals])
        model, op, sound = torch.broadcast_tensors(model, op, sound)
        known = all(claim.of == "scores" or claim in self.claims for claim in self.site.claims)
        wrong = (op ^ model if known else op & ~model) | ~sound
        shape = tuple(wrong.shape)
        if not bool(wrong.any()):
            return shape, "", None
        b, h, s, t = at = _first(wrong)
        added = [float(value.expand(shape)[at]) for claim, value in originals if claim.levels]
        found: float | bool = next((value for value in added if value != 0), bool(model[at]))
        difference = Difference(b, h, s, t, model=found, op=bool(op[at]), shape=shape)
        return shape, str(difference), difference

    def _weighed(self, added: torch.Tensor, given: Mapping[str, torch.Tensor], op: torch.Tensor) -> Compared:
        """What keys weigh beside each other, by all that the model adds and by the op's bias and masks."""
        if bool(added.isnan().any()):
            raise Misfit("what is added to the scores is no number where the queries are 0")
        bias = given.get("bias", torch.zeros(1, 1, 1, 1)).float()
        bias, op, added = torch.broadcast_tensors(bias, op, added.float())
        model, mine = weights(added, bias.masked_fill(~op, -torch.inf))
        wrong = (model - mine).abs() > CLOSE
        shape = tuple(wrong.shape)
        if not bool(wrong.any()):
            return shape, "", None
        b, h, s, t = at = _first(wrong)
        difference = Difference(b, h, s, t, model=float(model[at]), op=float(mine[at]), shape=shape)
        return shape, str(difference), difference

    def _computed(self, sizes: Sizes, kind: int, arguments: Mapping[str, Any]) -> dict[Node, Any]:
        """The values of the nodes that are read, the others freed as soon as they are used up.

        ``arguments`` are those of the op that are known before anything is drawn, tensors by their shapes alone.
        """
        generator = torch.Generator().manual_seed(kind)
        given = {*self.drawn, *self.still, *self.leaves}
        waiting = Counter(source for node in self.order if node not in given for source in sources(node))
        values: dict[Node, Any] = {}
        drawn = 0
        for node in self.order:
            if node in given or self._is_input(node):
                shape, dtype = numbers(node.meta["val"].shape, sizes), node.meta["val"].dtype
            if node in self.still:
                values[node] = torch.full(shape, self.still[node], dtype=dtype)
            elif node in self.drawn:
                fill = self.site.op.fill.get(self.drawn[node])
                values[node] = fill(shape, dtype, generator, arguments) if fill else runs(shape, dtype, generator)
            elif self._is_input(node):
                kinds = COMPUTED if node in self.leaves else KINDS
                values[node] = kinds[(kind + drawn) % len(kinds)](shape, dtype, generator)
                drawn += 1
            else:
                values[node] = self._value(node, values, sizes)
            for source in sources(node) if node not in given else ():
                waiting[source] -= 1
                if not waiting[source] and source not in self.read:
                    del values[source]
        return values

    def _value(self, node: Node, values: Mapping[Node, Any], sizes: Sizes) -> Any:
        if STORED in node.meta:
            return node.meta[STORED].detach().to(CPU)
        if node.op == "get_attr":
            return attribute(self.module, node).detach().to(CPU)
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return self._number(node, sizes)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else hollow(n, sizes))
        args, kwargs = tree_map(lambda a: CPU if isinstance(a, torch.device) else a, (args, kwargs))
        try:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError) as error:
            raise Misfit(f"the mask does not run on what was drawn: {node.name}: {_line(error)}") from error
        if isinstance(value, torch.Tensor) and value.shape != numbers(node.meta["val"].shape, sizes):
            raise Misfit(f"the mask does not run at other sizes: {node.name} has another shape")
        return value

    @staticmethod
    def _number(value: Any, sizes: Sizes) -> Any:
        return numbers((value.meta["val"] if isinstance(value, Node) else value,), sizes)[0]


def _first(wrong: torch.Tensor) -> tuple[int, int, int, int]:
    b, h, s, t = (int(i) for i in torch.unravel_index(wrong.flatten().to(torch.uint8).argmax(), wrong.shape))
    return b, h, s, t


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
