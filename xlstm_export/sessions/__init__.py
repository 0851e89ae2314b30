"""One protocol to run a model, whatever runs it: state stays in the session between calls.

`TorchSession` runs the user's module with its cells lifted, `OrtSession` an exported graph. What they run is
imported when a session is opened, not here.
"""

from .ort import OrtSession
from .protocol import Session, StatefulSession, load_state, numpy_type, save_state
from .pytorch import TorchSession

__all__ = [
    "OrtSession",
    "Session",
    "StatefulSession",
    "TorchSession",
    "load_state",
    "numpy_type",
    "save_state",
]
