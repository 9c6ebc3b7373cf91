"""Finding sites: every rule at every anchor, on a graph that is only read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import sympy
import torch
from torch.fx import Graph, Node

from kreg.rewriters import notation as n
from kreg.rewriters.graph import WRITTEN
from kreg.rewriters.lift import Lifter
from kreg.rewriters.rules import RULES, Context, Rule
from kreg.rewriters.rules.given import given
from kreg.rewriters.site import NearMiss, Refused, Site

log = logging.getLogger("kreg")


@dataclass(frozen=True)
class Findings:
    """What is in a graph."""

    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]

    def without(self, refused: Mapping[str, str]) -> Findings:
        """The same with some sites as near misses, for the reasons given by site id."""
        if not refused:
            return self
        misses = [NearMiss(s.op.name, s.anchor, refused[s.id]) for s in self.sites if s.id in refused]
        return Findings(tuple(s for s in self.sites if s.id not in refused), (*self.near_misses, *misses))


def find(graph: Graph, rules: Sequence[Rule] | None = None) -> Findings:
    """The sites of a graph, and the anchors that are none, with the obligation that failed."""
    rules = RULES if rules is None else rules
    sites: list[Site] = [site for node in graph.nodes if (site := given(node)) is not None]
    misses: list[NearMiss] = []
    producers: dict[Node, Site] = {output.node: site for site in sites for output in site.outputs}
    with n.sizes_within(_ranges(graph)):
        for group in _by_anchor(rules):
            context = Context(Lifter(producers), dict(producers))
            for node in graph.nodes:
                if node.op != "call_function" or not group[0].is_anchor(node):
                    continue
                outcome = _first(context, group, node)
                if isinstance(outcome, Site):
                    sites.append(outcome)
                else:
                    misses.append(outcome)
            producers |= {output.node: site for site in sites for output in site.outputs}
    return Findings(tuple(sites), tuple(misses))


def _by_anchor(rules: Sequence[Rule]) -> list[list[Rule]]:
    """Rules that share an anchor compete for it in order; groups run one after the other."""
    groups: list[list[Rule]] = []
    for rule in rules:
        if groups and groups[-1][0].is_anchor is rule.is_anchor:
            groups[-1].append(rule)
        else:
            groups.append([rule])
    return groups


def _first(context: Context, rules: Sequence[Rule], node: Node) -> Site | NearMiss:
    miss: NearMiss | None = None
    for rule in rules:
        try:
            return _kept_whole(rule.find(context, node))
        except Refused as refusal:
            miss = NearMiss(rule.op.name, node, refusal.reason, refusal.node)
        except Exception as error:  # a rule that breaks must not take the model with it
            log.debug("rule %s failed at %s", rule.op.name, node, exc_info=True)
            miss = NearMiss(rule.op.name, node, f"the rule itself failed: {type(error).__name__}: {error}")
    assert miss is not None
    return miss


def _kept_whole(site: Site) -> Site:
    """A site whose operands stay what they are until its gradient reads them.

    Raises:
        Refused: the program writes into one of them.
    """
    for name, operand in site.operands.items():
        for node in operand.nodes:
            if node.meta.get(WRITTEN):
                reason = f"{name} is in the memory of an input that the program writes into: a gradient would read that"
                raise Refused(reason, node)
    return site


def _ranges(graph: Graph) -> n.SizeRange:
    """The ranges that capture proved for symbolic sizes, from the graph's own shape environment."""
    environment = None
    for node in graph.nodes:
        value = node.meta.get("val")
        for s in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(s, torch.SymInt):
                environment = s.node.shape_env
                break
        if environment is not None:
            break

    @cache
    def ranges(size: sympy.Expr) -> tuple[int, int | None]:
        if environment is None:
            return 0, None
        bounds = environment.bound_sympy(size)
        low = int(bounds.lower) if bounds.lower.is_Integer else 0
        high = int(bounds.upper) if bounds.upper.is_Integer else None
        return low, high if high is None or high < 2**62 else None

    return ranges
