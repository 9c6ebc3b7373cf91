"""Kernels that exclude each other, weighed for a whole model whose layers are planned one by one."""

from __future__ import annotations

from kreg.registry.catalogue import catalogue
from kreg.registry.plan import Plan, make_plan
from kreg.registry.wording import listing
from kreg.rewriters.live.account import Account
from kreg.rewriters.pipeline import Settings


def ruled_out(account: Account, settings: Settings) -> dict[str, str]:
    """The kernels in use that the cheapest plan for all layers does without, and why; none where it uses them.

    While layers are captured, the first that uses one of two kernels rules the other out for those after it.
    """
    known = catalogue()
    used = sorted(name for name in account.kernels if known.excluded_by(name))
    if not used:  # as nearly everywhere: then there is nothing to plan again
        return {}
    facts = account.facts()

    def plan(*without: str) -> Plan:
        off = (*settings.disable, *without)
        return make_plan(facts, known, settings.environment, enable=settings.enable, disable=off)

    best = plan()
    found = {}
    for name in used:
        rivals = sorted(known.excluded_by(name) & set(best.kernels))
        if rivals:
            found[name] = (
                f"it and {listing(rivals)} exclude each other: the model takes an estimated {best.cost_us:,.1f} us "
                f"with {listing(rivals)}, {plan(*rivals).cost_us:,.1f} us with it"
            )
    return found
