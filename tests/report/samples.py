"""Reports as a rewrite of real models makes them, by hand: small, large and empty."""

from __future__ import annotations

from typing import Any

from kreg.rewriters.report import Alternative, NearMissReport, Report, Seconds, SiteReport, Verification

SAS = "kreg.tiled_sparse_attention"
LI = "kreg.tiled_indexer"
NOT_HERE = "it runs on npu, not on cpu"
MASKS: dict[str, dict[str, Any]] = {
    "sliding": {"kind": "sliding", "window": 128},
    "csa": {"kind": "sliding+top-k", "window": 128, "ratio": 4, "selected": "lightning_indexer"},
    "hca": {"kind": "sliding+block-causal", "window": 128, "ratio": 128},
    "indexer": {"kind": "block-causal", "ratio": 4},
}
DIMS: dict[str, int | str] = {"batch": 1, "heads": 16, "queries": 4096, "keys": 4096, "head_dim": 128}


def before(layer: int, count: int) -> tuple[str, ...]:
    """Lines as long as a graph's are."""
    lines = [
        f"%matmul_{layer} : f32[1, 16, 4096, 5120] = aten.matmul.default(%expand_{layer}, %t_{layer})",
        f"%mul_{layer} : f32[1, 16, 4096, 5120] = aten.mul.Tensor(%matmul_{layer}, 0.08838834764831845)",
        f"%add_{layer} : f32[1, 16, 4096, 5120] = aten.add.Tensor(%mul_{layer}, %where_{layer})",
        f"%cat_{layer} : f32[1, 16, 4096, 5121] = aten.cat.default([%add_{layer}, %sinks_{layer}], -1)",
        f"%softmax_{layer} : f32[1, 16, 4096, 5121] = aten.softmax.int(%cat_{layer}, -1)",
        f"%slice_{layer} : f32[1, 16, 4096, 5120] = aten.slice.Tensor(%softmax_{layer}, 3, 0, -1)",
    ]
    return tuple(lines[i % len(lines)].replace(f"_{layer} ", f"_{layer}_{i} ", 1) for i in range(count))


def attention(layer: int, kind: str, **changes: Any) -> SiteReport:
    """One attention site of DeepSeek-V4."""
    entries = {"csa": 1024, "hca": 32}.get(kind)
    fields: dict[str, Any] = {
        "id": f"sparse_attention@softmax_{layer}",
        "op": "sparse_attention",
        "module": f"model.layers.{layer}.self_attn",
        "status": "replaced",
        "kernel": SAS,
        "reason": "the only kernel that this site can use",
        "mask": MASKS[kind],
        "dims": DIMS | ({"entries": entries} if entries else {}) | ({"selected": 512} if kind == "csa" else {}),
        "dtype": "float32",
        "trainable": True,
        "verify": Verification(passed=True, max_error=3.1e-7 + layer * 1e-8, max_grad_error=1.2e-6 + layer * 3e-8),
        "alternatives": (Alternative(kernel="mindspeed.sas", rejected=NOT_HERE),),
        "nodes_replaced": 57,
        "before": before(layer, 57),
        "after": (
            f"%sparse_attention_{layer} : f32[1, 16, 4096, 128] = kreg.sparse_attention(%q_{layer}, "
            f"%kv_{layer}, %compressed_{layer}, %topk_{layer}, %sinks_{layer}, window=128, kernel='{SAS}')",
        ),
    }
    return SiteReport(**(fields | changes))


def indexer(layer: int) -> SiteReport:
    """One indexer site of DeepSeek-V4."""
    return SiteReport(
        id=f"lightning_indexer@topk_{layer}",
        op="lightning_indexer",
        module=f"model.layers.{layer}.self_attn.compressor.indexer",
        status="replaced",
        kernel=LI,
        reason="the only kernel that this site can use",
        mask=MASKS["indexer"],
        dims={"batch": 1, "heads": 16, "queries": 4096, "entries": 1024, "head_dim": 64, "selected": 512},
        dtype="float32",
        trainable=True,
        verify=Verification(passed=True, max_error=0.0),
        alternatives=(Alternative(kernel="mindspeed.li", rejected=NOT_HERE),),
        nodes_replaced=31,
        before=before(layer, 31),
        after=(f"%topk_{layer} : i64[1, 4096, 512] = kreg.lightning_indexer(%q_{layer}, %k_{layer})",),
    )


