"""The two examples, exported once in a run of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import shared
from places import ROOT

from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace

LM = ROOT / "examples" / "austen_lm"
WEATHER = ROOT / "examples" / "weather_forecaster"
HELDOUT = {"austen_lm": LM / "heldout.txt", "weather_forecaster": WEATHER / "heldout.npz"}


def load(name: str) -> checkpoint.Loaded:
    if name == "austen_lm":
        return checkpoint.load_checkpoint(LM)
    return checkpoint.load_module("examples.weather_forecaster.model:build", WEATHER / "model.safetensors")


def exported(factory: pytest.TempPathFactory, name: str, loaded: checkpoint.Loaded) -> Path:
    """Run folder of an example's FP32 export; it is shared, so nothing may be written into it."""
    made = shared.once(factory, f"example_{name}", lambda folder: trace.export(loaded, folder / name))
    return made / name
