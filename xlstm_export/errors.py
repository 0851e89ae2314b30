"""The errors that a user can meet, each with a hint what to do and an exit code.

A user of the CLI meets only `ExportError` and its subclasses; any other exception is reported as a bug.
"""

from __future__ import annotations

import difflib
from pathlib import Path


class ExportError(Exception):
    """Base of all errors that a user can act on.

    Args:
        message: what is wrong and what was found.
        hint: what to do about it; printed on its own line.
    """

    exit_code = 5

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class GateError(ExportError):
    """A verification or comparison exceeds a limit (exit code 1)."""

    exit_code = 1


class UsageError(ExportError):
    """The options contradict each other or name something that does not exist (exit code 2)."""

    exit_code = 2


class SetupError(ExportError):
    """The machine lacks something: a package, disk space, write permission (exit code 3)."""

    exit_code = 3


class InputError(ExportError):
    """A checkpoint, data file or run folder is unusable as it is (exit code 4)."""

    exit_code = 4


class BuildError(ExportError):
    """Tracing, graph construction or parsing failed (exit code 5)."""

    exit_code = 5


class UserCodeError(BuildError):
    """Code of the user, such as the forward of their module, raised an exception (exit code 5)."""


class CannotStreamError(BuildError):
    """The model cannot carry states from call to call; the export says what to do instead (exit code 5)."""


def similar(path: Path) -> Path | None:
    """What is there under a name like this one; None if there is nothing."""
    place = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        known = names_in(place)
        if part not in (*known, ".."):
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
            if not near:
                return None
            part = near[0]
        place /= part
    return place


def names_in(folder: Path) -> list[str]:
    """Names in a folder; none where it cannot be read."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
