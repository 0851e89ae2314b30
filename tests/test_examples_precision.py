"""The trained examples in every precision: legal for TensorRT 10.3, built by NVIDIA, close to FP32."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import example_runs
import pytest
from example_runs import HELDOUT
from nvidia_builder import check_builds
from places import ROOT

from xlstm_export import runfolder
from xlstm_export.measure import data
from xlstm_export.options import CalibrateOptions
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.legality import check_legality
from xlstm_export.quantize.recipe import Recipe, preset, read_recipe
from xlstm_export.sessions import OrtSession

CALIBRATION = {"austen_lm": "austen_lm.txt", "weather_forecaster": "weather_forecaster.npz"}
# What "close" is: the change of the task metric. FP16 and BF16 within 0.1%, INT8 within 0.5%.
LIMITS = {"fp16": 1e-3, "bf16": 1e-3, "int8": 5e-3, "int8-wo": 5e-3, "int4-wo": 2e-2}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Exported:
    folder: Path
    scales: Any
    metric: float
    heldout: data.EvalData
    recipe: Recipe


@pytest.fixture(scope="module", params=list(CALIBRATION))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """FP32 export of an example, its ranges from the committed set, its metric on held-out data."""
    name = request.param
    loaded = example_runs.load(name)
    # A copy, because ranges are written into the run folder.
    folder = tmp_path_factory.mktemp("examples") / name
    shutil.copytree(example_runs.exported(tmp_path_factory, name, loaded), folder)
    calibration = ROOT / "calibration" / "sets" / CALIBRATION[name]
    scales = stages.calibrate(
        folder, loaded, CalibrateOptions(data=str(calibration), avoid=HELDOUT[name], samples=6)
    )
    held = data.load(HELDOUT[name], runfolder.read_io(folder), vocab_size=loaded.vocab_size, limit=4096)
    metric = held.score(data.stream(OrtSession(folder, held.rows, rounding=True), held.inputs))
    return Exported(folder, scales, metric, held, read_recipe(ROOT / "examples" / name / "int8.yaml"))


def test_fp32_builds(exported: Exported) -> None:
    check_builds(exported.folder / "model.onnx")


@pytest.mark.parametrize("precision", list(LIMITS))
def test_precision(exported: Exported, precision: str, tmp_path: Path) -> None:
    recipe = exported.recipe if precision == "int8" else preset(precision)
    folder = quantize.quantize(exported.folder, recipe, scales=exported.scales, out=tmp_path / precision)
    assert [v for v in check_legality(folder / "model.onnx") if v.severity == "error"] == []
    held = exported.heldout
    metric = held.score(data.stream(OrtSession(folder, held.rows, rounding=True), held.inputs))
    assert abs(metric / exported.metric - 1) < LIMITS[precision]
    check_builds(folder / "model.onnx")
