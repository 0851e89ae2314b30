"""Detection of recurrences that a model calls as functions of known libraries.

A module is recognized by its class, but a function call leaves no trace in a module. So the example run is
observed: it records which functions run, and changes nothing in the user's code or the library.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn

from ..errors import BuildError
from .functions import FILE

# Package or module → why its functions cannot be exported.
LIBRARIES = {
    "flashrnn": 'only its function "slstm" is known, called with a config whose output_shape begins with S',
    "mlstm_kernels": "its kernels for whole sequences are known, and mLSTMBackend; not this one",
    "xlstm.blocks.mlstm.backends": "the cells of xlstm are known, not the functions they are made of",
    "xlstm.blocks.slstm.src": "the cells of xlstm are known, not the functions they are made of",
    "fla.ops": "only simple_gla and linear_attn with normalize=False are known, with heads behind positions",
    "mamba_ssm.ops": "it has no operator here",
}
_PACKAGES = {name.partition(".")[0] for name in LIBRARIES}
HINT = (
    "make an nn.Module of the part that calls it and register an adapter for that (docs/adapters.md), or use "
    "a cell that is known"
)


@dataclass
class Seen:
    """The first function of `LIBRARIES` that ran, and the module that called it."""

    function: str = ""
    library: str = ""
    caller: nn.Module | None = field(default=None, repr=False)

    def refuse(self, paths: Mapping[int, str]) -> None:
        """Raise BuildError if such a function ran; `paths` gives the path of a module by its id."""
        if not self.function:
            return
        path = paths.get(id(self.caller), "") or "<root>"
        raise BuildError(
            f"{path}: forward calls {self.function}, a recurrence that is not known here: "
            f"{LIBRARIES[self.library]}",
            HINT,
        )


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """Context manager that records which functions of `LIBRARIES` the block calls, on this thread."""
    seen = Seen()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if (
            event != "call" or seen.function or frame.f_code.co_filename == FILE
        ):  # first: this runs several times per operator
            return
        name = frame.f_globals.get("__name__") or ""
        if name.partition(".")[0] not in _PACKAGES:
            return
        library = next((x for x in LIBRARIES if name == x or name.startswith(f"{x}.")), None)
        # What an import inside forward runs, and what looks a function up, is no recurrence.
        name_of = frame.f_code.co_name
        looks_up = name_of.startswith("get_") or name_of.endswith("_registry")
        if library is None or name_of == "<module>" or looks_up:
            return
        seen.library, seen.function = library, f"{name}.{frame.f_code.co_name}"
        seen.caller = _caller(frame)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def _caller(frame: FrameType | None) -> nn.Module | None:
    """The innermost module around a call."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None
