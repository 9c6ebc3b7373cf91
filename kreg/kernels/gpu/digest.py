"""A digest of everything that Triton's compiler sees of a launch, to tell whether a recorded build is still that one.

Triton's own cache key will not do: it changes with the line that a function stands on, and with where Triton is
installed. Here a function is its code without comments, with that of the functions that it calls and the constants that
it reads; Triton and the compilers that it brings are its version.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from types import ModuleType
from typing import Any

INSTALLED = ("extern_libs",)
"""Options that hold paths of Triton's own files."""


def digest(source: Any, options: Any, described: Any) -> str:
    """Of Triton's ``ASTSource``, the back end's options and its ``GPUTarget``: 16 hexadecimal digits."""
    import triton

    seen = {
        "triton": triton.__version__,
        "target": [described.backend, str(described.arch), described.warp_size],
        "code": code(source.fn),
        "signature": list(source.signature.items()),
        "constants": sorted((list(path), str(value)) for path, value in source.constants.items()),
        "known": sorted((list(path), str(value)) for path, value in source.attrs.items()),
        "options": sorted((name, str(value)) for name, value in vars(options).items() if name not in INSTALLED),
    }
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


@cache
def code(function: Any) -> dict[str, str]:
    """The code of a function under ``triton.jit`` and all that it calls, and the constants they read, by name."""
    found: dict[str, str] = {}
    _gather(function, found)
    return dict(sorted(found.items()))


def _gather(function: Any, found: dict[str, str]) -> None:
    from triton import language
    from triton.runtime.jit import JITFunction

    name = f"{function.__module__}.{function.__name__}"
    if name in found or name.startswith("triton."):  # Triton's own are of its version
        return
    tree = ast.parse(function.src)
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    if ast.get_docstring(body) is not None:
        del body.body[0]
    found[name] = ast.unparse(tree)
    for node in ast.walk(tree):
        value = _named(node, function.fn.__globals__)
        if isinstance(value, JITFunction):
            _gather(value, found)
        elif isinstance(value, language.constexpr):
            assert isinstance(node, ast.Name | ast.Attribute)
            found[f"{name}: {ast.unparse(node)}"] = repr(value.value)


def _named(node: ast.AST, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module, stands for outside the function; None: nothing."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(owner := _named(node.value, names), ModuleType):
        return getattr(owner, node.attr, None)
    return None
