"""Whether others use the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from xlstm_export.bench import environment

needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="not Linux")


@needs_proc
def test_another_process_is_seen() -> None:
    spin = "import time\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as child:
        time.sleep(0.3)
        found = environment.busy_cores(0.5)
        child.kill()
    assert found is not None
    assert found > 0.2


@needs_proc
def test_what_this_process_computes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter((100.0, 101.5))
    own = iter((7.0, 8.5))
    monkeypatch.setattr(environment, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(environment.time, "process_time", lambda: next(own))
    assert environment.busy_cores(0.01) == 0.0


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: "")
    assert environment.busy_cores(0.01) is None
