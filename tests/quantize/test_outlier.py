"""A channel a hundred times larger than the others: what migration of ranges is for.

The trained language model is rewritten so that it computes the same, with one channel of every norm before a
wide projection scaled by 100 and the weights that read it by 1/100.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from safetensors.torch import load_file, save_file
from xlstm_export.calibration.sets import Selection

from xlstm_export import runfolder
from xlstm_export.load import checkpoint
from xlstm_export.measure import data
from xlstm_export.options import CalibrateOptions, Context
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import OrtSession
from xlstm_export.trace import export as trace

EXAMPLE = ROOT / "examples" / "austen_lm"
CHANNEL, FACTOR = 11, 100.0
POSITIONS = 6000


def plant(folder: Path) -> Path:
    """A copy of the example with an outlier channel in front of every up-projection."""
    folder.mkdir()
    shutil.copy(EXAMPLE / "config.yaml", folder)
    state = load_file(EXAMPLE / "model.safetensors")
    for name in [n for n in state if n.endswith("proj_up.weight")]:
        block = name.split(".xlstm.")[0] if ".xlstm." in name else name.split(".ffn.")[0]
        norm = f"{block}.xlstm_norm.weight" if ".xlstm." in name else f"{block}.ffn_norm.weight"
        state[norm][CHANNEL] = FACTOR * (1.0 + state[norm][CHANNEL]) - 1.0  # the norm multiplies with 1 + w
        state[name][:, CHANNEL] /= FACTOR
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_migration_recovers_from_an_outlier_channel(tmp_path: Path) -> None:
    from xlstm_export.calibration import observers, sets

    loaded = checkpoint.load_checkpoint(plant(tmp_path / "planted"))
    run = trace.export(loaded, tmp_path / "run")
    io = runfolder.read_io(run)
    held = data.load(EXAMPLE / "heldout.txt", io, vocab_size=256, limit=POSITIONS)
    calibration = sets.load(EXAMPLE / "train.txt", io, Selection(samples=4, length=2048), vocab_size=256)
    scales = observers.calibrate(run, calibration, CalibrateOptions(method="max"), Context(threads=1))
    largest = scales.channels("layer_norm")
    assert largest[CHANNEL] > 30 * np.median(largest)  # it is really there

    def metric(folder: Path) -> float:
        return held.score(data.stream(OrtSession(folder, held.rows, 1, rounding=True), held.inputs))

    base = metric(run)
    drops = {}
    for name, smooth in (("plain", None), ("smooth", 0.5)):
        recipe = replace(preset("int8", "fp32"), smooth=smooth)
        drops[name] = metric(quantize.quantize(run, recipe, scales=scales, out=tmp_path / name)) / base - 1
    assert drops["smooth"] < 0.01 < drops["plain"], drops
    original = trace.export(checkpoint.load_checkpoint(EXAMPLE), tmp_path / "original")
    assert abs(metric(original) / base - 1) < 1e-5  # the function is the same
