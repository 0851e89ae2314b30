"""Bench refuses what did not verify, and its figures follow from its timings. No test looks at the clock."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from xlstm_export import bench, checks, errors, runfolder
from xlstm_export.checkpoint import Loaded


@pytest.fixture
def verified(small_export: Path, tmp_path: Path) -> Path:
    """A copy of the export with the report of a verification that passed."""
    folder = tmp_path / "run"
    shutil.copytree(small_export, folder)
    files = runfolder.hashes(folder)
    check = checks.Check("prefill", 1e-7, 5e-6)
    runfolder.write_json(folder / "verify" / "report.json", checks.Report((check,), {}, files).to_json())
    return folder


def test_refuses_what_did_not_verify(small_export: Path, verified: Path, small_loaded: Loaded) -> None:
    bench.require_verified(verified)
    report = verified / "verify" / "report.json"
    data = json.loads(report.read_text())
    report.write_text(json.dumps({**data, "passed": False}))
    with pytest.raises(errors.GateError, match="did not pass"):
        bench.bench(verified, small_loaded)
    report.write_text(json.dumps({**data, "files": {}}))
    with pytest.raises(errors.GateError, match="changed since"):
        bench.bench(verified, small_loaded)
    report.write_text(json.dumps(data))
    with (verified / "model.onnx.data").open("r+b") as weights:
        weights.write(b"changed after it was verified")
    with pytest.raises(errors.GateError, match="changed since"):
        bench.bench(verified, small_loaded)
    report.unlink()
    with pytest.raises(errors.GateError, match="has not run"):
        bench.bench(verified, small_loaded)


def test_measures_both_sides(verified: Path, small_loaded: Loaded) -> None:
    result = bench.bench(verified, small_loaded, threads=1, batch=2, prefill_length=1000, steps=10)
    assert result.prefill_length == small_loaded.context_length, "upstream's forward ends there"
    assert len(result.step.seconds) == len(result.torch_step.seconds) == 10
    assert result.baseline == "xLSTMLMModel.step"
    written = json.loads((verified / "bench" / "bench.json").read_text())
    assert written["step"]["speedup"] == result.step_speedup > 0
    assert written["environment"]["threads"] == 1


def test_figures_follow_from_timings() -> None:
    report = bench.BenchReport(
        step=bench.Timing((0.001, 0.002, 0.003)),
        torch_step=bench.Timing((0.004,)),
        prefill=bench.Timing((0.1,)),
        torch_prefill=bench.Timing((0.4,)),
        prefill_length=100,
        batch=2,
        threads=1,
        bandwidth_gbs=10.0,
        moved_bytes=10e6,
        baseline="",
        recurrences="function bodies",
    )
    assert report.step_speedup == pytest.approx(2.0)
    assert report.prefill_speedup == pytest.approx(4.0)
    assert report.achieved_gbs == pytest.approx(5.0)
    assert report.roof_share == pytest.approx(0.5)
    assert report.tokens_per_second(report.prefill) == pytest.approx(2000)
