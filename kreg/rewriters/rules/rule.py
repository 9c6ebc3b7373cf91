"""What a rule is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from kreg.registry.op import Op
from kreg.rewriters.lift import Lifter
from kreg.rewriters.site import Site


@dataclass(frozen=True)
class Context:
    """One graph while its sites are being found.

    Attributes:
        lifter: index notation for the graph's nodes; outputs of the sites found so far are opaque to it.
        producers: the site that each such output belongs to.
    """

    lifter: Lifter
    producers: Mapping[Node, Site] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How an op is recognised in a graph.

    Attributes:
        op: the op.
        is_anchor: whether a node could belong to a site: cheap, and wrong only on the side of yes.
        find: the site around an anchor; raises `Refused` with the obligation that failed.
    """

    op: Op
    is_anchor: Callable[[Node], bool]
    find: Callable[[Context, Node], Site]
