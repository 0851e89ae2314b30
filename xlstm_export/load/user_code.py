"""Functions of the user's own, named as package.module:function; errors in their code are told as theirs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ExportError, InputError, UsageError


def load_function(spec: str, said: str) -> Callable[..., Any]:
    """Import a function, also from a package in the folder the command runs in.

    Args:
        spec: package.module:function, both parts given.
        said: how messages name it.

    Raises:
        UsageError: there is no such module or function.
        InputError: importing the module raised something.
    """
    module_name, _, attribute = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ExportError:
        raise
    except ImportError as error:
        raise UsageError(
            f"{said}: {error}", "run from the folder that holds the package, or install it"
        ) from error
    except AttributeError as error:
        raise UsageError(f"{said}: {error}", "name a function of that module") from error
    except Exception as error:
        raise InputError(
            f"{said}: importing {module_name} raised {type(error).__name__}: {error}",
            "import it by itself to see where; --debug shows the traceback",
        ) from error
    return function
