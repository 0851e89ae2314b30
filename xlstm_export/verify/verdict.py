"""The stored verdict of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import GateError
from ..runfolder import RunFolder, hashes


def require_verified(run: RunFolder | Path) -> None:
    """Raise GateError unless `verify` has passed on exactly the present files."""
    folder = RunFolder.of(run).path  # raises InputError if it is not a run folder
    try:
        report = json.loads((folder / "verify" / "report.json").read_text())
    except (OSError, ValueError, RecursionError):
        report = {}
    if not report.get("passed"):
        state = "did not pass" if report else "has not run"
        raise GateError(f"verify {state} on {folder}", "run `xlstm-export verify` first")
    if report.get("files") != hashes(folder):
        raise GateError(f"{folder} changed since it was verified", "run `xlstm-export verify` again")
