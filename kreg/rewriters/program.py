"""ExportedPrograms in and out: made functional for the pipeline, and put together again around its result."""

from __future__ import annotations

import copy
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch._export.passes.replace_set_grad_with_hop_pass import replace_set_grad_with_hop_pass
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from kreg.errors import ArtifactError, CaptureError
from kreg.rewriters.capture import first_sentences
from kreg.rewriters.facts import op_nodes, site_id
from kreg.rewriters.functional import drop_idle_switches, functionalize, trace_gradients
from kreg.rewriters.graph import FIXED, NOTE, PARAMETER, STORED
from kreg.rewriters.report import Report
from kreg.version import __version__

FORMAT = 1
"""Version of what kreg writes into a program; a reader refuses a newer one."""


@dataclass(frozen=True)
class Functional:
    """A program, and its graph without mutation: every node in one graph, gradient switches and all."""

    program: ExportedProgram
    module: GraphModule
    signature: ExportGraphSignature


def functional(program: ExportedProgram) -> Functional:
    """The program in functional, pre-dispatch ATen, with the same inputs and outputs.

    Raises:
        ArtifactError: a newer kreg made the program.
        CaptureError: it holds what cannot be made functional, such as a batch dimension of ``vmap``.
    """
    check_format(program)
    _unify_sizes(program)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    try:
        with torch.enable_grad():
            module, signature = functionalize(program.graph_module, values)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the exported graph cannot be made functional: {type(error).__name__}: {first_sentences(error)}. "
            f"Nothing was changed. Rewrite the model itself: kreg.rewrite(model) needs no graph of the whole"
        ) from error
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for new, old in zip(inputs, placeholders, strict=True):
        new.name = new.target = old.name
        new.meta = {**old.meta, **new.meta}
        if getattr(old.meta["val"], "requires_grad", False):  # which a trace does not keep
            new.meta["val"] = new.meta["val"].detach().requires_grad_()
    module.recompile()
    specs = program.graph_signature.input_specs
    for position, spec in enumerate(specs):
        inputs[position].meta[PARAMETER] = spec.kind is InputKind.PARAMETER
        if position not in signature.written and spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER):
            inputs[position].meta |= _stored(program, spec)
    with torch.enable_grad():
        trace_gradients(module, values)  # again, now that stored tensors are known
    mutated = [specs[position] for position in signature.written]
    outputs = _output_specs(program, module, mutated)
    return Functional(program, module, ExportGraphSignature(list(specs), outputs))


def _unify_sizes(program: ExportedProgram) -> None:
    """Symbols that the exporter's guards say are equal become one, so that sizes made of them compare."""
    sizes = (s for node in program.graph.nodes for s in getattr(node.meta.get("val"), "shape", ()))
    environment: Any = next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
    for guard in () if environment is None else [g.expr for g in environment.guards]:
        if not isinstance(guard, sympy.Eq):
            continue
        difference = environment.replace(sympy.expand(guard.lhs - guard.rhs))
        symbols = sorted(difference.free_symbols, key=str)
        if len(symbols) == 2 and difference in (symbols[0] - symbols[1], symbols[1] - symbols[0]):
            environment._set_replacement(symbols[1], symbols[0], "equal by a guard")


def _stored(program: ExportedProgram, spec: InputSpec) -> dict[str, Any]:
    """What is known of a buffer or a constant; nothing of a fake one, which stands for any."""
    name = spec.target or ""
    value = program.constants.get(name, program.state_dict.get(name))
    if value is None or isinstance(value, FakeTensor) or not isinstance(value, torch.Tensor) or value.is_meta:
        return {}
    return {STORED: value, FIXED: spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False}


def _output_specs(program: ExportedProgram, module: GraphModule, mutated: Sequence[InputSpec]) -> list[OutputSpec]:
    """New values of mutated inputs come first, then the program's own outputs."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    kinds = {
        InputKind.BUFFER: OutputKind.BUFFER_MUTATION,
        InputKind.USER_INPUT: OutputKind.USER_INPUT_MUTATION,
    }
    own = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    values = output.args[0]
    specs: list[OutputSpec] = []
    for spec, value in zip(mutated, values, strict=False):
        target = spec.target if spec.kind is InputKind.BUFFER else spec.arg.name
        kind = kinds.get(spec.kind, OutputKind.PARAMETER_MUTATION)
        specs.append(OutputSpec(kind, TensorArgument(name=value.name), target))
    for before, value in zip(own, values[len(mutated) :], strict=True):
        specs.append(OutputSpec(OutputKind.USER_OUTPUT, _renamed(before.arg, value), before.target))
    return specs


def _renamed(argument: Any, value: Any) -> Any:
    if not isinstance(value, Node):
        return argument
    return SymIntArgument(value.name) if isinstance(argument, SymIntArgument) else TensorArgument(value.name)


def rebuilt(functional: Functional, module: GraphModule) -> ExportedProgram:
    """The program around another graph of the same inputs and outputs."""
    drop_idle_switches(module)
    signature = _following(functional.signature, module)
    module, passed = replace_set_grad_with_hop_pass(module, signature)
    return _around(functional.program, module, passed or signature)


def _as_it_was(program: ExportedProgram) -> ExportedProgram:
    return _around(program, copy.deepcopy(program.graph_module), copy.deepcopy(program.graph_signature))


def _around(program: ExportedProgram, module: GraphModule, signature: ExportGraphSignature) -> ExportedProgram:
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[_loadable(entry) for entry in program.module_call_graph],
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


class Outputs(dict[str, Any]):
    """Named outputs, by name, as attributes or by position, like those of the library that the model came from."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


