"""Opens sessions on a run folder or a bundle, on any backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..sessions.protocol import Session

if TYPE_CHECKING:
    from ..load.loaded import Loaded

BACKENDS = ("onnxruntime", "pytorch", "tensorrt")


def open_session(
    folder: Path, backend: str, load: Callable[[], Loaded], threads: int = 0, batch: int = 1
) -> Session:
    """Open a session on `folder`.

    Args:
        folder: run folder; for TensorRT a bundle whose engine is built.
        backend: one of `BACKENDS`.
        load: returns the loaded model, for PyTorch.
        threads: CPU threads of ONNX Runtime.
        batch: number of streams.

    Raises:
        UsageError: the backend is unknown.
        InputError, SetupError: the folder cannot be opened.
    """
    if backend == "onnxruntime":
        from ..sessions.cpu.session import OrtSession

        return OrtSession(folder, batch, threads)
    if backend == "pytorch":
        from ..sessions.pytorch import TorchSession

        return TorchSession(load(), batch, "float32")
    if backend == "tensorrt":
        from ..board.build import find_engine
        from ..runfolder import RunFolder
        from ..sessions.cpu_graph import vocabulary
        from ..sessions.tensorrt import TensorRtSession

        run = RunFolder.open(folder)
        return TensorRtSession(find_engine(folder), run.io, vocab_size=vocabulary(run.manifest))
    raise UsageError(f"no backend {backend}", f"there are {', '.join(BACKENDS)}")
