"""Where ops and specs come from: YAML files, mappings, entry points of packages, decorated functions."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import yaml

from kreg.errors import SpecError
from kreg.registry.op import Op
from kreg.registry.spec import KernelSpec, hold

ENTRY_POINTS = "kreg.specs"
"""The entry point group by which other packages contribute."""

Item: TypeAlias = Op | KernelSpec
Source: TypeAlias = Op | KernelSpec | Mapping[str, Any] | str | os.PathLike[str] | Traversable
"""What can be registered: an op, a spec, a spec's fields, or a YAML file that lists specs."""

F = TypeVar("F", bound=Callable[..., Any])


def items_of(source: object, where: str) -> tuple[Item, ...]:
    """The ops and specs that a source gives.

    Raises:
        SpecError: a malformed spec, an unreadable file, or something that is none of these.
    """
    if isinstance(source, Op | KernelSpec):
        return (source,)
    if isinstance(source, Mapping):
        return (KernelSpec.read(source, where),)
    if isinstance(source, str):
        return _file(Path(source), where)
    if isinstance(source, os.PathLike | Traversable):
        return _file(source if isinstance(source, Traversable) else Path(source), where)
    if isinstance(source, Iterable):
        return tuple(item for part in source for item in items_of(part, where))
    raise SpecError(
        f"{where}: {source!r} is not something to register; allowed: a KernelSpec, its fields, an Op, "
        "a path to a YAML file, or several of these"
    )


def contributed(point: EntryPoint, where: str) -> tuple[Item, ...]:
    """What an entry point gives: as `items_of`; a relative path is meant from its module's folder.

    An entry point that names a module gives nothing more: importing it is what registers its kernels.

    Raises:
        SpecError: as `items_of`; and whatever importing the module raises.
    """
    found = point.load()
    if isinstance(found, ModuleType):
        return ()
    if isinstance(found, str | os.PathLike):
        folder = Path(importlib.import_module(point.module).__file__ or ".").parent
        found = folder / found
    return items_of(found, where)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may be given once only; YAML itself would keep the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


def _file(path: Traversable, where: str) -> tuple[Item, ...]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: is not YAML: {error}") from None
    if not isinstance(content, list):
        raise SpecError(f"{where}: a YAML list of specs is expected, found {type(content).__name__}")
    return tuple(KernelSpec.read(fields, f"{where}, item {number}") for number, fields in enumerate(content, 1))


def kernel(*, op: str, name: str, backward: Callable[..., Any] | str | None = None, **fields: Any) -> Callable[[F], F]:
    """Register the decorated function as a kernel; it is returned unchanged.

    Args:
        op: the op it computes, with the op's arguments and results.
        name: ``provider.kernel``.
        backward: its gradient, a function or ``module:function``.
        fields: the other fields of `KernelSpec`, at least ``devices`` and ``dtypes``.

    Raises:
        SpecError: as `KernelSpec` and `Catalogue.add`. Nothing is added.
    """
    from kreg.registry.catalogue import catalogue

    def decorate(function: F) -> F:
        gradient = hold(backward) if callable(backward) else backward
        spec = KernelSpec(op=op, name=name, entry=hold(function), backward=gradient, **fields)
        catalogue().add(spec, f"@kernel on {function.__module__}.{function.__qualname__}")
        return function

    return decorate
