"""Whatever opens a session closes it: every session that a stage opened is closed when the stage is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from xlstm_export.board.replay import replay
from xlstm_export.bundle.recordings import write_goldens
from xlstm_export.load import checkpoint
from xlstm_export.options import BundleOptions, Context
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession, Session
from xlstm_export.trace.streaming import check_streams
from xlstm_export.verify.drift_gate import state_judge
from xlstm_export.verify.fp32 import verify


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """All sessions that are opened during the test."""
    found: list[Session] = []
    init = Session.__init__

    def recorded(self: Session, *arguments: object, **named: object) -> None:
        init(self, *arguments, **named)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(Session, "__init__", recorded)
    return found


@contextmanager
def all_closed(opened: list[Session], least: int) -> Iterator[None]:
    opened.clear()
    yield
    assert len(opened) >= least
    assert [type(session).__name__ for session in opened if not session._closed] == []


def test_recording_and_replay(
    small_export: Path, small_loaded: checkpoint.Loaded, tmp_path: Path, opened: list[Session]
) -> None:
    with all_closed(opened, 3):
        run, options = RunFolder.open(small_export), BundleOptions(horizon=140)
        write_goldens(run, small_loaded, tmp_path, options, Context(threads=1))
    with all_closed(opened, 2):
        replay(tmp_path, lambda: OrtSession(small_export, 1, 1), "onnxruntime")


def test_checks_that_open_a_few(
    small_export: Path, small_loaded: checkpoint.Loaded, opened: list[Session]
) -> None:
    with all_closed(opened, 1):
        check_streams(small_loaded)
    stream = {"tokens": np.random.default_rng(0).integers(0, 256, (1, 20))}
    with all_closed(opened, 2), pytest.raises(AttributeError):  # what fails on the way closes them too
        state_judge(stream)(small_export, small_export, None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_verification(
    small_export: Path, small_loaded: checkpoint.Loaded, tmp_path: Path, opened: list[Session]
) -> None:
    folder = shutil.copytree(small_export, tmp_path / "run")
    with all_closed(opened, 6):
        assert verify(folder, small_loaded, context=Context(threads=1)).passed
