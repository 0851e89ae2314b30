"""The fused operators for ONNX Runtime on the target: from the bundle, or compiled from its sources."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from ..plugins import build as builder
from ..plugins import locate

KIND = "ort-cpu"
BIN = "plugins/bin"


def find(bundle: Path) -> Path | None:
    """The library to use: named by the environment, compiled here, or from the bundle; None without any."""
    sources = locate.Sources(bundle / "plugins")
    # `off` applies to the bundle's library too.
    if (found := sources.find(KIND)) is not None or locate.is_off(KIND):
        return found
    shipped = bundle / BIN / locate.machine() / locate.KINDS[KIND].library
    return shipped if shipped.is_file() and _loads(shipped) else None


def build(bundle: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Compile the library for this machine into the user's cache, unless it is there already.

    Raises:
        SetupError: CMake or a C++ compiler is missing.
        BuildError: the compiler failed.
    """
    sources = locate.Sources(bundle / "plugins")
    (library,) = builder.build([KIND], progress=progress, sources=sources)
    return library.path


def _loads(path: Path) -> bool:
    """Whether the library, which was linked on another machine, loads on this one."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True
