"""The plan: which kernel each site of a graph gets, and why every other one does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kreg.errors import SpecError
from kreg.registry.assignment import Assignment, assign
from kreg.registry.calls import facts_names
from kreg.registry.catalogue import Catalogue
from kreg.registry.constraints import Constraint, SymbolicSize, Value, Verdict
from kreg.registry.environment import Environment, availability
from kreg.registry.ops.to_come import no_contract
from kreg.registry.selection import selected
from kreg.registry.spec import Cost, KernelSpec
from kreg.registry.wording import listing

REFERENCE = Cost(efficiency=0.01, overhead_us=0.0)
"""What a site without a kernel costs: the original code, many passes over tensors that never fit a cache."""

TYPICAL_SIZE = 1024
"""Stands for a symbolic size without a hint, in costs only."""


@dataclass(frozen=True)
class SiteFacts:
    """What planning has to know about one site.

    Attributes:
        id: unique in its graph.
        op: name of the op found there.
        dims: sizes by dimension name; a dimension of an absent tensor is left out.
        attributes: arguments that are not tensors, and ``has_<optional tensor>``.
        dtype: of its first tensor.
        trainable: whether gradients flow through it.
    """

    id: str
    op: str
    dims: Mapping[str, int | SymbolicSize]
    attributes: Mapping[str, Any]
    dtype: torch.dtype
    trainable: bool


@dataclass(frozen=True)
class Rejection:
    """A kernel that a site did not get, and the reason in words."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """What one site gets.

    Attributes:
        site: its id.
        kernel: the kernel, or None where the original code stays.
        checks: constraints that have to be checked at call time.
        reason: why this one.
        rejected: the other kernels of the op.
        cost_us: estimated microseconds of a call.
    """

    site: str
    kernel: KernelSpec | None
    checks: tuple[str, ...]
    reason: str
    rejected: tuple[Rejection, ...]
    cost_us: float | None


@dataclass(frozen=True)
class Plan:
    """A kernel, or none, for every site of a graph.

    Attributes:
        device: torch's device type.
        choices: by site id.
        unused: the enabled kernels that no site can use, and why.
    """

    device: str
    choices: Mapping[str, Choice]
    unused: Mapping[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels it uses."""
        return tuple(sorted({c.kernel.name for c in self.choices.values() if c.kernel}))

    @property
    def cost_us(self) -> float:
        """Estimated microseconds of all its sites."""
        return sum(c.cost_us or 0.0 for c in self.choices.values())


@dataclass(frozen=True)
class Candidate:
    """A kernel that one site could use."""

    spec: KernelSpec
    checks: tuple[str, ...]
    cost_us: float


@dataclass(frozen=True)
class Options:
    """What one site could use, and why it could not use the rest."""

    site: SiteFacts
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    rejected: tuple[Rejection, ...] = ()
    reference_us: float = 0.0

    def without(self, kernels: Mapping[str, str]) -> Options:
        """With these kernels rejected, for the reasons given."""
        gone = [Rejection(name, kernels[name]) for name in self.candidates if name in kernels]
        left = {name: c for name, c in self.candidates.items() if name not in kernels}
        return replace(self, candidates=left, rejected=(*self.rejected, *gone))


