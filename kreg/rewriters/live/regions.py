"""Which parts of a model are captured alone: layers that repeat, so that depth costs nothing, and what stands beside.

Goes by the module tree's shape. Names and classes play no part, except that layers of a list repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def regions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to capture, by path.

    In a model with stacks, each layer is a region, and each module beside them that is more than one primitive. Of a
    layer that is a list of its parts, each part is. A model without stacks is one region.
    """
    if not any(_is_stack(module) for module in model.modules()):
        return {"": model}
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in _parts("", model):
        if any(True for _ in module.children()):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def larger(model: nn.Module, regions: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, nn.Module]:
    """The regions, with the modules around some of them in the place of all that they contain."""
    around = {_around(model, path) for path in paths if path}

    def is_inside(path: str) -> bool:
        return any(path != outer and f"{path}.".startswith(f"{outer}." if outer else "") for outer in around)

    wanted = {path for path in around | {*regions} if not is_inside(path)}
    return {path: module for path, module in model.named_modules(remove_duplicate=False) if path in wanted}


def _around(model: nn.Module, path: str) -> str:
    """The nearest module around a path that can be called."""
    while path:
        path = path.rpartition(".")[0]
        if is_called(model.get_submodule(path)):
            return path
    return path


def is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; a list of modules has none."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def scopes(model: nn.Module, regions: Iterable[str]) -> dict[str, nn.Module]:
    """The modules around regions, by path, the model first: their own code makes what is given to regions."""
    paths = {""} | {path[:i] for path in regions for i, c in enumerate(path) if c == "."}
    return {path: model.get_submodule(path) for path in sorted(paths, key=lambda path: path.count(".") + bool(path))}


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if _is_stack(child):
            for item, layer in child.named_children():
                yield from _called(f"{inner}.{item}", layer)
        elif any(_is_stack(m) for m in child.modules()):
            yield from _parts(inner, child)
        else:
            yield from _called(inner, child)


def _called(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module, or of one without a forward, as a list is, what can be called of it."""
    if is_called(module):
        yield path, module
    else:
        for name, child in module.named_children():
            yield from _called(f"{path}.{name}", child)


def _is_stack(module: nn.Module) -> bool:
    """A container whose items are alike and made of several modules each."""
    if not isinstance(module, LISTS):
        return False
    kinds = {type(item) for item in module.children()}
    return len(kinds) == 1 and all(any(True for _ in item.children()) for item in module.children())
