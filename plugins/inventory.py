"""The built libraries: their sources, and whether they load on this machine."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from xlstm_export.plugins.locate import KINDS, OWN, Built, Sources, computed_attributes

from xlstm_export.ops.operands import OPERATORS


@dataclass(frozen=True)
class Entry:
    """A built library.

    Attributes:
        problem: why it does not load on this machine; empty where it does.
    """

    built: Built
    problem: str

    def to_json(self) -> dict[str, object]:
        return {
            "kind": self.built.kind,
            "path": str(self.built.path),
            "current": self.built.current,
            "loads": not self.problem,
            "problem": self.problem,
            "manifest": self.built.manifest,
        }


def inventory(sources: Sources = OWN) -> list[Entry]:
    """Every library in the cache, kind by kind, the newest first; `sources` decide which are current."""
    found = [built for kind in KINDS for built in sources.cached(kind)]
    return [Entry(built, built.problem or loading_problem(built.path)) for built in found]


def unknown_attributes(path: Path) -> frozenset[str]:
    """The attributes of the operators that a library for ONNX Runtime does not compute.

    None for a library that does not load: whoever runs it is told.
    """
    try:
        known = computed_attributes(path)
    except OSError:
        return frozenset()
    newer = {x.name for operator in OPERATORS.values() for x in operator.attributes if not x.declared}
    return frozenset(newer) - known


def loading_problem(path: Path) -> str:
    """The dynamic linker's error for a library; empty when it loads."""
    try:
        # Unresolved symbols count now, not at the first call; nothing becomes visible to other libraries.
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        return str(error)
    return ""
