"""The committed sets are what their script makes of training data, and nothing that a model is judged on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from places import ROOT
from refusals import refused
from xlstm_export.calibration import sets
from xlstm_export.calibration.sets import Selection

from xlstm_export.errors import InputError
from xlstm_export.specs import IoSpec, TensorSpec

FOLDER = ROOT / "calibration" / "sets"
TOKENS = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (), ())
SERIES = IoSpec((TensorSpec("x", "float32", ("B", "S", 10)),), (), ())


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_calibration_sets", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_makes_the_committed_sets(make: ModuleType, tmp_path: Path) -> None:
    make.write(tmp_path)
    assert (tmp_path / "austen_lm.txt").read_bytes() == (FOLDER / "austen_lm.txt").read_bytes()
    made, committed = np.load(tmp_path / "weather_forecaster.npz"), np.load(FOLDER / "weather_forecaster.npz")
    assert made.files == committed.files == ["x", "target", "mase_scale"]
    for name in made.files:
        assert np.array_equal(made[name], committed[name], equal_nan=True)


def test_text_is_from_the_training_text_and_not_from_the_held_out_one() -> None:
    """Passage by passage, by substring: independent of the check that the script uses."""
    train = (ROOT / "examples" / "austen_lm" / "train.txt").read_bytes()
    heldout = (ROOT / "examples" / "austen_lm" / "heldout.txt").read_bytes()
    content = (FOLDER / "austen_lm.txt").read_bytes()
    assert len(content) == 24 * 2048
    for start in range(0, len(content), 2048):
        assert content[start : start + 2048] in train
        assert content[start : start + 100] not in heldout
    data = sets.load(FOLDER / "austen_lm.txt", TOKENS, vocab_size=256)
    assert data.inputs["tokens"].shape == (24, 2048)  # a window per passage


def test_weather_is_from_before_the_held_out_months() -> None:
    """No hour of it, whatever the window: every row holds the season and the hour of the day."""
    x, heldout = (
        np.load(path)["x"]
        for path in (
            FOLDER / "weather_forecaster.npz",
            ROOT / "examples" / "weather_forecaster" / "heldout.npz",
        )
    )
    assert x.shape == (9, 1440, 10)
    ours = {row.tobytes() for row in x.reshape(-1, 10)}
    assert not ours & {row.tobytes() for row in heldout.reshape(-1, 10)}


def test_the_check_would_have_told(tmp_path: Path) -> None:
    heldout = ROOT / "examples" / "weather_forecaster" / "heldout.npz"
    x = np.load(FOLDER / "weather_forecaster.npz")["x"].copy()
    x[3, 200:400] = np.load(heldout)["x"][1, 1000:1200]
    np.savez(tmp_path / "mixed.npz", x=x)
    with refused(InputError, "mixed.npz overlaps", "of its 66 windows of 64 positions"):
        sets.load(tmp_path / "mixed.npz", SERIES, Selection(avoid=heldout))
