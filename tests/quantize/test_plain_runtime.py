"""A quantized file in plain ONNX Runtime: at which optimization levels it computes what the file says."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from xlstm_export.load.loaded import Loaded
from xlstm_export.options import CalibrateOptions, Context
from xlstm_export.pipeline import stages
from xlstm_export.quantize.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import OrtSession

LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
TOKENS = np.random.default_rng(0).integers(0, 256, (1, 96))


@pytest.fixture(scope="module")
def runs(small_export: Path, small_loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = shutil.copytree(small_export, tmp_path_factory.mktemp("plain") / "run")
    options = CalibrateOptions(random_data=True, samples=2, length=256)
    scales = stages.calibrate(base, small_loaded, options, Context(threads=1))
    for precision in ("fp16", "int8", "int8-wo", "int4-wo"):
        recipe = preset(precision)
        quantize(base, recipe, scales=scales if recipe.needs_scales else None)
    return base


@cache
def logits(model: Path, level: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feed = {
        x.name: np.zeros([size if isinstance(size, int) else 1 for size in x.shape], TYPES[x.type])
        for x in session.get_inputs()
        if x.name != "tokens"
    }
    (found,) = session.run(["logits"], {"tokens": TOKENS, **feed})
    return np.asarray(found, np.float64)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-wo", "int4-wo"])
def test_levels_that_are_safe(precision: str, runs: Path) -> None:
    """Without fusions the file is computed as it is; our own sessions open it at any level."""
    model = runs / precision / "model.onnx"
    with OrtSession(runs / precision, 1, 1, rounding=True) as session:
        ours = session.prefill({"tokens": TOKENS})["logits"]
    assert distance(logits(model, "DISABLE_ALL"), ours) < 0.05, "values that fall into another step"
    assert distance(logits(model, "ENABLE_BASIC"), logits(model, "DISABLE_ALL")) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8-wo", "int4-wo"])
def test_levels_that_are_not(precision: str, runs: Path) -> None:
    """What docs/precision.md warns of; if this fails, ONNX Runtime was mended: say so there."""
    model = runs / precision / "model.onnx"
    plain = logits(model, "DISABLE_ALL")
    off = {level: distance(logits(model, level), plain) for level in ("ENABLE_EXTENDED", "ENABLE_ALL")}
    if RUNTIME < (1, 25):
        assert max(off.values()) < 2e-3
    else:
        assert not max(off.values()) < 5e-3, off  # NaN as well
