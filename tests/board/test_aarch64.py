"""Bundles of both examples on an aarch64 userland, as on a board without TensorRT: emulated, so not timed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import aarch64
import pytest
from places import ROOT

from xlstm_export import atomic, runfolder
from xlstm_export.bundle import make as bundle
from xlstm_export.load import checkpoint
from xlstm_export.options import BundleOptions
from xlstm_export.trace import export as trace

WEATHER = ROOT / "examples/weather_forecaster/model.safetensors"
MODELS: dict[str, tuple[str | None, str | None, str | None]] = {
    "austen_lm": (str(ROOT / "examples/austen_lm"), None, None),
    "weather_forecaster": (None, "examples.weather_forecaster.model:build", str(WEATHER)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_verifies_and_every_step_is_timed(name: str, tmp_path: Path) -> None:
    python = aarch64.python()
    loaded = checkpoint.load(*MODELS[name])
    run = trace.export(loaded, tmp_path / "run")
    # What `verify` leaves behind where it passed; others test that it does.
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    made = bundle.bundle(run, loaded, tmp_path / "bundle", BundleOptions(horizon=80))

    def deploy(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*python, str(made / "deploy.py"), *words, "--backend", "onnxruntime", "--json"]
        environment = {**aarch64.environment(), "XLSTM_EXPORT_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    done = deploy("verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(check["passed"] for check in json.loads(done.stdout)["checks"])
    done = deploy("bench", "--steps", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["step"]["calls"] == 20
