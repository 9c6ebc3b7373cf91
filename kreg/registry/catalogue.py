"""The catalogue: every op and kernel that kreg knows, from its own files, from packages and from users."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType

from kreg.errors import SelectionError, SpecError
from kreg.registry.contents import Contents, hint_of, largest_sound
from kreg.registry.library import define
from kreg.registry.op import Op
from kreg.registry.ops import BUILTIN_OPS
from kreg.registry.ops.to_come import OPS_TO_COME
from kreg.registry.sources import ENTRY_POINTS, Item, Source, contributed, items_of
from kreg.registry.spec import KernelSpec


class Catalogue:
    """Ops and kernel specs by name. Reading is safe while another thread adds.

    The reference of every op is a kernel named "" that is always there, and is not listed.

    Attributes:
        problems: what other packages contributed and could not be used, in words.
    """

    def __init__(self) -> None:
        self._contents = Contents()
        self._lock = threading.RLock()
        self.problems: tuple[str, ...] = ()

    @staticmethod
    def builtin(*, packages: bool = True) -> Catalogue:
        """kreg's own ops and kernels, and (``packages``) those of installed packages.

        Raises:
            SpecError: one of kreg's own files is malformed.
        """
        built = Catalogue()
        contents = built._contents.plus(BUILTIN_OPS, "kreg")
        for folder in sorted(resources.files("kreg.kernels").iterdir(), key=lambda f: f.name):
            if folder.is_dir():
                for file in sorted(folder.iterdir(), key=lambda f: f.name):
                    if file.name.endswith(".yaml"):
                        where = f"kreg/kernels/{folder.name}/{file.name}"
                        contents = contents.plus(items_of(file, where), where, OPS_TO_COME)
        built._contents = contents.checked()
        if packages:
            built.load_packages()
        return built

    @property
    def ops(self) -> Mapping[str, Op]:
        """Ops by name."""
        return MappingProxyType(dict(self._contents.ops))

    @property
    def specs(self) -> Mapping[str, KernelSpec]:
        """Kernel specs by name."""
        return MappingProxyType(dict(self._contents.specs))

    def op(self, name: str) -> Op:
        """The op of a name.

        Raises:
            SelectionError: there is none.
        """
        ops = self._contents.ops
        if name not in ops:
            raise SelectionError(f"no op is called {name!r}{hint_of(name, ops)}")
        return ops[name]

    def summary(self, op: str) -> str:
        """The summary of an op, or of one to come.

        Raises:
            SelectionError: there is neither.
        """
        return OPS_TO_COME[op] if op in OPS_TO_COME else self.op(op).summary

    def kernel(self, name: str) -> KernelSpec:
        """The spec of a kernel's name.

        Raises:
            SelectionError: there is none.
        """
        specs = self._contents.specs
        if name not in specs:
            raise SelectionError(f"no kernel is called {name!r}{hint_of(name, specs)}")
        return specs[name]

    def kernels_for(self, op: str) -> tuple[KernelSpec, ...]:
        """The kernels of an op, by name."""
        specs = self._contents.specs
        return tuple(specs[name] for name in sorted(specs) if specs[name].op == op)

    def where(self, kernel: str) -> str:
        """The file, package or call that registered a kernel.

        Raises:
            SelectionError: there is none.
        """
        return self._contents.where["kernel", self.kernel(kernel).name]

    def excluded_by(self, kernel: str) -> frozenset[str]:
        """Names of the kernels that may not be used in the same plan, whichever of the two says so.

        Raises:
            SelectionError: there is no such kernel.
        """
        spec = self.kernel(kernel)
        return frozenset(
            other.name
            for other in self._contents.specs.values()
            if other.name != kernel and (_names(spec, other) or _names(other, spec))
        )

    def add_op(self, op: Op) -> None:
        """Add an op.

        Raises:
            SpecError: it is malformed, or another has its name.
        """
        self.add_all((op,), f"add_op({op.name!r})")

    def add(self, spec: KernelSpec, where: str | None = None) -> None:
        """Add a spec; ``where`` says in errors what it came from.

        Raises:
            SpecError: its op is unknown, a constraint is malformed, another kernel has its name, or it
                excludes something that does not exist. Nothing is added.
        """
        self.add_all((spec,), where or f"add({spec.name!r})")

    def load(self, path: str | os.PathLike[str]) -> tuple[KernelSpec, ...]:
        """Add all specs of a YAML file.

        Raises:
            SpecError: as `add`, or the file cannot be read. Nothing is added.
        """
        items = items_of(Path(path), str(path))
        self.add_all(items, str(path))
        return tuple(item for item in items if isinstance(item, KernelSpec))

    def add_all(self, items: Iterable[Item], where: str) -> None:
        """Add ops and specs together, all or none.

        Raises:
            SpecError: as `add`.
        """
        with self._lock:
            self._contents = self._contents.plus(items, where).checked()

    def load_packages(self) -> None:
        """Add what installed packages contribute by the entry point group ``kreg.specs``.

        What cannot be used is left out whole, recorded in `problems`, and warned about once.
        """
        found: dict[str, tuple[Item, ...]] = {}
        problems: list[str] = []
        for point in metadata.entry_points(group=ENTRY_POINTS):
            package = point.dist.name if point.dist else "an unknown package"
            where = f"entry point {point.name!r} of {package} ({point.value})"
            try:
                found[where] = contributed(point, where)
            except Exception as error:  # importing another package may raise anything; kreg must go on
                problems.append(f"{where}: {type(error).__name__}: {error}")
        with self._lock:
            self._contents, refused = largest_sound(self._contents, found)
        self._report([*problems, *refused])

    def _report(self, problems: list[str]) -> None:
        self.problems = (*self.problems, *problems)
        for problem in problems:
            warnings.warn(f"kreg goes on without it: {problem}", stacklevel=3)

    def define_ops(self) -> None:
        """Make every op callable as ``torch.ops.kreg.<name>``; one that torch refuses becomes a problem."""
        for op in self.ops.values():
            try:
                define(op)
            except Exception as error:  # torch raises many types about schemas; kreg must go on
                self._report([f"op {op.name!r}: {type(error).__name__}: {error}"])


def _names(spec: KernelSpec, other: KernelSpec) -> bool:
    return other.name in spec.excludes or any(f"tag:{tag}" in spec.excludes for tag in other.tags)


_process: Catalogue | None = None
_complete = False
_process_lock = threading.RLock()


def catalogue() -> Catalogue:
    """The catalogue of this process, built on first use.

    Raises:
        SpecError: one of kreg's own files is malformed.
    """
    global _process, _complete
    if _complete and _process is not None:
        return _process
    with _process_lock:
        if _process is None:
            # Set before packages are loaded: importing them may register kernels here, through this function.
            _process = Catalogue.builtin(packages=False)
            _process.load_packages()
            _process.define_ops()
            _complete = True
        return _process


def register(thing: Source) -> None:
    """Add an op, a `KernelSpec`, the fields of one, or a YAML file of them to this process's catalogue.

    Raises:
        SpecError: as `Catalogue.add`. Nothing is added.
    """
    where = f"kreg.register({str(thing) if isinstance(thing, str | os.PathLike | Traversable) else '...'})"
    items = items_of(thing, where)
    known = catalogue()
    with known._lock:
        before = known._contents
        known.add_all(items, where)
        try:
            for item in items:
                if isinstance(item, Op):
                    define(item)
        except SpecError:
            known._contents = before
            raise
