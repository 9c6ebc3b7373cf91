"""Which parts of a model are captured alone: layers that repeat, so that depth costs nothing, and what stands beside.

Goes by the module tree's shape. Names and classes play no part, except that layers of a list repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def regions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to capture, by path.

    In a model with stacks, each layer is a region, and each module beside them that is more than one primitive. A
    model without is one region.
    """
    if not any(_is_stack(module) for module in model.modules()):
        return {"": model}
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in _parts("", model):
        if any(True for _ in module.children()):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def scopes(model: nn.Module, regions: Iterable[str]) -> dict[str, nn.Module]:
    """The modules around regions, by path, the model first: their own code makes what is given to regions."""
    paths = {""} | {path[:i] for path in regions for i, c in enumerate(path) if c == "."}
    return {path: model.get_submodule(path) for path in sorted(paths, key=lambda path: path.count(".") + bool(path))}


def _parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if _is_stack(child):
            for item, layer in child.named_children():
                yield f"{inner}.{item}", layer
        elif any(_is_stack(m) for m in child.modules()):
            yield from _parts(inner, child)
        else:
            yield inner, child


def _is_stack(module: nn.Module) -> bool:
    """A container whose items are alike and made of several modules each."""
    if not isinstance(module, LISTS):
        return False
    kinds = {type(item) for item in module.children()}
    return len(kinds) == 1 and all(any(True for _ in item.children()) for item in module.children())
