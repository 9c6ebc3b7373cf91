"""The second check of a mask: what the model masks with, run at several sizes, against what the op keeps.

The first check reads the mask as index notation. This one knows no notation: it runs the captured nodes in plain
PyTorch, on inputs drawn to look like masks, positions and documents, and compares element by element.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule

from kreg.rewriters.mask_check.keeps import OPS
from kreg.rewriters.mask_check.outcome import Checked, Difference, NotRun
from kreg.rewriters.mask_check.task import Task
from kreg.rewriters.site import Site

__all__ = ["OPS", "Checked", "Difference", "check"]

log = logging.getLogger("kreg")

_checked: WeakKeyDictionary[GraphModule, dict[Any, Checked]] = WeakKeyDictionary()
"""Layers share their masks: what was found of one holds for all whose masks are computed by the same code."""


def check(module: GraphModule, site: Site) -> Checked:
    """Holds what a site's op keeps against what the captured code masks with; once for all sites that mask alike."""
    keeping = OPS.get(site.op.name)
    if keeping is None or not site.claims:
        return Checked(None, "there is no mask" if keeping else f"{site.op.name} is not checked")
    if all(claim.operand is None and claim.of != "causal" for claim in site.claims):
        return Checked(None, "the mask has no tensor of its own")
    try:
        task = Task(module, site, keeping)
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
