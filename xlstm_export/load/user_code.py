"""Import of a user's function, named as package.module:function; errors name the user's code as source."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ..errors import ExportError, InputError, UsageError


def load_function(spec: str, label: str) -> Callable[..., Any]:
    """Import a function, also from a package in the folder the command runs in.

    Args:
        spec: package.module:function, both parts given.
        label: how messages name it.

    Raises:
        UsageError: there is no such module or function, or this process has imported another module of that
            name.
        InputError: importing the module raised something.
    """
    module_name, _, attribute = spec.partition(":")
    look_here_first()
    _require_module_of_here(module_name.partition(".")[0], label)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ExportError:
        raise
    except ImportError as error:
        raise UsageError(
            f"{label}: {error}", "run from the folder that holds the package, or install it"
        ) from error
    except AttributeError as error:
        raise UsageError(f"{label}: {error}", "name a function of that module") from error
    except Exception as error:
        raise InputError(
            f"{label}: importing {module_name} raised {type(error).__name__}: {error}",
            "import it by itself to see where; --debug shows the traceback",
        ) from error
    return function


def look_here_first() -> None:
    """Put the folder the command runs in before others, which earlier calls may have added."""
    here = str(Path.cwd())
    if sys.path[:1] != [""] and sys.path[:1] != [here]:
        sys.path[:] = [here, *(entry for entry in sys.path if entry != here)]


def _require_module_of_here(name: str, label: str) -> None:
    """Raise UsageError where a module of that name was imported from another place than it has here."""
    loaded = sys.modules.get(name)
    before = getattr(getattr(loaded, "__spec__", None), "origin", None)
    if before is None or (found := PathFinder.find_spec(name)) is None or found.origin is None:
        return
    if Path(before).resolve() != Path(found.origin).resolve():
        raise UsageError(
            f"{label}: this process has imported another {name}, {before}",
            f"rename one of them, or use a process of its own for {found.origin}",
        )
