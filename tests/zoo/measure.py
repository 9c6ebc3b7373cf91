"""One specimen, from its configuration to what kreg made of it, as plain data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from kreg.api import analyse
from kreg.errors import CaptureError
from kreg.rewriters.capture import export_model, first_sentences
from tests.zoo.build import CannotBuild, Implementation, Specimen, build
from tests.zoo.oracle import census, is_causal
from tests.zoo.peers import fused_attentions
from tests.zoo.prepared import prepared, with_caches

Record = dict[str, Any]
aten = torch.ops.aten
SOFTMAXES = frozenset(
    {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.scaled_dot_product_attention.default}
)


def measure(
    specimen: Specimen,
    implementation: Implementation,
    *,
    verify: bool = True,
    peers: bool = True,
    tell: Callable[[Record], None] = lambda record: None,
) -> Record:
    """The record of a specimen; ``tell`` is called with what there is before each stage.

    A stage that fails leaves its reason under ``failed`` and ends the record.
    """
    record: Record = {
        "id": specimen.id,
        "name": specimen.name,
        "family": specimen.family,
        "model_class": specimen.model_class,
        "alias_of": specimen.alias_of,
        "implementation": implementation,
        "stage": "build",
        "seconds": {},
    }
    try:
        program = _program(record, specimen, implementation, tell)
        with _stage(record, "analyse", tell):
            report = analyse(program, None, device="cpu", verify=verify)
            record["nodes"] = report.nodes
            record["sites"] = [_site(site) for site in report.sites]
            record["near_misses"] = [miss.model_dump() for miss in report.near_misses]
            record["seconds"]["kreg"] = report.seconds.model_dump(by_alias=True)
    except CannotBuild as reason:
        record["failed"] = str(reason)
        return record
    except CaptureError as error:
        record["failed"] = " ".join(str(error).split())
        return record
    except Exception as error:
        record["failed"] = f"{type(error).__name__}: {first_sentences(error)}"
        return record
    if peers and implementation == "eager":  # a graph in SDPA form has the fused call already
        try:
            with _stage(record, "inductor", tell):
                record["inductor"] = fused_attentions(program)
        except Exception as error:
            record["inductor_failed"] = f"{type(error).__name__}: {first_sentences(error)}"
    record["stage"] = "done"
    return record


def _program(
    record: Record, specimen: Specimen, implementation: Implementation, tell: Callable[[Record], None]
) -> ExportedProgram:
    """Builds, counts and exports.

    What does not export as it is: a model that takes text alone, without images; any other in SDPA form, as
    transformers prepares it.
    """
    try:
        return _counted(record, specimen, implementation, tell)
    except CaptureError as error:
        if specimen.family != "multimodal" and implementation == "sdpa":
            return _prepared(record, specimen, tell, error)
        if specimen.family != "multimodal":
            raise
        record["with_images"] = " ".join(str(error).split())
    try:
        return _counted(record, specimen, implementation, tell, text_only=True)
    except (CannotBuild, CaptureError):
        record["stage"] = "export"
        raise CaptureError(record.pop("with_images")) from None


def _prepared(
    record: Record, specimen: Specimen, tell: Callable[[Record], None], error: CaptureError
) -> ExportedProgram:
    try:
        program = _counted(record, specimen, "sdpa", tell, prepare=prepared)
    except Exception:
        record["stage"] = "export"
        raise error from None
    record["prepared"] = " ".join(str(error).split())
    return program


def _unprepared(model: nn.Module, inputs: Mapping[str, Any]) -> AbstractContextManager[Mapping[str, Any]]:
    return nullcontext(inputs)


def _counted(
    record: Record,
    specimen: Specimen,
    implementation: Implementation,
    tell: Callable[[Record], None],
    text_only: bool = False,
    prepare: Callable[[nn.Module, Mapping[str, Any]], AbstractContextManager[Mapping[str, Any]]] = _unprepared,
) -> ExportedProgram:
    with _stage(record, "build", tell):
        model, inputs = build(specimen, implementation, text_only=text_only)
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with prepare(model, inputs) as ready:
        record["inputs"] = {name: list(getattr(value, "shape", ())) for name, value in ready.items()}
        with _stage(record, "oracle", tell):
            record["oracle"] = census(model, ready).to_json()
            record["causal"] = is_causal(model, ready)
        with _stage(record, "export", tell):
            program = export_model(with_caches(model), ready)
    attentions = record["oracle"]["attentions"]
    left = _softmaxes(program) - Counter(a["module"] for a in attentions if a["used"])
    for attention in attentions:
        if not attention["used"] and left[attention["module"]] > 0:
            attention["used"] = True
            left[attention["module"]] -= 1
    return program


def _softmaxes(program: ExportedProgram) -> Counter[str]:
    """How many softmaxes a graph's outputs depend on, by the path of the module that calls them."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    live = (node for graph in graphs for node in _live(graph) if node.target in SOFTMAXES)
    stacks = (list((node.meta.get("nn_module_stack") or {}).values()) for node in live)
    return Counter(stack[-1][0] for stack in stacks if stack)


def _live(graph: Graph) -> set[Node]:
    """What the output is computed of, and what changes a tensor in place."""
    waiting = [node for node in graph.nodes if node.op == "output" or _changes(node)]
    live: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting.extend(node.all_input_nodes)
    return live


def _changes(node: Node) -> bool:
    """In-place changes of what is used elsewhere too."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None and schema.is_mutable and any(len(source.users) > 1 for source in node.all_input_nodes[:1])
    )


@contextmanager
def _stage(record: Record, name: str, tell: Callable[[Record], None]) -> Iterator[None]:
    record["stage"] = name
    tell(record)
    start = time.perf_counter()
    try:
        yield
    finally:
        record["seconds"][name] = round(time.perf_counter() - start, 3)


def _site(site: Any) -> Record:
    found = site.model_dump(include={"op", "module", "status", "kernel", "reason", "mask", "trainable", "verify"})
    found["mask"] = None if site.mask is None else dict(site.mask)
    return found


def versions() -> dict[str, str]:
    """What a record depends on besides the code."""
    import platform

    import transformers

    import kreg

    return {
        "kreg": kreg.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
