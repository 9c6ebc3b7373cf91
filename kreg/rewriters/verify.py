"""Verification: each site old against new, on fresh random inputs, with float64 as the judge."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from kreg.registry.op import normal
from kreg.rewriters import mask_check
from kreg.rewriters.graph import STORED, aten
from kreg.rewriters.mask_check.inputs import positions
from kreg.rewriters.mask_check.nodes import hollow, sources
from kreg.rewriters.raising import emit
from kreg.rewriters.report import Verification
from kreg.rewriters.site import Operand, Site
from kreg.rewriters.sizes import Sizes

log = logging.getLogger("kreg")

CPU = torch.device("cpu")

LARGEST = 2**31
"""Bytes of the largest float64 tensor that the original code may need for a site to be verified."""

Values = dict[Node, Any]


@dataclass(frozen=True)
class Outcome:
    """The result of verifying a site, or the reason why it could not be done."""

    result: Verification | None
    reason: str


def verify(module: GraphModule, site: Site, kernel: str, trains: bool, seed: int = 0, device: str = "cpu") -> Outcome:
    """Runs the captured code of a site against its op with a kernel, forward and, if it trains, backward.

    The op runs on ``device``. The captured code, which is the judge, runs on the CPU: not every device has float64.
    """
    if (masked := mask_check.check(module, site)).passed is False:
        return Outcome(Verification(passed=False, max_error=math.inf), masked.reason)
    try:
        sizes = Sizes(module.graph, _sized(site))
        inner = _computed([*(o.node for o in site.outputs), *_following(site)], _stops(site))
        largest = max((sizes.count(node) for node in inner), default=0) * 8
        if largest > LARGEST:
            return Outcome(None, f"not verified: the original code needs a tensor of {largest / 2**30:.1f} GiB")
        generator = torch.Generator().manual_seed(seed)
        values = _followed(site, sizes, generator)
        values = _draw(site, inner, sizes, generator, values)
        old = _old(site, [output.node for output in site.outputs], inner, sizes)
        new = _new(site, kernel, sizes, device)
        with torch.random.fork_rng(devices=[]):
            return _compare(site, old, new, values, trains, generator)
    except Exception as error:
        log.debug("verification of %s failed", site.id, exc_info=True)
        message = " ".join(str(error).split())[:200]
        return Outcome(
            Verification(passed=False, max_error=math.inf),
            f"verification failed with {type(error).__name__}: {message}",
        )


def _stops(site: Site) -> set[Node]:
    parts = [part for operand in site.operands.values() for part in operand.parts if not part.follows]
    return {node for part in parts for node in (part.node, *part.same)}


def _computed(outputs: list[Node], stops: set[Node]) -> list[Node]:
    """The nodes whose values outputs are computed of, up to ``stops``.

    What gives another node its shape or dtype alone is none of them: behind ``type_as`` may lie all layers before.
    """
    found: dict[Node, None] = {}
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in found and node not in stops:
            found[node] = None
            pending.extend(sources(node))
    return list(found)


def _sized(site: Site) -> set[Node]:
    """The nodes whose sizes verification needs."""
    stops = _stops(site)
    numbers = {value for value in site.attributes.values() if isinstance(value, Node)}
    return {*_computed([output.node for output in site.outputs], stops), *stops, *numbers}


def _following(site: Site) -> list[Node]:
    """Operands that are made of what the captured code reads: drawn by themselves, they would contradict it."""
    return [part.node for operand in site.operands.values() for part in operand.parts if part.follows]


def _followed(site: Site, sizes: Sizes, generator: torch.Generator) -> Values:
    """Those operands' values, and those of the inputs they are made of: integers are drawn as positions."""
    following = _following(site)
    if not following:
        return {}
    values: Values = {}
    region = _computed(following, _stops(site))
    for node in region:
        if _is_input(node):
            stored, dtype = node.meta.get(STORED), node.meta["val"].dtype
            draw = _noise if dtype is torch.bool or dtype.is_floating_point else positions
            values[node] = (
                draw(sizes.shape(node), dtype, generator) if stored is None else stored.detach().to(CPU, copy=True)
            )
    results = _old(site, following, region, sizes)(values)
    return values | dict(zip(following, results, strict=True))


def _draw(site: Site, inner: list[Node], sizes: Sizes, generator: torch.Generator, known: Values) -> Values:
    """Random inputs: operands by their op's rules, whatever else the captured code reads as plain noise."""
    values = dict(known)
    drawn: dict[str, Any] = {name: v for name, v in site.attributes.items() if not isinstance(v, Node)}
    for name, operand in site.operands.items():
        node = operand.node
        if node not in values and STORED in node.meta:
            values[node] = node.meta[STORED].detach().to(CPU, copy=True)
        elif node not in values:
            shape, dtype = sizes.shape(node), node.meta["val"].dtype
            fill = site.op.fill.get(name)
            if fill is not None:
                values[node] = fill(shape, dtype, generator, drawn)
            else:
                values[node] = _noise(shape, dtype, generator, operand.levels)
        for part in operand.parts:
            if part.node not in values and STORED in part.node.meta:
                values[part.node] = part.node.meta[STORED].detach().to(CPU, copy=True)
            elif part.node not in values:
                shape, dtype = sizes.shape(part.node), part.node.meta["val"].dtype
                values[part.node] = _noise(shape, dtype, generator, part.levels)
            if not part.follows:
                values |= dict.fromkeys(part.same, values[part.node])
        values |= _mostly_kept(operand, values)
        drawn[name] = operand.value(values)
    for node in inner:
        if _is_input(node) and node not in values:
            stored = node.meta.get(STORED)
            shape, dtype = sizes.shape(node), node.meta["val"].dtype
            values[node] = _noise(shape, dtype, generator) if stored is None else stored.detach().to(CPU, copy=True)
    return values


