"""The steps on a board as a service has it: no home, no entry in passwd, a read-only bundle behind a link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lean_board import packages

from xlstm_export import atomic, runfolder
from xlstm_export.bundle import make as bundles
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import BundleOptions

NOBODY = 54321  # a user without an entry in passwd
# Root becomes that user, and keeps the right to read, because the interpreter may be in a folder of root's.
BECOME = f"""
import ctypes, os, runpy, sys
if os.getuid() == 0:
    libc = ctypes.CDLL(None)
    assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
    read = 1 << 2  # CAP_DAC_READ_SEARCH
    assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(read, read)) == 0
sys.path.insert(0, sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def board(
    small_export: Path, small_loaded: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with packages, and a read-only bundle that is reached through a link."""
    folder = tmp_path_factory.mktemp("board")
    run = shutil.copytree(small_export, folder / "run")
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    made = bundles.bundle(run, small_loaded, folder / "store", BundleOptions(horizon=120))
    (folder / "model").symlink_to("store")
    packages(folder / "lean")
    paths = [made, *made.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


def on_board(board: Path, encoding: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-I", "-S", "-B", "-c", BECOME, str(board / "lean")]
    environment = {
        "PATH": os.defpath,
        "LC_ALL": "C",
        "PYTHONIOENCODING": encoding,
        "TMPDIR": str(board / "tmp"),
        "XLSTM_EXPORT_THREADS": "1",
    }
    (board / "tmp").mkdir(exist_ok=True)
    (board / "tmp").chmod(0o777)
    return subprocess.run(
        [*program, str(board / "model" / "deploy.py"), *arguments],
        capture_output=True,
        cwd="/",
        text=True,
        errors="replace",
        timeout=300,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_every_step(board: Path, encoding: str) -> None:
    ort = ("--backend", "onnxruntime")
    done = on_board(board, encoding, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    done = on_board(board, encoding, "verify", *ort)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to what was verified" in done.stdout
    assert "not kept: " in done.stderr
    again = on_board(board, encoding, "verify", *ort, "--json")
    assert json.loads(again.stdout)["passed"] is True, "the advice: the result as JSON"
    done = on_board(board, encoding, "bench", *ort, "--steps", "5", "--prefill", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step " in done.stdout
    done = on_board(board, encoding, "run", *ort, "--text", "Zoë ", "--tokens", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
    assert not (board / "store" / "results").exists()
