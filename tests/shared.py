"""Folders that are made once in a run of the tests, whichever of its processes needs them first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def root(factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of this run have in common."""
    base = factory.getbasetemp()
    # A worker of pytest-xdist has a folder of its own in that of the whole run.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` after `make(folder)`, which only the first process calls; the others wait for it.

    What stands there must not be changed: copy it to write into it. `changed` says what was.
    """
    folder = root(factory) / name
    record = folder.with_name(f"{name}.json")
    with FileLock(f"{folder}.lock"):
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half-way
            folder.mkdir(parents=True)
            make(folder)
            record.write_text(json.dumps(_files(folder)))
    return folder


def changed(shared: Path) -> list[str]:
    """Shared files that are no longer as they were made, or were added."""
    found = []
    for record in sorted(shared.glob("*.json")):
        before, now = json.loads(record.read_text()), _files(shared / record.stem)
        found += [
            f"{record.stem}/{name}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)
        ]
    return found


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
