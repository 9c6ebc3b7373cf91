"""What an NPU's owner runs, once: every NPU kernel against its op's reference, a model against eager, and a bench.

python examples/npu_report.py                       # writes npu-report.json, the file to send back
python examples/npu_report.py --device cpu --sizes small --only kernels --kernel "kreg.*"     # a dry run of this script

A kernel is judged as in kreg's own tests: forward and gradients, in its dtype on the device, against the op's reference
in float64 on the CPU, within the op's tolerance. So is DeepSeek-V4, small and with random weights: errors of its logits
and gradients on the device, rewritten and as transformers has it, against float64 on the CPU. Whatever raises is
written down and the rest goes on. The file is written after each part, so that a crash leaves what was found before.

Exit code 0: everything passed; 1: something did not, or nothing could be run; 2: there is no such device here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import kreg
from kreg.bench import Case, run
from kreg.errors import SelectionError
from kreg.registry import calls, library
from kreg.registry.catalogue import catalogue
from kreg.registry.constraints import Constraint
from kreg.registry.environment import Environment, InstalledPackages, availability
from kreg.registry.op import Op
from kreg.registry.spec import KernelSpec
from kreg.version import __version__

FORMAT = 1
PARTS = ("kernels", "model", "bench")
PACKAGES = ("torch", "torch_npu", "mindspeed", "transformers", "numpy")
BACKENDS = {"npu": "torch_npu"}
"""The module that makes a device type known to torch."""

PLANS: dict[str, dict[str, list[str]]] = {
    "as planned": {},
    "SAS": {"enable": ["mindspeed.sas"]},
    "LI": {"enable": ["mindspeed.li"]},
    "torch_npu only": {"disable": ["mindspeed.*"]},
}
NO_FURTHER = 2.0
"""Of two ways to round the same sums neither is right: how many times the unchanged model's error is accepted."""

SIZES: dict[str, dict[str, Any]] = {
    # head dimensions and counts of the real model, which MindSpeed's kernels ask for; the rest small
    "real": {"heads": 64, "dim": 512, "window": 128, "ratio": 128, "index_heads": 64, "index_dim": 128, "tokens": 512},
    "small": {"heads": 4, "dim": 32, "window": 16, "ratio": 16, "index_heads": 4, "index_dim": 16, "tokens": 64},
}


def main(arguments: list[str]) -> int:
    """Runs what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="npu")
    parser.add_argument("--out", type=Path, help="default: <device>-report.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kernel", default="*", help="a name or pattern")
    parser.add_argument("--sizes", choices=SIZES, default="real", help="of the model and of the added samples")
    asked = parser.parse_args(arguments)
    out = asked.out or Path(f"{asked.device.partition(':')[0]}-report.json")
    started = time.perf_counter()
    report: dict[str, Any] = {"format": FORMAT, "arguments": arguments, "finished": False, "error": None}

    def write() -> None:
        report["seconds"] = round(time.perf_counter() - started, 1)
        out.write_text(json.dumps(_plain(report), indent=1, allow_nan=False))

    report["environment"], here = environment(asked.device)
    if here is None:
        report["error"] = report["environment"]["error"]
        write()
        print(f"{report['error']}\nwritten: {out}", file=sys.stderr)
        return 2
    sizes = SIZES[asked.sizes]
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernels": lambda: [judged(spec, here, sizes) for spec in made_for(here, asked.kernel)],
        "model": lambda: models(asked.device, sizes),
        "bench": lambda: benched(asked.device, sizes),
    }
    for part in asked.only:
        print(f"{part} on {asked.device} ({here.name})", flush=True)
        report[part] = attempted(parts[part])
        write()
    results = [item for part in asked.only for item in outcomes(report[part])]
    report["summary"] = {state: results.count(state) for state in ("passed", "failed", "not run")}
    report["finished"] = True
    write()
    print(f"{report['summary']}\nwritten: {out}")
    return 0 if report["summary"]["passed"] and not report["summary"]["failed"] else 1


def attempted(work: Callable[[], Any]) -> Any:
    """What a piece of work gives, or how it failed."""
    try:
        return work()
    except Exception as error:
        return {"outcome": "failed", **told(error)}


def told(error: Exception) -> dict[str, Any]:
    """An exception as data, with the innermost calls."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}", "where": where}


