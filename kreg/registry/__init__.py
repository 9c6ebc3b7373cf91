"""What can be chosen: the contracts of ops, the specs of kernels, the environment, and the plan."""

# The function ``catalogue`` stays in its module: here it would hide the module of the same name.
from kreg.registry.catalogue import Catalogue, register
from kreg.registry.constraints import Constraint, SymbolicSize, Verdict
from kreg.registry.environment import Environment, availability
from kreg.registry.op import Op, Tolerance
from kreg.registry.plan import Choice, Plan, Rejection, SiteFacts, make_plan
from kreg.registry.selection import selection_from_environment
from kreg.registry.sources import kernel
from kreg.registry.spec import Cost, KernelSpec

__all__ = [
    "Catalogue",
    "Choice",
    "Constraint",
    "Cost",
    "Environment",
    "KernelSpec",
    "Op",
    "Plan",
    "Rejection",
    "SiteFacts",
    "SymbolicSize",
    "Tolerance",
    "Verdict",
    "availability",
    "kernel",
    "make_plan",
    "register",
    "selection_from_environment",
]
