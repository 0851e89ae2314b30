"""Verification of half and quantized exports: what passes, and that planted faults do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from xlstm_export import atomic, checks, runfolder
from xlstm_export.errors import UsageError
from xlstm_export.inputs import Arrays
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.measure.drift import measure_drift
from xlstm_export.measure.drift_result import Drift
from xlstm_export.options import CalibrateOptions, Context, ExportOptions, VerifyOptions
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.trace import export as trace
from xlstm_export.verify import limits, precision, verdict
from xlstm_export.verify.precision import drift_at, fp32_reference, verify_precision
from xlstm_export.verify.verify import verify_run

SHORT = VerifyOptions(horizon=120, free_horizon=20)
ONE_THREAD = Context(threads=1)


@pytest.fixture(scope="module")
def half(small_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize.quantize(small_export, preset("fp16"), out=tmp_path_factory.mktemp("fp16") / "out")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "heldout.txt"
    path.write_bytes(rng.integers(0, 256, 400, dtype=np.uint8).tobytes())
    return path


def failed(report: checks.Verdict) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.slow
def test_sequences_of_the_calibration_set_where_there_is_no_data(
    half: Path, small_loaded: Loaded, text: Path
) -> None:
    """No metric comes of them: they are what the ranges were made from."""
    report = verify_run(half, small_loaded, replace(SHORT, calib=str(text)), ONE_THREAD)
    assert (report.inputs, report.metric) == (checks.CALIBRATION, {})
    tokens = np.frombuffer(text.read_bytes(), np.uint8)[None].astype(np.int64)
    again = verify_run(half, small_loaded, SHORT, ONE_THREAD, calibration={"tokens": tokens})
    assert again.checks == report.checks
    with_data = verify_run(half, small_loaded, replace(SHORT, calib=str(text), data=text), ONE_THREAD)
    assert with_data.inputs == checks.HELD_OUT
    made_up = verify_run(half, small_loaded, SHORT, ONE_THREAD)
    assert made_up.inputs == checks.MADE_UP
    assert made_up.checks != report.checks


def test_fp16_passes_and_everything_is_reported(half: Path, small_loaded: Loaded, text: Path) -> None:
    report = verify_run(half, small_loaded, replace(SHORT, data=text), ONE_THREAD)
    assert failed(report) == set()
    assert report.metric["name"] == "bits per byte"
    assert 0 < abs(report.metric["drop"]) < 1e-3
    assert report.precision["reference"] == "PyTorch FP32"  # the FP32 export has not been verified
    assert drift_at(report, 120) == pytest.approx(7e-4, rel=0.9)
    assert drift_at(report, 4000) is None
    names = " ".join(check.name for check in report.checks)
    for part in (
        "teacher-forced",
        "free-running",
        "block 1 states",
        "growth",
        "resumed",
        "rules of TensorRT",
    ):
        assert part in names
    saved = json.loads((half / "verify" / "report.json").read_text())
    assert saved["passed"]
    assert saved["precision"]["drift"]["rows"]
    assert (half / "verify" / "drift.csv").read_text().startswith("mode,block,tensor,horizon,error")
    verdict.require_verified(half)


@pytest.mark.parametrize("everywhere", [False, True])
def test_growth_is_looked_at_on_other_streams(
    everywhere: bool, half: Path, small_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What few positions of one stream decide is no growth; what accumulates is on the other one too."""
    seen: list[np.ndarray] = []

    def growing(reference: Any, candidate: Any, inputs: Arrays, plan: Any, context: Context) -> Drift:
        seen.append(inputs["tokens"])
        drift = measure_drift(reference, candidate, inputs, plan, context)
        if len(seen) > 1 and not everywhere:
            return drift
        worse = [
            replace(x, errors=(*x.errors[:-1], 9 * x.errors[-1])) if x.block is None else x
            for x in drift.series
        ]
        return replace(drift, series=tuple(worse))

    monkeypatch.setattr(precision, "measure_drift", growing)
    monkeypatch.setattr(precision._Precision, "of_this_model", lambda self, found: found)
    report = verify_run(half, small_loaded, SHORT, ONE_THREAD)
    grown = {name for name in failed(report) if name.endswith(": growth")}
    assert bool(grown) == everywhere
    assert len(seen) == 2
    assert seen[0].shape[0] == seen[1].shape[0] == 2
    assert not np.array_equal(*seen)


