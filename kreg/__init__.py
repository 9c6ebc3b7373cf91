"""kreg: a declarative kernel registry and model-rewriting toolkit on torch.fx."""

from kreg.api import analyse, export, lower, program_report, register, report, restore, rewrite
from kreg.errors import ArtifactError, CaptureError, KregError, SelectionError, SpecError
from kreg.registry import Cost, KernelSpec, kernel
from kreg.registry.catalogue import catalogue as _catalogue
from kreg.registry.op import Op, Tolerance
from kreg.rewriters.report import Report
from kreg.rewriters.rules import Rule
from kreg.version import __version__

_catalogue()  # defines the ops, so that a saved program loads with this import alone

__all__ = [
    "ArtifactError",
    "CaptureError",
    "Cost",
    "KernelSpec",
    "KregError",
    "Op",
    "Report",
    "Rule",
    "SelectionError",
    "SpecError",
    "Tolerance",
    "__version__",
    "analyse",
    "export",
    "kernel",
    "lower",
    "program_report",
    "register",
    "report",
    "restore",
    "rewrite",
]
