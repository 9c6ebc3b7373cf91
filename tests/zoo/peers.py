"""What PyTorch Inductor makes of the same exported graph: its attention patterns, without its code generation."""

from __future__ import annotations

import copy

import torch
from torch.export import ExportedProgram


def prepare() -> None:
    """Traces the patterns, which takes seconds: once, before processes are forked."""
    from torch._inductor.fx_passes.joint_graph import lazy_init

    lazy_init(torch.device("cpu"))


def fused_attentions(program: ExportedProgram) -> int:
    """How many attentions Inductor's patterns find in a program as it compiles it for inference."""
    from torch._dynamo.utils import counters
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    with torch.no_grad():
        decomposed = program.run_decompositions(select_decomp_table())
    graph = copy.deepcopy(decomposed.graph_module)
    fake = next(node.meta["val"].fake_mode for node in graph.graph.nodes if hasattr(node.meta.get("val"), "fake_mode"))
    before = counters["inductor"]["fuse_attention"]
    with V.set_fake_mode(fake), torch.no_grad():
        joint_graph_passes(graph, torch.device("cpu"))
    return int(counters["inductor"]["fuse_attention"] - before)
