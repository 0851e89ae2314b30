"""Hashes of a factory's source code, so that a resumed run notices that the model's code has changed."""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ..atomic import sha256
from .user_code import look_here_first

# Where the interpreter and installed packages are; the versions of these are hashed elsewhere.
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OWN = Path(__file__).parents[1]


def code_hashes(factory: str) -> dict[str, str]:
    """Module → SHA-256, for the module of a factory and all that it imports from outside installed packages.

    Nothing is imported: import statements are read from the source, wherever they stand in it. Modules that
    the code imports by a name it computes, and files other than Python sources, are not seen.

    Args:
        factory: package.module:function.
    """
    look_here_first()
    found: dict[str, str] = {}
    seen: set[str] = set()
    todo = [factory.partition(":")[0]]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0]] if "." in name else []
        path = _source(name)
        if path is not None:
            found[name] = sha256(path)
            todo += _imports(path, name)
    return dict(sorted(found.items()))


def _source(name: str) -> Path | None:
    """The file of a module, if it is Python source of the user's own."""
    spec = _find(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    if "site-packages" in path.parts or any(path.is_relative_to(place) for place in (*_INSTALLED, _OWN)):
        return None
    return path if path.is_file() else None


def _find(name: str) -> ModuleSpec | None:
    """As importlib finds a module, without importing the packages around it."""
    above, _, _ = name.rpartition(".")
    if not above:
        try:
            return importlib.util.find_spec(name)
        except (ImportError, ValueError):  # ValueError: a module that was made by hand
            return None
    package = _find(above)
    if package is None or package.submodule_search_locations is None:
        return None
    folders = list(package.submodule_search_locations)
    try:
        return PathFinder.find_spec(name, folders)
    except KeyError:  # a folder without __init__.py, in a package that is not imported
        spec = ModuleSpec(name, None, is_package=True)
        inner = [os.path.join(folder, name.rpartition(".")[2]) for folder in folders]
        spec.submodule_search_locations = [folder for folder in inner if os.path.isdir(folder)]
        return spec


def _imports(path: Path, name: str) -> Iterator[str]:
    """Names that import statements of a file may import; modules, and what might be functions in them."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # importing it reports that
        return
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