def _mostly_kept(operand: Operand, values: Values) -> Values:
    """Drawn conditions turned round where the operand is then true in more places: else several leave nothing over."""
    found: Values = {}
    for part in operand.parts:
        value = values[part.node]
        if value.dtype is not torch.bool or STORED in part.node.meta or part.follows:
            continue
        turned = dict.fromkeys((part.node, *part.same), ~value)
        as_drawn, other = (operand.value(values | found | more) for more in ({}, turned))
        if as_drawn.dtype is torch.bool and int(other.sum()) > int(as_drawn.sum()):
            found |= turned
    return found


def _is_input(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr") and isinstance(node.meta.get("val"), torch.Tensor)


def _noise(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, levels: tuple[float, ...] = ()
) -> torch.Tensor:
    if levels:
        choice = torch.randint(len(levels), shape, generator=generator)
        drawn = torch.tensor(levels, dtype=torch.float64)[choice]
        return torch.where(torch.rand(shape, generator=generator) < 0.8, max(levels), drawn).to(dtype)
    if dtype is torch.bool or dtype.is_floating_point:
        return normal(shape, dtype, generator)
    return (torch.rand(shape, generator=generator) < 0.8).to(dtype)


Run = Callable[[Values], tuple[torch.Tensor, ...]]


def _old(site: Site, outputs: list[Node], inner: list[Node], sizes: Sizes) -> Run:
    """The captured code of a site in float64, up to some nodes, as a function of its inputs."""
    wanted = set(inner)
    graph = Graph()
    copies: dict[Node, Node] = {}
    inputs: list[Node] = []
    given = {source for node in inner if not _is_number(node) for source in node.all_input_nodes} - wanted
    read = wanted | {source for node in inner for source in sources(node)}
    for node in sorted(wanted | given):
        if node in given or node.op in ("placeholder", "get_attr"):
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            copies[node] = graph.placeholder(node.name)
            inputs.append(node)
        elif not _is_number(node):
            copies[node] = graph.node_copy(node, lambda n: _constant(n, sizes) if _is_number(n) else copies[n])
            copies[node].target = IN_JUDGE.get(node.target, node.target)
            copies[node].args = _widened(copies[node].args)
            copies[node].kwargs = _widened(copies[node].kwargs) | _made_in_double(node)
    graph.output(tuple(copies[node] for node in outputs))
    run = GraphModule(torch.nn.Module(), graph)

    def old(values: Values) -> tuple[torch.Tensor, ...]:
        known = values | {node: hollow(node, sizes.values) for node in inputs if node not in read}
        result: tuple[torch.Tensor, ...] = run(*(_judge(known[node]) for node in inputs))
        return result

    return old


def _grouped_product(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    bounds = [0, *offs.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(bounds, bounds[1:], weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - bounds[-1], weight.shape[2])])


IN_JUDGE: dict[Any, Any] = {aten._grouped_mm.default: _grouped_product, aten.view.default: aten.reshape.default}
"""Operators that PyTorch has for 16 and 32 bits only, or for one order in memory, and what they are for the judge."""


def _is_number(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _constant(node: Node, sizes: Sizes) -> Any:
    return sizes.number(node.meta["val"])


def _widened(arguments: Any) -> Any:
    """Floating-point dtypes become float64, and devices the CPU."""

    def widen(argument: Any) -> Any:
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return torch.float64
        return CPU if isinstance(argument, torch.device) else argument

    return torch.utils._pytree.tree_map(widen, arguments)


def _made_in_double(node: Node) -> dict[str, Any]:
    """The dtype for an operator that makes floats out of nothing, where it names none."""
    value = node.meta.get("val")
    if node.all_input_nodes or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return {}
    schema = getattr(node.target, "_schema", None)
    takes = schema is not None and any(a.name == "dtype" and a.kwarg_only for a in schema.arguments)
    return {"dtype": torch.float64} if takes else {}


def _judge(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return value.double() if value.dtype != torch.float64 else value
    return value


def _new(site: Site, kernel: str, sizes: Sizes, device: str) -> Run:
    """The op of a site with its kernel on a device, and the views around it, as a function of the same inputs."""
    graph = Graph()
    inputs = list(dict.fromkeys(node for operand in site.operands.values() for node in operand.nodes))
    copies = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = torch.empty(sizes.shape(node), dtype=node.meta["val"].dtype, device="meta")
    attributes = {
        name: sizes.number(value.meta["val"]) if isinstance(value, Node) else value
        for name, value in site.attributes.items()
    }
    plain = Site(site.op, site.anchor, site.operands, attributes, site.outputs, site.mask)
    _, results = emit(graph, plain, lambda n: copies[n], kernel)
    graph.output(tuple(results))
    run = GraphModule(torch.nn.Module(), graph)

    def new(values: Values) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = run(*(values[node].to(device) for node in inputs))
        return tuple(tensor.cpu() for tensor in result)

    return new


def _compare(site: Site, old: Run, new: Run, values: Values, trains: bool, generator: torch.Generator) -> Outcome:
    op = site.op
    differentiable = [operand for name, operand in site.operands.items() if trains and name in op.differentiable]
    parts = [part.node for operand in differentiable for part in operand.parts]
    leaves = dict.fromkeys(node for node in parts if values[node].dtype.is_floating_point)
    with torch.set_grad_enabled(bool(leaves)):
        mine = {n: v.detach().requires_grad_() if n in leaves else v for n, v in values.items()}
        judge = {n: v.detach().double().requires_grad_() if n in leaves else v for n, v in values.items()}
        for part in (part for operand in site.operands.values() for part in operand.parts):
            if not part.follows:
                judge |= dict.fromkeys(part.same, judge[part.node])
        arguments, got = _arguments(site, values), new(mine)
        with _unfused(op.dims(arguments)):
            want = old(judge)
    tolerance = op.tolerances[site.dtype]
    error = op.error(arguments, got, want)
    passed = tolerance.accepts(error, _scale(want[0]))
    worst: float | None = None
    if leaves and got[0].requires_grad:
        worst = 0.0
        pairs = [(mine[n], judge[n]) for n in leaves]
        undefined = bool(want[0].isnan().any())
        for (leaf, _), (x, y) in zip(pairs, _gradients(got[0], want[0], pairs, generator), strict=True):
            difference, scale = _gradient_error(x, y, undefined)
            worst = max(worst, difference)
            narrow = op.tolerances.get(leaf.dtype, tolerance)  # a gradient is rounded to its leaf's dtype
            passed = passed and (tolerance.accepts(difference, scale) or narrow.accepts(difference, scale))
    result = Verification(passed=passed, max_error=error, max_grad_error=worst)
    if passed:
        return Outcome(result, "")
    found = f"error {error:.2g}" + ("" if worst is None else f", gradients {worst:.2g}")
    return Outcome(result, f"failed verification in {str(site.dtype).removeprefix('torch.')}: {found}")


def _unfused(sizes: Mapping[str, int]) -> contextlib.AbstractContextManager[object]:
    """PyTorch's attention in its plain form, where the logits are not too large.

    The fused forms err in the gradients of queries whose keys a finite mask masks all: there the judge would be wrong.
    """
    logits = math.prod(sizes.get(name, 1) for name in ("batch", "heads", "queries", "keys")) * torch.float64.itemsize
    return sdpa_kernel(SDPBackend.MATH) if logits <= LARGEST else contextlib.nullcontext()


Gradient = torch.Tensor | None


def _gradients(
    got: torch.Tensor,
    want: torch.Tensor,
    leaves: list[tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
) -> Iterator[tuple[Gradient, Gradient]]:
    """Gradients of one random weighting of the finite results, new beside old."""
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    finite = torch.isfinite(want.detach())
    with torch.enable_grad():  # the caller may have switched gradients off
        losses = (got.double() * weights)[finite].sum(), (want * weights)[finite].sum()
        new = torch.autograd.grad(losses[0], [leaf for leaf, _ in leaves], allow_unused=True)
        old = torch.autograd.grad(losses[1], [leaf for _, leaf in leaves], allow_unused=True)
    yield from zip(new, old, strict=True)


def _gradient_error(a: Gradient, b: Gradient, undefined: bool) -> tuple[float, float]:
    """How far apart gradients are, and how large; beside a result that is ``undefined``, where both are numbers.

    A row of NaN says no more of its gradient than that it is none.
    """
    if a is None or b is None:
        other = b if a is None else a
        return (0.0 if other is None else float(other.abs().max())), 1.0
    if a.numel() == 0:
        return 0.0, 1.0
    if not undefined and not torch.equal(a.isnan(), b.isnan()):
        return math.inf, 1.0
    difference = (a.double() - b).abs().nan_to_num(nan=0.0)
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else math.inf, _scale(b)


def _scale(value: torch.Tensor) -> float:
    if value.numel() == 0 or not value.dtype.is_floating_point:
        return 1.0
    return float(value.detach().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max())


def _arguments(site: Site, values: Mapping[Node, Any]) -> dict[str, Any]:
    tensors = {name: operand.value(values) for name, operand in site.operands.items()}
    attributes = {name: v for name, v in site.attributes.items() if not isinstance(v, Node)}
    return tensors | attributes
