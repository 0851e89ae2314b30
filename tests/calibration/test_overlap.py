"""Evaluation data is kept out: copies, parts, shifted stretches are found; what only looks alike is not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from specs import PLAIN, SERIES, TOKENS
from xlstm_export.calibration import overlap, sets
from xlstm_export.calibration.sets import Selection

from xlstm_export.errors import InputError

RNG = np.random.default_rng(0)


def tokens(*rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": np.stack(rows)}


def text(path: Path, content: np.ndarray) -> Path:
    path.write_bytes(content.astype(np.uint8).tobytes())
    return path


def test_the_same_file(tmp_path: Path) -> None:
    path = text(tmp_path / "heldout.txt", RNG.integers(0, 256, 1000))
    (tmp_path / "link.txt").symlink_to(path)
    os.link(path, tmp_path / "hard.txt")
    for name in ("heldout.txt", "link.txt", "hard.txt"):
        with refused(InputError, f"{name} is the evaluation data itself", "training data"):
            sets.load(tmp_path / name, TOKENS, Selection(avoid=path), vocab_size=256)


def test_the_evaluation_file_in_a_folder_of_data(tmp_path: Path) -> None:
    for name in ("a.npz", "heldout.npz"):
        np.savez(tmp_path / name, x=RNG.standard_normal((1, 300, 3)))
    with refused(InputError, "heldout.npz is the evaluation data itself"):
        sets.load(tmp_path, SERIES, Selection(avoid=tmp_path / "heldout.npz"))


def test_the_same_content_in_another_format(tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 320, 3)).astype(np.float32)
    np.savez(tmp_path / "heldout.npz", x=x, target=x)
    np.save(tmp_path / "copy.npy", x.astype(np.float64))
    with refused(InputError, "copy.npy overlaps", "heldout.npz", "of its 10 windows of 64 positions, 10 are"):
        sets.load(tmp_path / "copy.npy", SERIES, Selection(avoid=tmp_path / "heldout.npz"))


@pytest.mark.parametrize("shift", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("common", [127, 500])
def test_a_common_stretch_wherever_it_stands(tmp_path: Path, shift: int, common: int) -> None:
    heldout = RNG.integers(0, 256, 2000)
    calib = RNG.integers(0, 256, 1500)
    calib[333 : 333 + common] = heldout[700 + shift : 700 + shift + common]
    avoid = text(tmp_path / "heldout.txt", heldout)
    with refused(InputError, "of its 31 windows of 64 positions"):
        sets.load(text(tmp_path / "calib.txt", calib), TOKENS, Selection(avoid=avoid), vocab_size=256)


def test_a_part_of_the_evaluation_data_among_others(tmp_path: Path) -> None:
    heldout = RNG.standard_normal((3, 640, 3))
    np.savez(tmp_path / "heldout.npz", x=heldout)
    np.savez(tmp_path / "calib.npz", x=np.concatenate([RNG.standard_normal((2, 640, 3)), heldout[1:2]]))
    with refused(InputError, "of its 30 windows of 64 positions, 10 are in both"):
        sets.load(tmp_path / "calib.npz", SERIES, Selection(avoid=tmp_path / "heldout.npz"))


def test_different_data_passes(tmp_path: Path) -> None:
    """Short common stretches do as well: sixty bytes are a phrase, not a copy."""
    heldout, calib = RNG.integers(0, 256, 2000), RNG.integers(0, 256, 2000)
    calib[100:160] = heldout[64:124]
    avoid = text(tmp_path / "heldout.txt", heldout)
    data = sets.load(text(tmp_path / "calib.txt", calib), TOKENS, Selection(avoid=avoid), vocab_size=256)
    assert data.samples == 1


def test_evaluation_data_must_be_there_and_fit(tmp_path: Path) -> None:
    path = text(tmp_path / "calib.txt", RNG.integers(0, 256, 300))
    with refused(InputError, "nowhere.txt does not exist"):
        sets.load(path, TOKENS, Selection(avoid=tmp_path / "nowhere.txt"), vocab_size=256)


def test_a_silent_sensor_is_no_copy() -> None:
    """Windows of one repeated position are everywhere; they count on neither side."""
    ours, theirs = RNG.integers(0, 9, 640), RNG.integers(9, 18, 640)
    ours[64:256] = theirs[128:320] = 0
    assert overlap.shared_windows(tokens(ours), [tokens(theirs)], TOKENS) == (0, 7, 64)


def test_rows_of_short_sequences() -> None:
    rows = RNG.integers(0, 256, (6, 30))
    shared = overlap.shared_windows(tokens(*rows[:4]), [tokens(*rows[3:])], TOKENS)
    assert shared == (1, 3, 30)


def test_rows_without_positions() -> None:
    pictures = RNG.standard_normal((9, 5)).astype(np.float32)
    shared = overlap.shared_windows({"picture": pictures[:5]}, [{"picture": pictures[3:]}], PLAIN)
    assert shared == (2, 6, 1)
