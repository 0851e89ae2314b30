"""One base class to run a model, whatever runs it: state stays in the session between calls.

`TorchSession` runs the user's module with its cells lifted, `OrtSession` an exported graph. Everything is
imported when it is first asked for: a board has no PyTorch, and none of what derives graphs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arrays import numpy_type
    from .cpu.session import OrtSession
    from .protocol import Session, load_state, save_state
    from .pytorch import TorchSession

__all__ = ["OrtSession", "Session", "TorchSession", "load_state", "numpy_type", "save_state"]

_PLACES = {
    "OrtSession": "cpu.session",
    "Session": "protocol",
    "TorchSession": "pytorch",
    "load_state": "protocol",
    "numpy_type": "arrays",
    "save_state": "protocol",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
