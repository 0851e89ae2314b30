"""`deploy`: the stages in a row, and no timing of what is not equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import refused
from rich.console import Console

from xlstm_export import checks, pipeline, report
from xlstm_export.checkpoint import Loaded
from xlstm_export.errors import EnvironmentError_


def test_writes_everything_and_says_so(
    small_loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []
    result = pipeline.deploy(small_loaded, tmp_path / "out", threads=1, progress=stages.append)
    assert stages[0] == "tracing"
    assert stages[-1] == "bench: decode"
    assert result.verification.passed
    names = [path.name for path in result.written]
    assert names == ["model.onnx", "model.onnx.data", "io.json", "manifest.json", "report.json", "bench.json"]
    json.dumps(result.to_json())
    report.show_deploy(Console(width=80), result)
    shown = capsys.readouterr().out
    assert "verdict: pass equal to PyTorch" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_what_is_not_equal_is_not_timed(
    small_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(checks.LIMITS, "output", 1e-12)
    result = pipeline.deploy(small_loaded, tmp_path / "out", threads=1)
    assert not result.verification.passed
    assert result.benchmark is None
    assert not (tmp_path / "out" / "bench").exists()
    report.show_deploy(Console(width=80), result)
    shown = capsys.readouterr().out
    assert "NOT equal to PyTorch" in shown
    assert "exceeds 1e-12" in shown


def test_a_model_that_does_not_fit_the_memory_is_exported_and_not_verified_as_a_whole(
    small_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine must not be driven into swapping; the export stays, to be verified by block."""
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 10)
    with refused(EnvironmentError_, "as a whole takes about", "--per-block"):
        pipeline.deploy(small_loaded, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()
