"""Every error a user can meet, with what to do about it and the exit code it ends in.

Nothing but `ExportError` and its subclasses reaches a user of the CLI; any other exception is a bug
and is reported as one.
"""

from __future__ import annotations


class ExportError(Exception):
    """Something is wrong that the user can act on.

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
    """A verification gate did not pass (exit code 1)."""

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
