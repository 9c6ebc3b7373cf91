"""What a record says: the oracle's sites against those that were raised, verified, and whose masks were proven."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


def is_attention(op: str) -> bool:
    """Whether an op is an attention, by its name."""
    return op.rpartition("_")[2] == "attention"


@dataclass(frozen=True)
class Score:
    """Counts of one specimen in one implementation.

    Attributes:
        attentions: by the oracle.
        raised: of these, those that a site of an attention op stands for, in the same module.
        verified: of the raised, those that came out equal, forward and (where they train) backward.
        replaced: of the raised, those that got a kernel.
        extra: sites of attention ops that the oracle did not count.
        proven: sites whose masks hold no part that is passed on as a tensor; a bias that adds to the scores may be one.
        masks: sites by the kind of their mask.
        indexers: modules in which the oracle saw a selection of keys.
        indexers_raised: of these, those in which an op that is no attention was raised.
        missed: modules of attentions that were not raised.
    """

    attentions: int
    raised: int
    verified: int
    replaced: int
    extra: int
    proven: int
    masks: dict[str, int]
    indexers: int
    indexers_raised: int
    missed: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every attention was raised."""
        return self.raised == self.attentions

    @property
    def right(self) -> bool:
        """Whether every attention was raised and verified."""
        return self.complete and self.verified == self.raised


def is_exported(record: dict[str, Any]) -> bool:
    """Whether there was a graph to look at, whatever came of it."""
    return record["stage"] not in ("build", "oracle", "export")


def score(record: dict[str, Any]) -> Score:
    """Reads the record of a specimen that was exported; where kreg failed on it as a whole, nothing was raised."""
    found = record.get("sites", [])
    sites = [site for site in found if is_attention(site["op"])]
    wanted = [attention["module"] for attention in record["oracle"]["attentions"] if attention.get("used", True)]
    matched, missed = _match(wanted, sites)
    masks = Counter(_kind(site) for site in sites)
    selecting = {indexer["module"] for indexer in record["oracle"]["indexers"]}
    others = {site["module"] for site in found if _selects(site)}
    return Score(
        attentions=len(wanted),
        raised=len(matched),
        verified=sum(is_verified(site) for site in matched),
        replaced=sum(site["status"] == "replaced" for site in matched),
        extra=len(sites) - len(matched),
        proven=sum(mask_is_proven(site, bool(record.get("causal"))) for site in sites),
        masks=dict(masks),
        indexers=len(selecting),
        indexers_raised=sum(any(_related(module, other) for other in others) for module in selecting),
        missed=tuple(missed),
    )


def _match(wanted: list[str], sites: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Attentions and sites of one module are one another's; then of a module and its parts; then of one parent's parts.

    The last is for models that have modules for a softmax and for a product: either may give a site its name.
    """
    left, matched, missed = list(sites), [], []
    for related in (_same, _related, _siblings):
        still: list[str] = []
        for module in wanted:
            found = next((site for site in left if related(module, site["module"])), None)
            if found is None:
                still.append(module)
            else:
                left.remove(found)
                matched.append(found)
        wanted = still
    missed.extend(wanted)
    return matched, missed


def _same(one: str, other: str) -> bool:
    return one == other


def _related(one: str, other: str) -> bool:
    return one == other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _siblings(one: str, other: str) -> bool:
    parent, _, part = one.rpartition(".")
    return bool(parent) and parent == other.rpartition(".")[0] and not part.isdigit()


def is_verified(site: dict[str, Any]) -> bool:
    """Whether a site came out equal, forward and (where it trains) backward."""
    outcome = site["verify"]
    if outcome is None or not outcome["passed"]:
        return False
    return not site["trainable"] or outcome["max_grad_error"] is not None


def _kind(site: dict[str, Any]) -> str:
    return site["mask"]["kind"] if site["mask"] else "none"


def mask_is_proven(site: dict[str, Any], causal: bool = False) -> bool:
    """Whether nothing of a site's mask is left as a tensor.

    A bias is no mask; but where a model proves causal when it runs, a bias with no structure beside it may hide one.
    """
    if site["mask"] is None:
        return True
    inputs = site["mask"].get("input", ())
    if site["mask"]["kind"] == "input":
        return not causal and "mask" not in inputs
    return "mask" not in inputs and "padding" not in site["mask"]["kind"].split("+")


def _selects(site: dict[str, Any]) -> bool:
    """Whether a site may stand for a selection of keys: the ops that name themselves after it."""
    return "index" in site["op"] or "select" in site["op"]
