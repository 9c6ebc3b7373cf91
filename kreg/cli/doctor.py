"""``kreg doctor``: what is here, what is missing, and the command that would install it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kreg.cli.options import Json
from kreg.cli.output import running
from kreg.registry.catalogue import catalogue
from kreg.registry.environment import Environment, InstalledPackages, absence, availability
from kreg.registry.ops.to_come import OPS_TO_COME
from kreg.version import __version__

PACKAGES = ("torch", "transformers", "triton", "torch_npu", "mindspeed", "kernels")
COMPILERS = ("c++", "g++", "clang++")
EXTRAS = {"transformers": 'pip install "kreg[transformers]"', "kernels": 'pip install "kreg[hub]"'}
"""What kreg itself uses where it is there, and how to get it; the rest is what kernels require."""


@dataclass(frozen=True)
class DeviceFacts:
    """A device type: whether it is here, and how many of the kernels made for it can be used."""

    device: str
    present: bool
    architecture: str | None
    name: str
    kernels: int
    usable: int


@dataclass(frozen=True)
class Missing:
    """A package that is not here, what it is for, and the command that would install it."""

    reason: str
    needed_by: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler that PyTorch would use."""

    path: str
    version: str


def doctor(json: Json = False) -> None:
    """Check versions, devices, compiler and kernels: what is missing, and how to install it."""
    with running(json) as output:
        versions = {"kreg": __version__, "python": platform.python_version()}
        installed = InstalledPackages()
        packages: dict[str, str | None] = {**versions, **{name: installed.version(name) for name in PACKAGES}}
        devices, lacking, tool = devices_here(), missing(), compiler()
        problems = catalogue().problems
        facts = {
            "versions": packages,
            "platform": platform.platform(),
            "devices": [asdict(d) for d in devices],
            "compiler": asdict(tool) if tool else None,
            "missing": [asdict(m) for m in lacking],
            "problems": [*problems],
        }
        output.result(facts, *_shown(packages, devices, tool, lacking, problems))


def devices_here() -> list[DeviceFacts]:
    """The devices that some kernel is made for, and those that are here besides."""
    specs = [spec for spec in catalogue().specs.values() if spec.op not in OPS_TO_COME]
    present = [k for k in ("cpu", "cuda", "npu", "xpu", "mps") if Environment.detect(k).present]
    found = []
    for kind in dict.fromkeys([*present, *sorted({d for spec in specs for d in spec.devices})]):
        for which in _each(kind):
            here = Environment.detect(which)
            made = [spec for spec in specs if kind in spec.devices]
            name = here.name if here.present else absence(here)
            usable = sum(not availability(spec, here) for spec in made)
            found.append(DeviceFacts(which, here.present, here.architecture, name, len(made), usable))
    return found


def _each(kind: str) -> list[str]:
    """A device type, or each of its devices where there are several."""
    module = getattr(torch, kind, None)
    count = module.device_count() if kind != "cpu" and module is not None and hasattr(module, "device_count") else 1
    return [f"{kind}:{i}" for i in range(count)] if count > 1 else [kind]


def missing() -> list[Missing]:
    """Packages that kernels require and that are not here, or in another version; and kreg's own extras."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for spec in catalogue().specs.values():
        if spec.op in OPS_TO_COME:  # no package would bring it
            continue
        # Where the device is assumed, only packages are left to be missing.
        for reason in availability(spec, Environment(spec.devices[0], assumed=True)):
            sentence, _, package = reason.partition(": pip install ")
            wanted.setdefault((sentence, f"pip install {package}"), []).append(spec.name)
    found = [Missing(sentence, tuple(names), command) for (sentence, command), names in wanted.items()]
    have = InstalledPackages()
    for name, command in EXTRAS.items():
        if have.version(name) is None:
            found.append(Missing(f"package {name} is not installed", (), command))
    return found


def compiler() -> Compiler | None:
    """The C++ compiler that torch.compile and extensions would use, if there is one."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        path = shutil.which(name) if name else None
        if path:
            try:
                told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
            except (OSError, subprocess.SubprocessError):
                continue
            return Compiler(path, told.splitlines()[0] if told else "unknown version")
    return None


def _shown(
    packages: dict[str, str | None],
    devices: list[DeviceFacts],
    tool: Compiler | None,
    lacking: list[Missing],
    problems: tuple[str, ...],
) -> Iterator[RenderableType]:
    yield Text("Versions", style="bold")
    yield _grid(
        [(name, Text(version) if version else Text("not installed", "dim")) for name, version in packages.items()]
    )
    yield Text("\nDevices", style="bold")
    yield _grid([(d.device, _device(d)) for d in devices])
    yield Text("\nC++ compiler", style="bold")
    none = Text("none: torch.compile's CPU back end needs one, kreg's own kernels do not", "yellow")
    yield Padding(Text(f"{tool.version} ({tool.path})") if tool else none, (0, 0, 0, 2))
    if lacking:
        yield Text("\nMissing", style="bold")
    for package in lacking:
        by = f", needed by {', '.join(package.needed_by)}" if package.needed_by else ""
        yield Padding(Text(f"{package.reason}{by}"), (0, 0, 0, 2))
        yield Padding(Text(package.command, style="cyan"), (0, 0, 0, 4))
    if problems:
        yield Text("\nLeft out of the catalogue", style="bold yellow")
    for problem in problems:
        yield Padding(Text(problem), (0, 0, 0, 2))


def _device(device: DeviceFacts) -> Text:
    if not device.present:
        return Text(f"{device.name}; {device.kernels} kernels are made for it", style="dim")
    name = " ".join(dict.fromkeys(part for part in (device.name, device.architecture) if part))
    style = "green" if device.usable else "yellow"
    return Text.assemble(f"{name}; ", (f"{device.usable} of {device.kernels} kernels can be used", style))


def _grid(rows: list[tuple[str, Text]]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return Padding(table, (0, 0, 0, 2))
