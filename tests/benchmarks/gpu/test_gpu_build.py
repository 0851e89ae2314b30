"""benchmarks/gpu/build.py: resources of kernels, the sanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import build

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4stepPf' for 'sm_90'
ptxas info    : Function properties for _Z4stepPf
    16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compiling entry function '_Z4scanPf' for 'sm_90'
ptxas info    : Function properties for _Z4scanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_resources_of_kernels() -> None:
    step, scan = build.resources(PTXAS)
    assert step == {
        "name": "_Z4stepPf", "registers": 128, "spill_bytes": 52, "stack_bytes": 16, "shared_bytes": 8192
    }  # fmt: skip
    assert scan["registers"] == 40
    assert scan["spill_bytes"] == scan["shared_bytes"] == 0


def test_the_sanitizer_is_run_if_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, sanitizer = tmp_path / "driver", tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\nexit 0\n")
    sanitizer.write_text('#!/bin/sh\ntest "$2" != racecheck || { echo RACE REPORTED; exit 86; }\n')
    for file in (program, sanitizer):
        file.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(sanitizer))
    result = build.sanitize(program, None, 20.0)
    assert {tool: verdict["passed"] for tool, verdict in result.items()} == {
        "plain": True, "memcheck": True, "racecheck": False, "synccheck": True, "initcheck": True
    }  # fmt: skip
    assert "RACE REPORTED" in result["racecheck"]["note"]

    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "_sanitizer", lambda nvcc: None)
    result = build.sanitize(program, None, 20.0)
    assert result["plain"]["passed"]
    assert result["memcheck"]["note"] == "compute-sanitizer not found"


def test_a_sanitizer_that_hangs_is_stopped(tmp_path: Path) -> None:
    program = tmp_path / "driver"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    result = build.sanitize(program, None, 1.2)
    assert result["plain"]["passed"] is None
    assert "not finished" in result["plain"]["note"]
