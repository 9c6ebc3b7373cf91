"""The line from a captured graph to a rewritten one: find, raise, plan, verify, lower, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule

from kreg.registry.calls import judged
from kreg.registry.catalogue import catalogue
from kreg.registry.environment import Environment
from kreg.registry.plan import Plan, SiteFacts, make_plan
from kreg.rewriters import mask_check
from kreg.rewriters import verify as verification
from kreg.rewriters.facts import facts_of, op_nodes, site_id
from kreg.rewriters.find import Findings, find
from kreg.rewriters.lowering import kernel_name, lower
from kreg.rewriters.raising import Raised, raise_sites
from kreg.rewriters.repeats import Repeats
from kreg.rewriters.report import Alternative, NearMissReport, Report, Seconds, SiteReport
from kreg.rewriters.site import Site
from kreg.rewriters.surroundings import surroundings

Progress = Callable[[str], None]


def quiet(step: str) -> None:
    """Progress that nobody listens to."""


@dataclass(frozen=True)
class Settings:
    """What a user asked of a rewrite.

    Attributes:
        environment: the device, and what is installed.
        enable, disable: kernels by name or pattern.
        verify: whether sites are run old against new.
        portable: keep op nodes without kernels, also where no kernel is usable here.
        dry_run: plan only.
        dynamic: whether a live model's graph may cover other batches and lengths than the example's.
        elsewhere: where the graph is a part of a model: kernels that are off because of its other parts, and why.
            None: it is the whole.
        progress: called with a short sentence as each stage starts.
    """

    environment: Environment
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    verify: bool = True
    portable: bool = False
    dry_run: bool = False
    progress: Progress = quiet
    dynamic: bool = True
    elsewhere: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph and the account of it.

    Attributes:
        cut_short: what the graph gives out is all that keeps it from having another site.
    """

    module: GraphModule
    report: Report
    facts: tuple[SiteFacts, ...]
    cut_short: bool = False


@dataclass
class Clock:
    """Seconds by stage."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> Seconds:
        """The report's form."""
        return Seconds.model_validate(self.spent)


def rewrite_graph(module: GraphModule, settings: Settings, *, model: str, frontend: str, clock: Clock) -> Rewritten:
    """Finds the sites of a captured graph, gives each a kernel, and replaces those that hold up."""
    settings.progress("finding sites")
    with clock.stage("raise"):
        findings = find(module.graph)
        raised = raise_sites(module, findings.sites)
        findings = findings.without(raised.refused)
    settings.progress(f"planning {len(findings.sites)} sites for {settings.environment.device}")
    with clock.stage("plan"):
        facts = {node.id: node for node in (facts_of(n, op) for n, op in op_nodes(raised.module.graph))}
        plan = make_plan(
            list(facts.values()),
            catalogue(),
            settings.environment,
            enable=settings.enable,
            disable=settings.disable,
            elsewhere=settings.elsewhere,
        )
    outcomes = _verify(module, findings, facts, plan, settings, clock)
    kept = [site for site in findings.sites if _holds(site, plan, outcomes, settings)]
    with clock.stage("lower"):
        if len(kept) != len(findings.sites):
            raised = raise_sites(module, [] if settings.dry_run else kept)
        lowered = raised.module if settings.portable else lower(raised.module, plan)
    after = {site_id(node): node.format_node() or node.name for node, _ in op_nodes(lowered.graph)}
    report = Report(
        model=model,
        device=settings.environment.device,
        frontend=frontend,  # type: ignore[arg-type]
        nodes=len(module.graph.nodes),
        sites=tuple(
            _site_report(site, facts.get(site.id), plan, outcomes, raised, after, settings) for site in findings.sites
        ),
        near_misses=tuple(NearMissReport(**miss.to_json(), around=surroundings(miss)) for miss in findings.near_misses),
        unused=plan.unused,
        seconds=clock.seconds(),
        dry_run=settings.dry_run,
    )
    cut_short = any(miss.is_given_out for miss in findings.near_misses)
    return Rewritten(lowered, report, tuple(facts.values()), cut_short)