def report(layers: int, **changes: Any) -> Report:
    """DeepSeek-V4 of so many layers: two sliding ones, then CSA and HCA by turns."""
    sites: list[SiteReport] = []
    for layer in range(layers):
        kind = (
            ("sliding", "csa", "hca")[layer] if layers == 3 else "sliding" if layer < 2 else ("csa", "hca")[layer % 2]
        )
        sites += [indexer(layer)] if kind == "csa" else []
        sites.append(attention(layer, kind))
    fields: dict[str, Any] = {
        "model": "DeepseekV4ForCausalLM",
        "device": "cpu",
        "frontend": "export",
        "nodes": 60 + 700 * layers,
        "sites": tuple(sites),
        "seconds": Seconds(**{"capture": 3.4, "raise": 0.61, "plan": 0.004, "lower": 0.12, "verify": 2.05}),
    }
    return Report(**(fields | changes))


def mixed() -> Report:
    """A model in which every outcome occurs: replaced, kept by choice, failed, near misses, choices."""
    kept = Alternative(
        kernel="kreg.tiled_attention",
        rejected="an estimated 912 us, against 604 us",
    )
    vision = {
        "op": "attention",
        "dims": {"batch": 2, "heads": 12, "queries": 197, "keys": 197, "head_dim": 64},
        "mask": {"kind": "full"},
        "dtype": "bfloat16",
    }
    sites = [
        attention(
            n,
            "sliding",
            **vision,
            module=f"vision.blocks.{n}.attn",
            id=f"attention@sdpa_{n}",
            kernel="torch.sdpa",
            reason="the least of 2 estimates, 604 us",
            alternatives=(kept,),
        )
        for n in range(24)
    ]
    sites += [attention(n, "csa", module=f"text.layers.{n}.attn", id=f"a{n}") for n in range(0, 12, 2)]
    sites += [indexer(n).model_copy(update={"module": f"text.layers.{n}.attn.indexer"}) for n in range(0, 12, 2)]
    failed = Verification(passed=False, max_error=0.031, max_grad_error=1.7)
    extra = attention(
        1,
        "hca",
        id="sparse_attention@softmax_77",
        module="text.layers.1.attn",
        status="kept",
        kernel=None,
        before=(),
        after=(),
        verify=failed,
        reason="verification failed: the result is off by 3.1e-02, more than the tolerance 2.2e-05",
        mask={"kind": "sliding+block-causal+padding", "window": 128, "ratio": 16, "padding": "input"},
    )
    causal = attention(
        3,
        "sliding",
        op="attention",
        id="attention@softmax_3",
        module="text.layers.3.attn",
        status="kept",
        kernel=None,
        verify=None,
        trainable=False,
        mask={"kind": "causal+input", "input": ["mask"]},
        reason="no kernel of attention can be used here (of 2): the original code stays",
        dims={"batch": "s0", "heads": 8, "queries": "s1", "keys": "s1", "head_dim": 96},
        alternatives=(
            Alternative(kernel="torch.sdpa", rejected="it needs not has_mask, and has_mask is true here"),
            Alternative(kernel="kreg.tiled_attention", rejected="it is disabled"),
        ),
        nodes_replaced=0,
        before=(),
        after=(),
    )
    misses = [
        NearMissReport(
            op="attention",
            module=f"text.layers.{n}.cross_attn",
            node=f"softmax_{n + 40}",
            reason="dropout is applied to the weights while training (modeling_x.py:212 forward: "
            "weights = F.dropout(weights, p=0.1))",
        )
        for n in range(5, 9)
    ]
    misses.append(
        NearMissReport(
            op="lightning_indexer",
            module="text.layers.9.attn.indexer",
            node="topk_9",
            reason="every query sees every compressed entry, ready or not",
        )
    )
    return report(0, sites=(*sites, extra, causal), near_misses=tuple(misses), nodes=8412, model="Dots3ForCausalLM")
