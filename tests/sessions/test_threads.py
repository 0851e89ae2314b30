"""Threads of sessions: they rest between calls, and steps of small models do without."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from xlstm_export.sessions import OrtSession, ort

TASKS = Path("/proc/self/task")  # a folder per thread of this process, on Linux


def threads() -> int:
    if not TASKS.is_dir():
        pytest.skip("the system does not list threads")
    return len(os.listdir(TASKS))


def test_an_idle_session_uses_no_cores(small_export: Path) -> None:
    """Else its threads take them from the session that works: four in turns took 3.5 times as long as one."""
    with OrtSession(small_export, threads=3) as session:
        session.prefill({"tokens": np.zeros((1, 600), dtype=np.int64)})
        start = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - start < 0.02  # of this process; spinning threads used 0.04 and more


@pytest.mark.parametrize(("limit", "more"), [(1 << 30, 0), (0, 2)], ids=["small", "large"])
def test_a_step_of_a_small_model_takes_one_thread(
    limit: int, more: int, small_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "ONE_THREAD", limit)
    with OrtSession(small_export, threads=3) as session:
        before = threads()
        session.step({"tokens": np.zeros((1, 1), dtype=np.int64)})
        assert threads() == before + more
        session.prefill({"tokens": np.zeros((1, 3), dtype=np.int64)})
        assert threads() == before + more + 2