def test_a_verified_export_is_the_reference(small_export: Path, small_loaded: Loaded, tmp_path: Path) -> None:
    base = shutil.copytree(small_export, tmp_path / "base")
    folder = quantize.quantize(base, preset("fp16"))
    assert fp32_reference(folder, small_loaded).name == "PyTorch FP32"
    passed = checks.Verdict((checks.Check("all", 0.0, 1.0),), {}, runfolder.hashes(base))
    atomic.write_json(base / "verify" / "report.json", passed.to_json())
    assert fp32_reference(folder, small_loaded).name == "FP32 export"
    with (base / "model.onnx.data").open("r+b") as file:
        file.write(b"changed")
    assert fp32_reference(folder, small_loaded).name == "PyTorch FP32"


def change_weight(folder: Path, part: str, change: Any) -> None:
    """Rewrite one initializer of an export in place."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    weight = next(w for w in model.graph.initializer if part in w.name)
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)), weight.name))
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)


@pytest.mark.parametrize(
    ("part", "change", "caught"),
    [
        ("blocks.0.xlstm.proj_down", lambda w: w * np.float16(1.03), "level"),
        ("blocks.0.xlstm.mlstm_cell.gate_bias", lambda w: w + np.float32(0.1), "block 0 states"),
        ("blocks.1.xlstm.slstm_cell.R", lambda w: w * np.float16(0.9), "block 1 states"),
    ],
)
def test_planted_faults_fail(
    half: Path, small_loaded: Loaded, tmp_path: Path, part: str, change: Any, caught: str
) -> None:
    folder = shutil.copytree(half, tmp_path / "copy")
    change_weight(folder, part, change)
    report = verify_precision(folder, small_loaded, SHORT, ONE_THREAD)
    assert any(caught in name for name in failed(report)), failed(report)


def test_a_broken_fence_fails(half: Path, small_loaded: Loaded, tmp_path: Path) -> None:
    """The proof is done again on the very file: a norm that somebody made half."""
    folder = shutil.copytree(half, tmp_path / "copy")
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    index = list(model.graph.node).index(node)
    for i in (0, 1):
        cast = onnx.helper.make_node("Cast", [node.input[i]], [f"{node.input[i]}_h{i}"], to=10)
        node.input[i] = cast.output[0]
        model.graph.node.insert(index, cast)
    back = onnx.helper.make_node("Cast", ["norm_half"], [node.output[0]], to=1)
    node.output[0] = "norm_half"
    model.graph.node.insert(index + 3, back)
    onnx.save(model, path)
    assert "values below FP32 that feed back" in failed(
        verify_precision(folder, small_loaded, SHORT, ONE_THREAD)
    )


def test_metric_beyond_its_limit_fails(
    half: Path, small_loaded: Loaded, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        limits.PRECISION_LIMITS, "fp16", replace(limits.PRECISION_LIMITS["fp16"], metric=1e-9)
    )
    report = verify_precision(half, small_loaded, replace(SHORT, data=text), ONE_THREAD)
    assert "bits per byte on held-out data" in failed(report)


def test_made_up_ranges_are_told(own_export: Path, small_loaded: Loaded) -> None:
    scales = stages.calibrate(
        own_export, small_loaded, CalibrateOptions(random_data=True), Context(threads=1)
    )
    folder = quantize.quantize(own_export, preset("int8"), scales=scales)
    report = verify_precision(folder, small_loaded, SHORT, ONE_THREAD)
    assert report.precision["random_calibration"] is True
    assert report.precision["sites"]["int8"] > 3


def test_options_that_do_not_go_together(half: Path, small_export: Path, small_loaded: Loaded) -> None:
    with pytest.raises(UsageError, match="fp16: it is verified as a whole"):
        verify_run(half, small_loaded, VerifyOptions(per_block=True))
    with pytest.raises(UsageError, match="--horizon is for half"):
        verify_run(small_export, small_loaded, VerifyOptions(horizon=10))


def test_an_export_without_states(small_loaded: Loaded, tmp_path: Path) -> None:
    """No stream to drift along: one call is held against FP32."""
    run = trace.export(small_loaded, tmp_path / "run", ExportOptions(stateless=True))
    report = verify_precision(quantize.quantize(run, preset("fp16")), small_loaded, context=ONE_THREAD)
    assert failed(report) == set()
    assert report.precision["drift"] is None
    assert any(check.name.startswith("one call") for check in report.checks)