pytree.register_pytree_node(
    Outputs,
    lambda outputs: (list(outputs.values()), list(outputs)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="kreg.Outputs",
    to_dumpable_context=list,
    from_dumpable_context=list,
)

_LOADED_WITH_TORCH = frozenset({"builtins", "collections", "torch", "kreg"})


def _loadable(entry: ModuleCallEntry) -> ModuleCallEntry:
    """A call signature without the output classes of other libraries, which would have to be imported to load it."""
    if entry.fqn or entry.signature is None:
        return entry
    return replace(entry, signature=replace(entry.signature, out_spec=_own(entry.signature.out_spec)))


def _own(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    if spec.is_leaf():
        return spec
    children = [_own(child) for child in spec.children()]
    names = spec.context
    foreign = spec.type.__module__.partition(".")[0] not in _LOADED_WITH_TORCH
    if foreign and isinstance(names, list) and len(names) == len(children) and all(isinstance(n, str) for n in names):
        return pytree.TreeSpec(Outputs, names, children)
    return pytree.TreeSpec(spec.type, names, children)


def _following(signature: ExportGraphSignature, module: GraphModule) -> ExportGraphSignature:
    """The signature with the names that the outputs have now."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    specs = [
        OutputSpec(spec.kind, _renamed(spec.arg, value), spec.target)
        for spec, value in zip(signature.output_specs, output.args[0], strict=True)
    ]
    return ExportGraphSignature(list(signature.input_specs), specs)


def finished(functional: Functional, module: GraphModule, report: Report) -> ExportedProgram:
    """The program around a rewritten graph, which remembers the report; one without ops is what it was.

    Without mutation tensors may lie in memory in another order, which is the order that random numbers are drawn in.
    """
    _note(module, report)
    program = rebuilt(functional, module) if any(op_nodes(module.graph)) else _as_it_was(functional.program)
    _reports[program] = report
    return program


def _note(module: GraphModule, report: Report) -> None:
    """Writes into the op nodes what a later reader needs: the format, the version, and the report."""
    masks = {site.id: site.mask for site in report.sites}
    for position, (node, _) in enumerate(op_nodes(module.graph)):
        entry: dict[str, Any] = {"format": FORMAT, "version": __version__, "mask": masks.get(site_id(node))}
        if position == 0:
            entry["report"] = report.to_json(indent=None)
        node.meta["custom"] = {**node.meta.get("custom", {}), NOTE: entry}


def _entries(program: ExportedProgram) -> Iterator[dict[str, Any]]:
    for node in program.graph.nodes:
        entry = (node.meta.get("custom") or {}).get(NOTE)
        if entry is not None:
            yield entry


def placed(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """The program on a device: its tensors, and the tensors that its code makes. The given one is left as it is."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    if {v.device.type for v in values if isinstance(v, torch.Tensor)} <= {device.type}:
        return program
    moved: dict[int, tuple[Any, Any]] = {}  # by identity, so that what was tied stays tied

    def move(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in moved:
            new = value.detach().to(device).requires_grad_(value.requires_grad)
            moved[id(value)] = value, torch.nn.Parameter(new, value.requires_grad) if _is_parameter(value) else new
        return moved[id(value)][1]

    module = copy.deepcopy(program.graph_module)
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.args, node.kwargs = pytree.tree_map_only(torch.device, move, (node.args, node.kwargs))
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(move, node.meta["val"])
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict={name: move(value) for name, value in program.state_dict.items()},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=pytree.tree_map(move, program.example_inputs),
        constants={name: move(value) for name, value in program.constants.items()},
        verifiers=program.verifiers,
    )


def _is_parameter(value: torch.Tensor) -> bool:
    return isinstance(value, torch.nn.Parameter)


def check_format(program: ExportedProgram) -> None:
    """Raises ArtifactError if a newer kreg made the program."""
    for entry in _entries(program):
        refuse_newer(entry["format"], entry["version"])


def refuse_newer(found: int, version: str) -> None:
    """Raises ArtifactError if ``found`` is a format that this kreg does not know."""
    if found > FORMAT:
        raise ArtifactError(
            f"the program was made by kreg {version} (format {found}); this is kreg {__version__}, which reads "
            f"formats up to {FORMAT}. Upgrade: pip install -U 'kreg>={version}'"
        )


_reports: WeakKeyDictionary[ExportedProgram, Report] = WeakKeyDictionary()


def report_of(program: ExportedProgram) -> Report | None:
    """The report of the rewrite that made a program, without graphs if it was loaded; None if kreg did not."""
    if program in _reports:
        return _reports[program]
    for entry in _entries(program):
        if "report" in entry:
            data = json.loads(entry["report"])
            data.pop("summary", None)
            return Report.model_validate(data)
    return None


_ENTRY = re.compile(r'"format\\*": (\d+), \\*"version\\*": \\*"([^"\\]+)')


def load(path: str | os.PathLike[str]) -> ExportedProgram:
    """``torch.export.load`` that says why a file cannot be read.

    Raises:
        ArtifactError: no such file, no such program, or one that a newer kreg made.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    for found, version in _ENTRY.findall(archive.read(name).decode("utf-8", "replace")):
                        refuse_newer(int(found), version)
    except zipfile.BadZipFile as error:
        raise ArtifactError(f"{str(path)!r} is not a .pt2 archive: {error}") from error
    try:
        return torch.export.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise ArtifactError(
            f"{str(path)!r} could not be loaded by torch {torch.__version__}: {type(error).__name__}: {reason}"
        ) from error
