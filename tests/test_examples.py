"""The two trained models, the standing real inputs: exported, verified, and better than baselines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import example_runs
import numpy as np
import pytest
from example_runs import HELDOUT, LM, WEATHER
from places import ROOT

from xlstm_export import runfolder, sessions
from xlstm_export.load import checkpoint
from xlstm_export.measure import data
from xlstm_export.options import VerifyOptions
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify


@pytest.fixture(scope="module", params=["austen_lm", "weather_forecaster"])
def example(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[checkpoint.Loaded, Path, Path]:
    """Loaded model, its run folder, its held-out data."""
    loaded = example_runs.load(request.param)
    folder = tmp_path_factory.mktemp("example") / request.param
    shutil.copytree(example_runs.exported(tmp_path_factory, request.param, loaded), folder)
    return loaded, folder, HELDOUT[request.param]


@pytest.mark.slow
def test_verifies_on_held_out_data(example: tuple[checkpoint.Loaded, Path, Path]) -> None:
    loaded, folder, held_out = example
    report = verify.verify(folder, loaded, VerifyOptions(data=held_out))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.metric["positions"] > 1000


@pytest.mark.slow
def test_builds_in_nvidias_builder(example: tuple[checkpoint.Loaded, Path, Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, str(ROOT / "tests" / "rtx_build.py"), str(example[1] / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plan_bytes" in done.stdout


@pytest.mark.slow
def test_language_model_beats_an_order_2_model(tmp_path: Path) -> None:
    """A byte n-gram model counted here, on the same text, with interpolated smoothing."""
    train = np.frombuffer((LM / "train.txt").read_bytes(), np.uint8).astype(np.int64)
    test = np.frombuffer((LM / "heldout.txt").read_bytes()[:16385], np.uint8).astype(np.int64)
    probability = np.full(len(test) - 1, 1 / 256)
    for order in range(3):
        context = np.zeros(len(train) - order, np.int64)
        for k in range(order):
            context = context * 256 + train[k : len(train) - order + k]
        pairs, counts = np.unique(context * 256 + train[order:], return_counts=True)
        contexts, totals = np.unique(context, return_counts=True)
        _, distinct = np.unique(pairs // 256, return_counts=True)
        here = np.zeros(len(test) - 1, np.int64)
        for k in range(order):
            shifted = np.concatenate([np.zeros(order, np.int64), test])[k + 1 : k + len(test)]
            here = here * 256 + shifted
        at = np.searchsorted(pairs, here * 256 + test[1:])
        hit = pairs[np.minimum(at, len(pairs) - 1)] == here * 256 + test[1:]
        count = np.where(hit, counts[np.minimum(at, len(pairs) - 1)], 0)
        where = np.minimum(np.searchsorted(contexts, here), len(contexts) - 1)
        known = contexts[where] == here
        total, kinds = np.where(known, totals[where], 0), np.where(known, distinct[where], 1)
        probability = (count + kinds * probability) / (total + kinds)  # Witten-Bell interpolation
    order_2 = float(-np.log2(probability).mean())

    loaded = checkpoint.load_checkpoint(LM)
    folder = trace.export(loaded, tmp_path / "out")
    held_out = data.load(LM / "heldout.txt", runfolder.read_io(folder), vocab_size=256)
    ours = held_out.score(data.stream(sessions.OrtSession(folder), held_out.inputs))
    assert 2.7 < order_2 < 3.2, "an honest baseline"
    assert ours < order_2 - 0.5


def test_forecaster_beats_seasonal_naive() -> None:
    with np.load(WEATHER / "heldout.npz") as file:
        x, target, naive, scale = (file[name] for name in ("x", "target", "naive", "mase_scale"))
    loaded = checkpoint.load_module("examples.weather_forecaster.model:build", WEATHER / "model.safetensors")
    session = sessions.TorchSession(loaded, len(x), "float32")
    ours = session.prefill({"x": x})["y"]
    known = np.isfinite(target)
    mase = np.abs(ours - target)[known].mean() / scale
    baseline = np.abs(naive - target)[known & np.isfinite(naive)].mean() / scale
    assert mase < 0.75 * baseline


def test_recurrent_kernels_are_trained() -> None:
    """Memory mixing must matter: a zero R would test nothing of the sLSTM recurrence."""
    for loaded in (checkpoint.load_checkpoint(LM),):
        kernels = [p for name, p in loaded.module.named_parameters() if "_recurrent_kernel_" in name]
        assert len(kernels) >= 2
        assert all(float(k.detach().abs().mean()) > 0.01 for k in kernels)
