"""Memory of a process that runs only an export, in a process of its own so that PyTorch is not counted.

    python -m xlstm_export.bench.memory RUN BATCH LENGTH THREADS

prints `rss_bytes` and `peak_rss_bytes` as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from ..inputs import Arrays, cut
from ..sessions import OrtSession
from ..specs import IoSpec
from .environment import memory_of

Memory = dict[str, int | None]
TIMEOUT = 600  # seconds


def memory(folder: Path, batch: int, length: int, threads: int) -> Memory:
    """Resident bytes after one prefill and one step in a new process, and its peak.

    None if the system does not report them, or the process failed.
    """
    root = Path(__file__).resolve().parents[2]
    # A bare checkout is found like an installed package.
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", __name__, str(folder), str(batch), str(length), str(threads)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT,
        )
        reported = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        reported = {}
    return {name: reported.get(name) for name in ("rss_bytes", "peak_rss_bytes")}


def run(folder: Path, batch: int, length: int, threads: int) -> Memory:
    """Run the export once, and return the memory of this process."""
    with OrtSession(folder, batch, threads) as session:
        inputs = _zeros(session.io, batch, length)
        session.prefill(inputs)
        session.step(cut(inputs, session.io, 0, 1))
        now, peak = memory_of()
    return {"rss_bytes": now, "peak_rss_bytes": peak}


def _zeros(io: IoSpec, batch: int, length: int) -> Arrays:
    return {spec.name: np.zeros(spec.sized(batch, length), spec.dtype) for spec in io.inputs}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