def make_plan(
    sites: Iterable[SiteFacts],
    catalogue: Catalogue,
    environment: Environment,
    *,
    enable: Iterable[str] = (),
    disable: Iterable[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> Plan:
    """Choose a kernel for every site of a graph at once.

    Two kernels that exclude each other are never both used. Among the plans that remain, this is the one of
    least estimated cost.

    Args:
        sites: the sites of one graph.
        catalogue: the kernels to choose from.
        environment: what to run on.
        enable: kernels, by name or as ``provider.*``, to prefer wherever they are eligible, at any cost; the
            kernels that they exclude are off.
        disable: kernels, by name or pattern, not to use.
        elsewhere: where the sites are a part of a model: the kernels that are off because of its other parts, with
            the reasons. So is then what an enabled kernel of this device excludes, which another part may use.

    Raises:
        SelectionError: an unknown name, a kernel both enabled and disabled, or two enabled that exclude each
            other.
    """
    wanted, off = selected(catalogue, enable, disable)
    options = [_options(site, catalogue, environment).without(off).without(elsewhere or {}) for site in sites]
    usable = {name for o in options for name in o.candidates} & set(wanted)
    ours = usable
    if elsewhere is not None:
        ours = usable | {name for name in wanted if not availability(catalogue.kernel(name), environment)}
    shadowed = {
        name: f"it and {other} exclude each other, and {other} is enabled"
        for other in sorted(ours)
        for name in catalogue.excluded_by(other)
    }
    options = [_preferring(o.without(shadowed), usable) for o in options]
    conflicts = {name: catalogue.excluded_by(name) for o in options for name in o.candidates}
    costs = {o.site.id: {c.spec.name: c.cost_us for c in o.candidates.values()} for o in options}
    references = {o.site.id: o.reference_us for o in options}
    best = assign(costs, references, conflicts)
    choices = {o.site.id: _choice(o, best, costs, references, conflicts, usable) for o in options}
    return Plan(environment.device, choices, _unused(wanted, usable, options, catalogue))


def _preferring(options: Options, enabled: set[str]) -> Options:
    """With nothing but enabled kernels where there is one."""
    preferred = [name for name in options.candidates if name in enabled]
    if not preferred:
        return options
    reason = f"{listing(preferred)} is enabled, and so preferred"
    return options.without({name: reason for name in options.candidates if name not in enabled})


def _unused(wanted: tuple[str, ...], usable: set[str], options: list[Options], catalogue: Catalogue) -> dict[str, str]:
    found = {}
    for name in wanted:
        if name in usable:
            continue
        op = catalogue.kernel(name).op
        reasons = {r.reason for o in options for r in o.rejected if r.kernel == name}
        found[name] = "; ".join(sorted(reasons)) or no_contract(op) or f"no site computes {op}"
    return found


def _options(site: SiteFacts, catalogue: Catalogue, environment: Environment) -> Options:
    op = catalogue.op(site.op)
    values: dict[str, Value] = {**site.dims, **site.attributes}
    sizes = {name: _typical(value) for name, value in values.items()}
    try:
        work = op.work({n: sizes[n] for n in site.dims}, {n: sizes[n] for n in site.attributes})
    except Exception as error:  # a user's op: any function may stand there
        raise SpecError(f"op {op.name!r}: its work function fails on site {site.id!r}: {error!r}") from error
    candidates, rejected = {}, []
    for spec in catalogue.kernels_for(site.op):
        reasons, checks = _eligibility(spec, site, values, facts_names(op), environment)
        if reasons:
            rejected.append(Rejection(spec.name, "; ".join(reasons)))
        else:
            candidates[spec.name] = Candidate(spec, checks, estimate(spec.cost, work, environment))
    # The estimate of untuned code is too rough to refuse a kernel by: only exclusions can.
    dearest = max((c.cost_us for c in candidates.values()), default=0.0)
    return Options(site, candidates, tuple(rejected), max(estimate(REFERENCE, work, environment), dearest))


def _eligibility(
    spec: KernelSpec,
    site: SiteFacts,
    values: Mapping[str, Value],
    names: tuple[str, ...],
    environment: Environment,
) -> tuple[list[str], tuple[str, ...]]:
    """Why a site cannot use a kernel, and what has to be checked at call time if it can."""
    reasons, checks = availability(spec, environment), []
    dtype = str(site.dtype).removeprefix("torch.")
    if dtype not in spec.dtypes:
        reasons.append(f"it takes {listing(spec.dtypes)}, not {dtype}")
    if site.trainable and not spec.trains:
        reasons.append("it does not train, and gradients flow through this site")
    for text in spec.constraints:
        constraint = Constraint.parse(text, names)
        verdict = constraint.decide(values)
        if verdict is Verdict.NO:
            reasons.append(constraint.explain(values))
        elif verdict is Verdict.UNKNOWN:
            checks.append(text)
    return reasons, tuple(checks)


def estimate(cost: Cost, work: tuple[float, float], environment: Environment) -> float:
    """Microseconds: the overhead, and the time of whichever of arithmetic and memory is the slower."""
    flops, moved = work
    peaks = environment.peaks
    seconds = max(flops / peaks.flops, moved / peaks.bandwidth) / cost.efficiency
    return cost.overhead_us + 1e6 * seconds


def _typical(value: Value) -> Any:
    if not isinstance(value, SymbolicSize):
        return value
    if value.hint is not None:
        return value.hint
    return max(value.lower, min(TYPICAL_SIZE, TYPICAL_SIZE if value.upper is None else value.upper))


def _choice(
    options: Options,
    best: Assignment,
    costs: Mapping[str, Mapping[str, float]],
    references: Mapping[str, float],
    conflicts: Mapping[str, frozenset[str]],
    enabled: set[str],
) -> Choice:
    site, chosen = options.site.id, best.kernels[options.site.id]
    paid = options.reference_us if chosen is None else options.candidates[chosen].cost_us
    rejected = list(options.rejected)
    for name, candidate in options.candidates.items():
        if name == chosen:
            continue
        rivals = sorted(conflicts[name] & set(best.used))
        if rivals:
            instead = assign(costs, references, conflicts, forbidden=frozenset(rivals))
            holders = [s for s, kernel in best.kernels.items() if kernel in rivals]
            rival = listing(rivals)
            reason = (
                f"it and {rival} exclude each other, and {rival} is used at {listing(holders)}: the graph "
                f"takes an estimated {best.cost_us:,.1f} us so, {instead.cost_us:,.1f} us without {rival}"
            )
        else:
            reason = f"an estimated {candidate.cost_us:,.1f} us, against {paid:,.1f} us"
        rejected.append(Rejection(name, reason))
    rejected.sort(key=lambda r: r.kernel)
    if chosen is None:
        return Choice(site, None, (), _why_none(options), tuple(rejected), paid)
    spec, others = options.candidates[chosen].spec, len(options.candidates) - 1
    if chosen in enabled:
        reason = "it is enabled"
    elif others and not any(conflicts[name] & set(best.used) for name in options.candidates):
        reason = f"the least of {others + 1} estimates, {paid:,.1f} us"
    elif others:
        reason = f"part of the plan of least estimated cost, {best.cost_us:,.1f} us in all"
    else:
        reason = "the only kernel that this site can use"
    given_up = sorted(conflicts[chosen] & {name for offers in costs.values() for name in offers})
    if given_up:
        sites = [s for s, offers in costs.items() if not offers.keys().isdisjoint(given_up)]
        reason += f"; it excludes {listing(given_up)}, given up at {listing(sites)}"
    return Choice(site, spec, options.candidates[chosen].checks, reason, tuple(rejected), paid)


def _why_none(options: Options) -> str:
    if options.candidates:
        return f"the plan uses kernels that exclude {listing(options.candidates)}: the original code stays"
    if options.rejected:
        count = len(options.rejected)
        return f"no kernel of {options.site.op} can be used here (of {count}): the original code stays"
    return f"no kernel of {options.site.op} is registered: the original code stays"