@dataclass(frozen=True)
class Verified:
    """The outcome of a site's verification.

    Attributes:
        outcome: of the site that was run, the first of those that are equal.
        at: the id of that site.
        masked: what the second check of the site's own mask came to.
    """

    outcome: verification.Outcome
    at: str
    masked: mask_check.Checked


Outcomes = dict[str, Verified]


def _verify(
    module: GraphModule,
    findings: Findings,
    facts: dict[str, SiteFacts],
    plan: Plan,
    settings: Settings,
    clock: Clock,
) -> Outcomes:
    """Each site old against new; of sites that are the same code, as in repeated layers, the first for all."""
    if not settings.verify or settings.dry_run:
        return {}
    outcomes: Outcomes = {}
    repeats = Repeats()
    with clock.stage("verify"), judged():
        for site in findings.sites:
            choice = plan.choices.get(site.id)
            if choice is None or (choice.kernel is None and not settings.portable):
                continue
            kernel, trains = "" if settings.portable else kernel_name(choice), facts[site.id].trainable
            device = settings.environment.device if kernel else "cpu"  # the reference is no device's
            masked = mask_check.check(module, site)
            first = repeats.first(site, kernel, trains, masked)
            if first is site:
                settings.progress(f"verifying {site.op.name} in {site.module or 'the model'}")
                outcomes[site.id] = Verified(
                    verification.verify(module, site, kernel, trains, device=device), site.id, masked
                )
            else:
                outcomes[site.id] = replace(outcomes[first.id], masked=masked)
    return outcomes


def _holds(site: Site, plan: Plan, outcomes: Outcomes, settings: Settings) -> bool:
    choice = plan.choices.get(site.id)
    if choice is None or (choice.kernel is None and not settings.portable):
        return False
    verified = outcomes.get(site.id)
    return verified is None or verified.outcome.result is None or verified.outcome.result.passed


def _is_masked(site: Site) -> bool:
    return site.mask is not None and site.mask.kind != "full"


def _site_report(
    site: Site,
    facts: SiteFacts | None,
    plan: Plan,
    outcomes: Outcomes,
    raised: Raised,
    after: Mapping[str, str],
    settings: Settings,
) -> SiteReport:
    choice = plan.choices.get(site.id)
    verified = outcomes.get(site.id)
    outcome = verified.outcome if verified else None
    replaced = _holds(site, plan, outcomes, settings)
    reason = "" if choice is None else choice.reason
    kernel = choice.kernel.name if choice is not None and choice.kernel is not None else None
    if settings.portable and replaced:
        kernel, reason = None, "portable: the kernel is chosen where the program is lowered"
    if outcome is not None and outcome.reason:
        reason = outcome.reason if not replaced else f"{reason}; {outcome.reason}"
    if verified is not None and replaced and _is_masked(site) and verified.masked.passed is None:
        reason = f"{reason}; its mask was not run by itself: {verified.masked.reason}"
    removed = raised.removed.get(site.id, ()) if replaced else ()
    return SiteReport(
        id=site.id,
        op=site.op.name,
        module=site.module,
        status="replaced" if replaced else "kept",
        kernel=kernel if replaced else None,
        reason=reason,
        mask=site.mask.to_json() if site.mask else None,
        dims={name: size if isinstance(size, int) else str(size) for name, size in facts.dims.items()} if facts else {},
        dtype=str(site.dtype).removeprefix("torch."),
        trainable=facts.trainable if facts else False,
        verify=outcome.result if outcome else None,
        verified_at=verified.at if verified and verified.outcome.result else None,
        alternatives=tuple(
            Alternative(kernel=r.kernel, rejected=r.reason) for r in (choice.rejected if choice else ())
        ),
        nodes_replaced=len(removed),
        before=tuple(node.format_node() or node.name for node in removed),
        after=(after[site.id],) if replaced and site.id in after else (),
    )
