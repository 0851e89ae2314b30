"""Code of the user: importing a function of theirs, and where in their code an exception comes from."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, FrameType
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
        place = place_of(error)
        raise UsageError(
            f"{label}: {error}" + (place and f" ({place})"),
            "run from the folder that holds the package, or install it",
        ) from error
    except AttributeError as error:
        if not place_of(error):
            raise UsageError(f"{label}: {error}", "name a function of that module") from error
        raise _not_imported(label, module_name, error) from error
    except Exception as error:
        raise _not_imported(label, module_name, error) from error
    except SystemExit as error:
        refuse_exit(error, f"{label}: importing {module_name}")
        raise
    return function


def _not_imported(label: str, module_name: str, error: Exception) -> InputError:
    return InputError(
        f"{label}: importing {module_name} raised {described(error)}",
        "it is an error of that module; --debug shows the traceback",
    )


def refuse_exit(error: SystemExit, what: str) -> None:
    """Raise InputError where the user's code ended the process, as argparse does."""
    if comes_from_user(error):
        raise InputError(
            f"{what} ended the process with {described(error)}",
            'a command line is read there that is not its own; leave that to `if __name__ == "__main__":`',
        ) from error


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


# --- Where an exception comes from ----------------------------------------------------------------------

_OURS = __package__.partition(".")[0]
# Code that others call, and that raises where the caller made a mistake; `precise` runs operators for others.
_MACHINERY = frozenset(
    {"torch", "numpy", "onnxscript", "onnx", "onnx_ir", "importlib", f"{_OURS}.lift.precise"}
)
_STANDARD = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})


_HERE = str(Path(__file__).resolve().parents[1])
_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def described(error: BaseException) -> str:
    """An exception as text: type, message, and the place in the user's code if it comes from there."""
    text = " ".join(str(error).split())[:400]
    place = place_of(error)
    return type(error).__name__ + (text and f": {text}") + (place and f", at {place}")


def place_of(error: BaseException) -> str:
    """File, line and function where the user's code raised an exception, or called what did; "" if nowhere.

    Where only packages are involved that the user has installed, the place in them.
    """
    if isinstance(error, SyntaxError) and error.filename and not isinstance(error, ImportError):
        return f"{_shown(error.filename)}:{error.lineno}"
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    return _place(frames, "user") or _place(frames, "package")


def place_here() -> str:
    """File, line and function of the module's code that runs in a forward pass; "" if none does."""
    running = list(itertools.takewhile(_inside, traceback.walk_stack(sys._getframe(1))))
    return _place(running, "user") or _place(running, "package")


def line_in(trace: str) -> str:
    """File, line and function of the user's code in a traceback that is text; "" if there is none."""
    for file, line, name in reversed(_LINE.findall(trace)):
        real = os.path.realpath(file)
        installed = {"site-packages", "dist-packages"} & set(Path(real).parts)
        if not installed and not real.startswith((*_STANDARD, _HERE)):
            return f"{_shown(file)}:{line}, in {name}"
    return ""


def instruction_here() -> tuple[str, int, int] | None:
    """File, line and instruction of the user's code, or of a package of theirs, that is running."""
    frames = [*traceback.walk_stack(sys._getframe(1))]
    for kind in ("user", "package"):
        for frame, line in frames:
            if _kind(frame) == kind:
                return frame.f_code.co_filename, line, frame.f_lasti
    return None


def _inside(entry: tuple[FrameType, int]) -> bool:
    """Whether a frame is deeper than the function that begins a forward pass."""
    return entry[0].f_globals.get("__name__") != f"{_OURS}.lift.passes"


def comes_from_user(error: BaseException) -> bool:
    """Whether an exception was raised in the user's own code, or by a library that it called directly."""
    return _raiser(error, None) == "user"


def comes_from_us(error: BaseException, boundary: CodeType) -> bool:
    """Whether an exception was raised in this package, deeper than the function `boundary`."""
    return _raiser(error, boundary) == "ours"


def _raiser(error: BaseException, boundary: CodeType | None) -> str:
    """The kind of the innermost code that is responsible for an exception."""
    for frame, _ in [*traceback.walk_tb(error.__traceback__)][::-1]:
        if frame.f_code is boundary:
            break
        if (kind := _kind(frame)) != "machinery":
            return kind
    return ""


def _place(frames: Iterable[tuple[FrameType, int]], kind: str) -> str:
    for frame, line in frames:
        if _kind(frame) == kind:
            return f"{_shown(frame.f_code.co_filename)}:{line}, in {frame.f_code.co_name}"
    return ""


def _kind(frame: FrameType) -> str:
    """Whose code a frame runs: "ours", "user", "package" (installed) or "machinery"."""
    name, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
    root = name.partition(".")[0]
    if {root, name} & _MACHINERY or (file.startswith("<") and name != "__main__"):
        return "machinery"
    if root == _OURS:
        return "ours"
    if {"site-packages", "dist-packages"} & set(Path(file).parts):
        return "package"
    return "machinery" if os.path.realpath(file).startswith(_STANDARD) else "user"


def _shown(file: str) -> str:
    """A path relative to the folder the command runs in, where the file lies below it."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here) if file.startswith(here) else file
