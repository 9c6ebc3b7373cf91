"""What is here to run on: device, architecture, packages, and the peak rates that declared costs refer to."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Any, Protocol

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from kreg.errors import SelectionError
from kreg.registry.ops.to_come import no_contract
from kreg.registry.spec import KernelSpec, device_hint, known_device
from kreg.registry.wording import listing

UNKNOWN_VERSION = "unknown"
"""The version of a package that can be imported but was not installed: a checkout on the path."""


@dataclass(frozen=True)
class Peaks:
    """Floating-point operations and bytes per second that a device can reach at most."""

    flops: float
    bandwidth: float


BACKENDS = {"npu": "torch_npu"}
"""Packages that bring a device to torch, which loads them unless TORCH_DEVICE_BACKEND_AUTOLOAD is 0."""

# Vendors' data sheets, dense 16-bit matrix products; only their ratios matter to a plan.
PEAKS: tuple[tuple[str, str, Peaks], ...] = (
    ("cuda", "sm_8*", Peaks(312e12, 2.0e12)),
    ("cuda", "sm_9*", Peaks(989e12, 3.35e12)),
    ("cuda", "sm_1*", Peaks(2250e12, 8.0e12)),
    ("cuda", "gfx942", Peaks(1307e12, 5.3e12)),
    ("cuda", "gfx950", Peaks(2300e12, 8.0e12)),
    ("cuda", "*", Peaks(300e12, 2.0e12)),
    ("npu", "*", Peaks(313e12, 1.6e12)),
    ("cpu", "*", Peaks(0.3e12, 0.02e12)),
    ("*", "*", Peaks(10e12, 0.2e12)),
)


class Packages(Protocol):
    """A look-up of installed packages."""

    def version(self, package: str) -> str | None:
        """The version of a package, `UNKNOWN_VERSION` where it has none, None where it is not there."""
        ...


class InstalledPackages:
    """The packages of this Python environment."""

    def version(self, package: str) -> str | None:
        """See `Packages`; nothing is imported."""
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            module = package.replace("-", "_").replace(".", "_")
            return UNKNOWN_VERSION if _module_exists(module) else None


class EveryPackage:
    """As if every package were installed."""

    def version(self, package: str) -> str | None:
        """See `Packages`."""
        return UNKNOWN_VERSION


@dataclass(frozen=True)
class Environment:
    """One device to run on.

    Attributes:
        device: torch's device type; "cuda" covers ROCm.
        architecture: "sm_90", "gfx942", "Ascend910B1", a CPU's capability; None where unknown.
        name: as the vendor writes it.
        present: whether the device is there.
        packages: what is installed.
        assumed: whether this is a supposition, for a plan without the device.
    """

    device: str
    architecture: str | None = None
    name: str = ""
    present: bool = True
    packages: Packages = field(default_factory=InstalledPackages)
    assumed: bool = False

    @property
    def peaks(self) -> Peaks:
        """Declared peak rates."""
        architecture = self.architecture or ""
        return next(p for d, a, p in PEAKS if fnmatchcase(self.device, d) and fnmatchcase(architecture, a))

    @staticmethod
    def detect(device: str | torch.device | None = None) -> Environment:
        """What is here; None asks for torch's default device. A device that is not there is not ``present``.

        Raises:
            SelectionError: no such device type, or no device of this index.
        """
        kind, index = _device(device)
        if kind == "cpu":
            return Environment("cpu", torch.backends.cpu.get_cpu_capability(), platform.processor() or "CPU")
        if kind == "meta":
            return Environment("meta", None, "no memory, shapes only")
        # A backend that is installed but not loaded has no module here: it is not imported to find out.
        module = getattr(torch, kind, None)
        if module is None or not getattr(module, "is_available", lambda: False)():
            return Environment(kind, None, "not present", present=False)
        count = int(module.device_count())
        if index is not None and index >= count:
            raise SelectionError(f"device {kind}:{index} was asked for; there are {count}: 0 to {count - 1}")
        return Environment(kind, *_DETECT.get(kind, _detect_other)(module, index or 0))

    @staticmethod
    def supposed(device: str | torch.device, architecture: str | None = None) -> Environment:
        """As if a device and every package were there, for plans from the specs alone.

        Raises:
            SelectionError: no such device type.
        """
        kind, _ = _device(device)
        return Environment(kind, architecture, "supposed", packages=EveryPackage(), assumed=True)


def availability(spec: KernelSpec, environment: Environment) -> list[str]:
    """Why a kernel cannot run in an environment: sentences, none where it can."""
    reasons = []
    if environment.device not in spec.devices:
        return [f"it runs on {listing(spec.devices)}, not on {environment.device}"]
    never = no_contract(spec.op)
    if never:  # whatever else is missing, no command does away with this
        return [never]
    if not environment.present:
        reasons.append(absence(environment))
    elif not _architecture_fits(spec.architectures, environment):
        found = environment.architecture or "of unknown architecture"
        reasons.append(f"it needs {listing(spec.architectures)}, the {environment.device} device is {found}")
    for text in spec.requires:
        reason = _package_problem(Requirement(text), environment.packages)
        if reason:
            reasons.append(reason)
        elif not isinstance(environment.packages, EveryPackage):
            reasons.extend(_modules_problem(Requirement(text), spec.modules))
    if not environment.assumed:
        missing = [m for m in _own_modules(spec) if not _module_exists(m)]
        reasons.extend(f"its adapter module {m} is not part of this version of kreg" for m in missing)
    return reasons


def _device(device: str | torch.device | None) -> tuple[str, int | None]:
    chosen = torch.get_default_device() if device is None else device
    if isinstance(chosen, torch.device):
        return chosen.type, chosen.index
    kind, _, index = chosen.partition(":")
    if not known_device(kind) or not (index.isdigit() or chosen == kind):
        raise SelectionError(f"device {chosen!r} is not known{device_hint(kind)}")
    return kind, int(index) if index else None


def _detect_cuda(module: Any, index: int) -> tuple[str | None, str]:
    properties = module.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.name
    return f"sm_{properties.major}{properties.minor}", properties.name


def _detect_npu(module: Any, index: int) -> tuple[str | None, str]:
    name = module.get_device_name(index)
    return name, name


def _detect_other(module: Any, index: int) -> tuple[str | None, str]:
    named = getattr(module, "get_device_name", None)
    return None, named(index) if named else module.__name__.rpartition(".")[2]


_DETECT: dict[str, Callable[[Any, int], tuple[str | None, str]]] = {"cuda": _detect_cuda, "npu": _detect_npu}


def _architecture_fits(conditions: tuple[str, ...], environment: Environment) -> bool:
    if not conditions:
        return True
    if environment.architecture is None:
        return environment.assumed
    return any(_fits(condition, environment.architecture) for condition in conditions)


def _fits(condition: str, architecture: str) -> bool:
    if not condition.endswith("+"):
        return fnmatchcase(architecture.lower(), condition.lower())
    least, found = (re.match(r"sm_(\d+)", text) for text in (condition, architecture))
    return bool(least and found and int(found[1]) >= int(least[1]))


def _package_problem(requirement: Requirement, packages: Packages) -> str | None:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    version = packages.version(requirement.name)
    if version is None:
        return f"package {requirement.name} is not installed: {_install(requirement)}"
    try:
        fits = version == UNKNOWN_VERSION or requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:  # a vendor's own scheme: there, at least
        fits = True
    if fits:
        return None
    wanted = requirement.specifier
    return f"package {requirement.name} is {version}, and it needs {wanted}: {_install(requirement)}"


def absence(environment: Environment) -> str:
    """Why there is no such device, as far as can be told without loading its backend."""
    package = BACKENDS.get(environment.device)
    if package is None or hasattr(torch, environment.device) or environment.packages.version(package) is None:
        return f"there is no {environment.device} device here"
    return (
        f"package {package} is installed and not loaded: unset TORCH_DEVICE_BACKEND_AUTOLOAD, "
        f"or import {package} before kreg looks for devices"
    )


def _modules_problem(requirement: Requirement, modules: tuple[str, ...]) -> list[str]:
    """A package that is there without a module that a kernel calls: a placeholder, or another version."""
    top = requirement.name.replace("-", "_").lower()
    lacking = [m for m in modules if m.partition(".")[0].lower() == top and not _module_found(m)]
    return [
        f"package {requirement.name} is installed without its module {module}: {_install(requirement)}"
        for module in lacking
    ]


def _module_found(name: str) -> bool:
    """Whether a module is there; its packages are looked into, and not imported."""
    top, *parts = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for number in range(len(parts)):
            places = None if spec is None else spec.submodule_search_locations
            if places is None:
                return False
            spec = PathFinder.find_spec(".".join((top, *parts[: number + 1])), list(places))
    except (ImportError, ValueError):
        return False
    return spec is not None


def _install(requirement: Requirement) -> str:
    return f'pip install "{requirement}"'


def _own_modules(spec: KernelSpec) -> list[str]:
    entries = [e for e in (spec.entry, spec.backward) if e is not None]
    return [m for m in dict.fromkeys(e.partition(":")[0] for e in entries) if m.startswith("kreg.")]


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent is missing, or a module without a spec
        return False
