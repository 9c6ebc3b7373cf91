"""What finding, planning and replacing cost beside capture, on stacks of more and more layers.

``python -m tests.zoo.cost``, from the root of the repository, prints for each stack the seconds of every stage (the
median of interleaved rounds), and how the cost of kreg's own stages grows with the number of nodes.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kreg.api import settings_for
from kreg.rewriters.capture import export_model
from kreg.rewriters.pipeline import Clock, rewrite_graph
from kreg.rewriters.program import functional
from kreg.rewriters.report import Seconds
from tests.zoo.build import randomized

LAYERS = (2, 4, 8, 16, 32, 64)
ROUNDS = 3
LENGTH = 24

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "use_cache": False,
    "attn_implementation": "eager",
}


def llama(layers: int) -> nn.Module:
    """Layers that are all alike."""
    import transformers

    return _built(transformers.LlamaConfig(num_hidden_layers=layers, **SIZES))


def gemma3(layers: int) -> nn.Module:
    """Layers of two kinds, sliding and full, in turn."""
    import transformers

    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    options = {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": kinds}
    return _built(transformers.Gemma3TextConfig(num_hidden_layers=layers, **SIZES, **options))


STACKS: dict[str, Callable[[int], nn.Module]] = {"llama": llama, "gemma3": gemma3}


def _built(config: Any) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return randomized(transformers.AutoModelForCausalLM.from_config(config)).eval()


@dataclass(frozen=True)
class Cost:
    """One stack: how large its graph is, what was found in it, and the seconds of each stage."""

    model: str
    layers: int
    nodes: int
    sites: int
    replaced: int
    seconds: Seconds

    @property
    def own(self) -> float:
        """Seconds of raising, planning and lowering."""
        return self.seconds.raise_ + self.seconds.plan + self.seconds.lower

    @property
    def share(self) -> float:
        """The same as a part of capture."""
        return self.own / self.seconds.capture

    @property
    def per_node(self) -> float:
        """The same in microseconds a node."""
        return 1e6 * self.own / self.nodes

    def to_json(self) -> dict[str, Any]:
        """One line of the table."""
        return {
            "model": self.model,
            "layers": self.layers,
            "nodes": self.nodes,
            "sites": self.sites,
            "replaced": self.replaced,
            "seconds": self.seconds.model_dump(by_alias=True),
            "share_of_capture": self.share,
            "microseconds_per_node": self.per_node,
        }


def measure(model: str, layers: int, *, verify: bool = True) -> Cost:
    """The cost of one stack, once. No stage pays for clearing away what the one before it left behind."""
    tokens = torch.randint(1, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))
    built, clock = STACKS[model](layers), Clock()
    gc.collect()
    with clock.stage("capture"):
        captured = functional(export_model(built, {"input_ids": tokens})).module
    gc.collect()
    settings = settings_for("cpu", built, verify=verify)
    report = rewrite_graph(captured, settings, model=model, frontend="export", clock=clock).report
    replaced = sum(site.status == "replaced" for site in report.sites)
    return Cost(model, layers, report.nodes, len(report.sites), replaced, report.seconds)


def rounds(models: Sequence[str], layers: Sequence[int], count: int, *, verify: bool = True) -> Iterator[Cost]:
    """Every stack once a round, so that a busy spell of the machine meets them all; first of all a warm-up."""
    for model in models:
        measure(model, min(layers), verify=verify)
    for _ in range(count):
        for depth in layers:
            for model in models:
                yield measure(model, depth, verify=verify)


def medians(costs: Iterable[Cost]) -> list[Cost]:
    """One cost for each stack, each stage's seconds being the median of its rounds'."""
    groups: dict[tuple[str, int], list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.model, cost.layers), []).append(cost)
    return [_median(group) for _, group in sorted(groups.items())]


def _median(costs: Sequence[Cost]) -> Cost:
    first = costs[0]
    stages = {
        stage: statistics.median(cost.seconds.model_dump(by_alias=True)[stage] for cost in costs)
        for stage in first.seconds.model_dump(by_alias=True)
    }
    return Cost(first.model, first.layers, first.nodes, first.sites, first.replaced, Seconds.model_validate(stages))


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """The slope of a straight line through points in logarithmic scale: 1 where y grows as x does, 2 as its square."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return math.nan
    xs, ys = zip(*logs, strict=True)
    return statistics.linear_regression(xs, ys).slope


STAGES = ("capture", "raise", "plan", "lower", "verify")


def exponents(costs: Sequence[Cost]) -> dict[str, float]:
    """How each stage of one model grows with the number of nodes, and kreg's own stages together (``own``)."""
    found = {
        stage: exponent((cost.nodes, cost.seconds.model_dump(by_alias=True)[stage]) for cost in costs)
        for stage in STAGES
    }
    return found | {"own": exponent((cost.nodes, cost.own) for cost in costs)}


def tables(costs: Sequence[Cost]) -> Iterator[Table]:
    """A table for each model."""
    for model in dict.fromkeys(cost.model for cost in costs):
        mine = [cost for cost in costs if cost.model == model]
        table = Table(title=f"{model}: seconds by stage", title_justify="left")
        for column in ("layers", "nodes", "replaced", *STAGES, "raise+plan+lower", "µs a node", "of capture"):
            table.add_column(column, justify="right", no_wrap=True)
        for cost in mine:
            seconds = cost.seconds.model_dump(by_alias=True)
            table.add_row(
                f"{cost.layers}",
                f"{cost.nodes:,}",
                f"{cost.replaced} of {cost.sites}",
                *(f"{seconds[stage]:.3f}" for stage in STAGES),
                f"{cost.own:.3f}",
                f"{cost.per_node:.0f}",
                f"{cost.share:.1%}",
            )
        grows = exponents(mine)
        table.add_section()
        table.add_row("", "exponent", "", *(f"{grows[stage]:.2f}" for stage in STAGES), f"{grows['own']:.2f}", "", "")
        yield table


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(STACKS))
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="a file to write the figures into")
    arguments = parser.parse_args()
    models = arguments.model or list(STACKS)
    console = Console(width=140)
    measured = []
    with console.status("measuring") as status:
        for cost in rounds(models, arguments.layers, arguments.rounds, verify=arguments.verify):
            measured.append(cost)
            status.update(f"{cost.model}, {cost.layers} layers: {cost.nodes:,} nodes")
    costs = medians(measured)
    console.print(*tables(costs))
    share = statistics.median(cost.share for cost in costs)
    console.print(f"median share of capture: {share:.1%} of {len(costs)} stacks, {arguments.rounds} rounds")
    if arguments.json:
        arguments.json.write_text(json.dumps([cost.to_json() for cost in costs], indent=2))


if __name__ == "__main__":
    main()
