"""Ops to come: names that kernels of kreg's own are declared for, before the contract that would let one be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OPS_TO_COME: Mapping[str, str] = MappingProxyType(
    {
        "rms_norm": "x over the root of its mean square, times a weight",
        "rotary": "pairs of channels turned by an angle that the position gives",
        "glu": "one half of the channels, through an activation, times the other half",
        "moe_permute": "tokens copied once for each of their experts, and sorted by expert",
        "moe_unpermute": "the rows of sorted tokens back in their places, weighted and summed over experts",
        "gated_delta_rule": "linear attention whose state decays, and is corrected by the delta rule, at each token",
        # A layer stands between the first two, so that they are no single op.
        "hyper_connection_pre": "several residual streams mixed to a layer's input, and the weights of the way back",
        "hyper_connection_post": "several residual streams mixed among themselves, and a layer's output added to each",
        "sinkhorn": "square matrices made doubly stochastic by normalising rows and columns in turn",
    }
)
"""Summaries by name. The ``entry`` of a spec of one names the upstream function: there is no adapter of it yet."""


def no_contract(op: str) -> str | None:
    """Why no kernel of an op can be chosen; None for an op that is not to come."""
    return f"kreg has no contract for {op} yet: it is declared, and never chosen" if op in OPS_TO_COME else None
