"""What streams are recorded of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xlstm_export.bundle.recordings import write_goldens
from xlstm_export.checks import CALIBRATION, HELD_OUT, MADE_UP
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import BundleOptions, Context

HORIZON = 140


@pytest.mark.parametrize("kind", [HELD_OUT, CALIBRATION, MADE_UP])
def test_where_the_inputs_come_from(
    kind: str, small_export: Path, small_loaded: Loaded, tmp_path: Path
) -> None:
    text = b"the recurrence goes on, " * 40
    tokens = np.frombuffer(text, np.uint8)[None].astype(np.int64)
    (tmp_path / "heldout.txt").write_bytes(text)
    told = write_goldens(
        small_export,
        small_loaded,
        tmp_path,
        BundleOptions(data=tmp_path / "heldout.txt" if kind == HELD_OUT else None, horizon=HORIZON),
        Context(threads=1),
        calibration={CALIBRATION: {"tokens": tokens}, HELD_OUT: {"tokens": tokens + 1}}.get(kind),
    )
    assert told["inputs"] == kind
    with np.load(tmp_path / "goldens" / "goldens.npz") as file:
        recorded = file["input/tokens"]
    assert recorded.shape == (1, HORIZON)
    assert np.array_equal(recorded, tokens[:, :HORIZON]) == (kind != MADE_UP)