def outcomes(found: Any) -> Iterator[str]:
    """The outcomes of a part: of each of its results, or of its own failure."""
    for item in found if isinstance(found, list) else [found]:
        yield item["outcome"]


def environment(device: str) -> tuple[dict[str, Any], Environment | None]:
    """Versions and device as data; and the device, None where it is not here."""
    have, facts = InstalledPackages(), {"kreg": __version__, "python": platform.python_version()}
    found: dict[str, Any] = {
        "versions": facts | {name: have.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processors": torch.get_num_threads(),
    }
    backend = BACKENDS.get(device.partition(":")[0])
    try:
        if backend is not None:
            __import__(backend)
            found["versions"]["CANN"] = _cann()
        here = Environment.detect(device)
    except (ImportError, OSError, RuntimeError, SelectionError) as error:
        found["error"] = f"device {device!r} cannot be used: {told(error)['error']}"
        return found, None
    found["device"] = {"asked": device, "name": here.name, "architecture": here.architecture, "present": here.present}
    if not here.present:
        found["error"] = f"device {device!r} is not here: run this where it is, or name another with --device"
        return found, None
    return found, here


def _cann() -> str | None:
    try:
        from torch_npu.npu.utils import get_cann_version  # type: ignore[import-not-found]

        return str(get_cann_version(module="CANN")) or None
    except Exception as error:  # it reads files of an installation that may be anywhere
        return told(error)["error"]


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────────────


def made_for(here: Environment, pattern: str) -> list[KernelSpec]:
    """The kernels for a device, by name."""
    specs = catalogue().specs
    return [specs[n] for n in sorted(specs) if here.device in specs[n].devices and fnmatchcase(n, pattern)]


def judged(spec: KernelSpec, here: Environment, sizes: dict[str, Any]) -> dict[str, Any]:
    """Every sample of the op that a kernel takes, in each of its dtypes: errors beside tolerances, and what raised."""
    found: dict[str, Any] = {"kernel": spec.name, "op": spec.op, "samples": []}
    reasons = availability(spec, here)
    if reasons:
        return found | {"outcome": "not run", "reasons": reasons}
    op = catalogue().op(spec.op)
    for dtype in (getattr(torch, name) for name in spec.dtypes):
        if dtype not in op.tolerances:
            continue
        generator = torch.Generator().manual_seed(0)
        for source, samples in (("op", op.samples), ("report", lambda *how: wide(op.name, sizes, *how))):
            for number, sample in enumerate(samples(dtype, generator)):
                if takes(spec, op, sample):
                    case = {"dtype": str(dtype).removeprefix("torch."), "from": source, "number": number}
                    result = attempted(lambda sample=sample: compared(spec, op, sample, here.device))
                    found["samples"].append({**case, **described(op, sample), **result})
    states = [sample["outcome"] for sample in found["samples"]]
    found["outcome"] = "failed" if "failed" in states else "passed" if states else "not run"
    if not states:
        found["reasons"] = ["none of the samples is one that it takes"]
    print(f"  {spec.name}: {found['outcome']}, {states.count('passed')} of {len(states)} samples passed", flush=True)
    return found


def takes(spec: KernelSpec, op: Op, sample: dict[str, Any]) -> bool:
    """Whether a kernel's constraints hold for a call."""
    facts = calls.call_facts(op, {**op.defaults, **sample})
    names = calls.facts_names(op)
    return all(Constraint.parse(text, names).holds(facts) for text in spec.constraints)


def described(op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    """A call's sizes and attributes."""
    full = {**op.defaults, **sample}
    return {"dims": op.dims(full), "attributes": {name: full[name] for name in op.attributes}}


def compared(spec: KernelSpec, op: Op, sample: dict[str, Any], device: str) -> dict[str, Any]:
    """One call on the device against the reference in float64 on the CPU, and its gradients."""
    mine = {n: _leaf(op, spec, n, v.to(device)) if isinstance(v, torch.Tensor) else v for n, v in sample.items()}
    exact = {n: _leaf(op, spec, n, _double(v)) if isinstance(v, torch.Tensor) else v for n, v in sample.items()}
    with calls.judged():  # one that raises is not answered for by the reference
        got = calls.results(library.overload(op)(**mine, kernel=spec.name))
        want = calls.results(op.reference(**exact))
        plain = tuple(t.detach().cpu() for t in got), tuple(t.detach() for t in want)
        tolerance = op.tolerances[next(v.dtype for v in sample.values() if isinstance(v, torch.Tensor))]
        error, scale = op.error(sample, *plain), _largest(next((t for t in plain[1] if t.is_floating_point()), None))
        found = {"error": error, "accepted": tolerance.atol + tolerance.rtol * scale, "gradients": {}}
        passed = tolerance.accepts(error, scale)
        for name, (new, old) in gradients(mine, exact, got, want).items():
            off, scale = float((new.cpu().double() - old).abs().max()) if new.numel() else 0.0, _largest(old)
            found["gradients"][name] = {"error": off, "accepted": tolerance.atol + tolerance.rtol * scale}
            passed = passed and tolerance.accepts(off, scale)
    return {"outcome": "passed" if passed else "failed", **found}


def gradients(mine: Any, exact: Any, got: Any, want: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of the first floating-point result, new beside old.

    Of a random weighting of a result in the op's order; of the plain sum of an indexer's scores, which are in none.
    """
    place = next((i for i, t in enumerate(want) if t.is_floating_point() and t.requires_grad and t.numel()), None)
    if place is None or not got[place].requires_grad:
        return {}
    weights = torch.ones(want[place].shape, dtype=torch.float64)
    if place == 0:
        weights = torch.randn(want[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [name for name, value in exact.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    pairs = []
    for result, arguments in ((got[place], mine), (want[place], exact)):
        finite = torch.isfinite(result.detach())
        loss = (torch.where(finite, result, 0) * weights.to(result.device, result.dtype)).sum()
        found = torch.autograd.grad(loss, [arguments[n] for n in names], allow_unused=True)
        pairs.append([torch.zeros_like(arguments[n]) if g is None else g for n, g in zip(names, found, strict=True)])
    return dict(zip(names, zip(*pairs, strict=True), strict=True))


def _leaf(op: Op, spec: KernelSpec, name: str, value: torch.Tensor) -> torch.Tensor:
    return value.detach().requires_grad_(spec.trains and name in op.differentiable and value.is_floating_point())


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double() if value.is_floating_point() else value.clone()


def _largest(value: torch.Tensor | None) -> float:
    if value is None or not value.numel():
        return 1.0
    return float(value.detach().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max())


def wide(op: str, sizes: dict[str, Any], dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Samples in the sizes that a kernel may ask for; an op's own are smaller than many an NPU kernel takes."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    S, H, D, window, ratio = 256, sizes["heads"], sizes["dim"], sizes["window"], sizes["ratio"]
    if op == "sparse_attention":
        base = {"q": make(1, H, S, D), "kv": make(1, S, D), "sinks": make(H), "scale": D**-0.5, "window": window}
        yield base
        ready = (torch.arange(S) + 1) // 4
        order = torch.rand(1, S, S // 4, generator=generator).argsort(-1)[..., :32]
        chosen = torch.where(order < ready[:, None], order, -1)
        yield {**base, "compressed": make(1, S // 4, D), "indices": chosen, "ratio": 4}
        yield {**base, "compressed": make(1, S // ratio, D), "ratio": ratio}
    elif op == "lightning_indexer":
        heads, dim = sizes["index_heads"], sizes["index_dim"]
        for step in (1, 4):
            query = {"q": make(1, S, heads, dim), "k": make(1, S // step, dim), "weights": make(1, S, heads)}
            yield {**query, "scale": dim**-0.5, "topk": 16, "ratio": step}
    elif op == "attention":
        qkv = {"q": make(2, 8, S, 128), "k": make(2, 2, S, 128), "v": make(2, 2, S, 128), "scale": 128**-0.5}
        kept = torch.arange(S).expand(2, -1) < torch.tensor([[S], [S - 40]])
        packed = {"causal": True, "documents": (torch.arange(S) // 100).expand(2, -1).contiguous()}
        masks = ({}, {"causal": True}, {"causal": True, "window": 64}, {"causal": True, "padding": kept}, packed)
        for how in masks:
            yield {**qkv, **how}
            yield {**qkv, **how, "sinks": make(8)}


# ── a model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def deepseek_v4(sizes: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """A layer of each kind, random weights; experts go by the token, so that rounding sends none elsewhere."""
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    layers = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=3,
        layer_types=layers,
        mlp_layer_types=["hash_moe"] * 3,
        compress_rates={layers[1]: 4, layers[2]: sizes["ratio"]},
        num_attention_heads=sizes["heads"],
        head_dim=sizes["dim"],
        sliding_window=sizes["window"],
        index_n_heads=sizes["index_heads"],
        index_head_dim=sizes["index_dim"],
        index_topk=sizes["tokens"] // 16,
        q_lora_rank=64,
        o_groups=4,
        o_lora_rank=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.config._experts_implementation = "batched_mm"  # plain PyTorch, in any dtype, on any device
    return model.to(dtype).eval()


def tokens(sizes: dict[str, Any]) -> torch.Tensor:
    """Token ids [1, tokens]."""
    return torch.randint(1, 256, (1, sizes["tokens"]), generator=torch.Generator().manual_seed(0))


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of their mean square by parameter, on the CPU in float64."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    found = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach().cpu().double(), found


def apart(got: Any, want: Any) -> dict[str, float]:
    """Relative errors in the Euclidean norm: of the logits, and of all gradients together."""
    names = want[1].keys() & got[1].keys()
    stacked = [torch.cat([grads[n].flatten() for n in sorted(names)]) for grads in (got[1], want[1])]
    return {
        "logits": float((got[0] - want[0]).norm() / want[0].norm()),
        "gradients": float((stacked[0] - stacked[1]).norm() / stacked[1].norm()),
        "parameters_without_gradient": float(len(want[1].keys() - got[1].keys())),
    }


def models(device: str, sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Each plan: the report of the rewrite, and errors against float64 beside those of the unchanged model."""
    ids = tokens(sizes)
    plain = deepseek_v4(sizes, dtype)
    judge = step(copy.deepcopy(plain).double(), ids)
    plain, ids = plain.to(device), ids.to(device)
    before = attempted(lambda: apart(step(plain, ids), judge))
    here, found = Environment.detect(device), []
    for name, plan in PLANS.items() if here.device == "npu" else [("as planned", PLANS["as planned"])]:
        wanted = [catalogue().kernel(kernel) for kernel in plan.get("enable", ())]
        reasons = [reason for spec in wanted for reason in availability(spec, here)]
        if reasons:
            result = {"outcome": "not run", "reasons": reasons}
        else:
            result = attempted(lambda plan=plan: rewritten(copy.deepcopy(plain), ids, device, plan, judge, before))
        found.append({"model": "DeepSeek-V4, small", "plan": name, "dtype": str(dtype), "eager": before, **result})
        print(f"  {name}: {result['outcome']}", flush=True)
    return found


def rewritten(model: Any, ids: Any, device: str, plan: Any, judge: Any, before: dict[str, Any]) -> dict[str, Any]:
    """One plan's errors: passed if sites are replaced, they answer all calls, and it is about as close as eager."""
    calls.fallbacks.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        kreg.rewrite(model, device, {"input_ids": ids}, **plan)
    errors = apart(step(model, ids), judge)
    report = kreg.report(model)
    replaced = sum(site.status == "replaced" for site in report.sites)
    fallbacks = [f"{kernel}: {reason} (x{n})" for (kernel, reason), n in calls.fallbacks.items()]
    wrong = any(site.verify is not None and not site.verify.passed for site in report.sites)
    close = "logits" in before and all(errors[k] <= NO_FURTHER * before[k] for k in ("logits", "gradients"))
    passed = close and replaced and not wrong and not fallbacks and not report.calls.original
    return {
        "outcome": "passed" if passed else "failed",
        "kreg": errors,
        "replaced": replaced,
        "fallbacks": fallbacks,
        "report": json.loads(report.to_json()),
    }


def benched(device: str, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward and training steps, rewritten beside eager; seconds of this machine in this hour."""

    def build(case: Case) -> tuple[torch.nn.Module, dict[str, Any]]:
        return deepseek_v4(sizes, getattr(torch, case.dtype)).to(device), {"input_ids": tokens(sizes).to(device)}

    found = []
    for name in ("forward", "training"):
        case = Case(sizes["tokens"], "bfloat16", name)
        kind = device.partition(":")[0]
        result = attempted(lambda case=case, kind=kind: asdict(next(run([case], build, kind, baselines=["eager"]))))
        if "outcome" not in result:
            result["outcome"] = "passed" if not result["skipped"] else "failed"
        found.append({"step": name, **result})
        print(f"  {name}: {result['outcome']}", flush=True)
    return found


def _plain(value: Any) -> Any:
    """Data that JSON has a form for: infinite and undefined numbers become words."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
