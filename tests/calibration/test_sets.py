"""Calibration sets: cut, sampled and hashed as said, and refused where too little is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import own_models
import pytest
from refusals import refused
from specs import PLAIN, POLICY, SERIES, TOKENS
from xlstm_export.calibration import sets
from xlstm_export.calibration.sets import Selection

from xlstm_export.errors import InputError, UsageError
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.runfolder import read_io
from xlstm_export.specs import IoSpec, TensorSpec


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """10,000 bytes in which every 3 in a row say where they are."""
    content = bytes(digit for n in range(3334) for digit in (n % 16, n // 16 % 16 + 16, n // 256 + 32))
    (tmp_path / "calib.txt").write_bytes(content[:10_000])
    return tmp_path / "calib.txt"


def series(path: Path, sequences: int, length: int, seed: int = 0) -> Path:
    np.savez(path, x=np.random.default_rng(seed).standard_normal((sequences, length, 3)))
    return path


# --- Cutting --------------------------------------------------------------------------------------------


def test_windows_are_consecutive_stretches(text: Path) -> None:
    data = sets.load(text, TOKENS, Selection(length=1000), vocab_size=256)
    assert (data.samples, data.length(TOKENS)) == (10, 1000)
    assert data.inputs["tokens"].ravel().tolist() == list(text.read_bytes())


def test_what_is_left_over_is_dropped(text: Path) -> None:
    data = sets.load(text, TOKENS, Selection(length=3000), vocab_size=256)
    assert data.inputs["tokens"].shape == (3, 3000)


def test_a_single_long_sequence_is_cut_evenly(text: Path) -> None:
    data = sets.load(text, TOKENS, vocab_size=256)
    assert data.inputs["tokens"].shape == (5, 2000)


def test_several_sequences_stay_whole(tmp_path: Path) -> None:
    data = sets.load(series(tmp_path / "a.npz", 2, 3000), SERIES)
    assert data.inputs["x"].shape == (2, 3000, 3)


def test_windows_keep_what_has_no_positions(tmp_path: Path) -> None:
    goal = np.arange(6.0).reshape(3, 2)
    image = np.random.default_rng(0).standard_normal((3, 200, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", image=image, mask=image[..., 0] > 0, goal=goal)
    data = sets.load(tmp_path / "a.npz", POLICY, Selection(length=90))
    assert np.array_equal(data.inputs["image"], image[:, :180].reshape(6, 90, 4))
    assert np.array_equal(data.inputs["goal"], np.repeat(goal, 2, axis=0))


def test_ragged_files(tmp_path: Path) -> None:
    """Cut to the shortest where little is lost, refused where much is, cut into windows where asked for."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for index, length in enumerate((300, 320, 310)):
        series(folder / f"{index}.npz", 2, length, index)
    assert sets.load(folder, SERIES).inputs["x"].shape == (6, 300, 3)
    series(folder / "3.npz", 1, 20)
    with refused(InputError, "20 to 320 positions", "93% of the positions would be lost", "give a length"):
        sets.load(folder, SERIES)
    assert sets.load(folder, SERIES, Selection(length=20)).inputs["x"].shape == (32, 20, 3)
    with refused(InputError, "a sequence of 20 positions, 21 were asked for"):
        sets.load(folder, SERIES, Selection(length=21))


# --- Sampling -------------------------------------------------------------------------------------------


def test_sampling_is_by_seed(text: Path) -> None:
    def starts(**options: int) -> list[int]:
        data = sets.load(text, TOKENS, Selection(length=100, **options), vocab_size=256)
        whole = list(text.read_bytes())
        return [next(i for i in range(0, 10_000, 100) if whole[i : i + 100] == row.tolist())
                for row in data.inputs["tokens"]]  # fmt: skip

    assert len(starts()) == sets.SAMPLES
    assert starts(samples=100) == list(range(0, 10_000, 100))
    first = starts(samples=7)
    assert first == starts(samples=7, seed=0) == sorted(set(first))
    assert first != starts(samples=7, seed=1)


def test_more_samples_than_there_are(text: Path) -> None:
    with refused(InputError, "gives 10 sequences, 11 were asked for"):
        sets.load(text, TOKENS, Selection(length=1000, samples=11), vocab_size=256)


# --- Hash -----------------------------------------------------------------------------------------------


def test_hash_is_of_the_content_not_of_the_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1, 300, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=values)
    np.savez_compressed(tmp_path / "b.npz", target=[1.0], x=values.astype(">f8"))
    np.save(tmp_path / "c.npy", values[0])
    rows = "\n".join(",".join(repr(float(cell)) for cell in row) for row in values[0])
    (tmp_path / "d.csv").write_text(f"a,b,c\n{rows}\n")
    hashes = {sets.load(tmp_path / name, SERIES).sha256 for name in ("a.npz", "b.npz", "c.npy", "d.csv")}
    assert len(hashes) == 1


def test_hash_sees_every_difference() -> None:
    base = {"x": np.zeros((2, 3), np.float32), "y": np.ones(2, np.int64)}
    others = [
        {**base, "x": np.zeros((3, 2), np.float32)},
        {**base, "x": np.zeros((2, 3), np.int32)},
        {**base, "x": np.full((2, 3), -0.0, np.float32)},
        {"x": base["x"], "z": base["y"]},
        {"x": base["x"]},
    ]
    assert len({sets.content_hash(arrays) for arrays in (base, *others)}) == 6
    assert sets.content_hash(dict(reversed(base.items()))) == sets.content_hash(base)


# --- Too little -----------------------------------------------------------------------------------------


def test_too_few_positions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(255))
    with refused(InputError, "1 sequence of 255 positions, at least 256", "chance"):
        sets.load(tmp_path / "a.txt", TOKENS, vocab_size=256)
    (tmp_path / "a.txt").write_bytes(bytes(256))
    assert sets.load(tmp_path / "a.txt", TOKENS, vocab_size=256).samples == 1


def test_sequences_too_short_to_carry_a_state(text: Path) -> None:
    with refused(InputError, "sequences of 1 position", "state"):
        sets.load(text, TOKENS, Selection(length=1, samples=300), vocab_size=256)


def test_models_without_positions(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", picture=np.ones((300, 5)))
    data = sets.load(tmp_path / "a.npz", PLAIN, Selection(samples=256))
    assert (data.samples, data.length(PLAIN)) == (256, 1)
    with refused(InputError, "32 sequences of 1 position, at least 256"):
        sets.load(tmp_path / "a.npz", PLAIN)
    with refused(UsageError, "no positions"):
        sets.load(tmp_path / "a.npz", PLAIN, Selection(length=3))


@pytest.mark.parametrize("option", ["samples", "length"])
def test_options_that_make_no_sense(text: Path, option: str) -> None:
    with refused(UsageError, f"{option} is 0"):
        sets.load(text, TOKENS, Selection(**{option: 0}), vocab_size=256)


# --- Made up --------------------------------------------------------------------------------------------


def test_random_sets_are_large_enough_without_positions() -> None:
    io = IoSpec((TensorSpec("image", "float32", ("B", 3, 16, 16)),), (), ())
    data = sets.random_set(own_models.vision(), io)
    assert data.samples >= 256


def test_random_sets_say_so(small_loaded: Loaded, small_export: Path) -> None:
    io = read_io(small_export)
    data = sets.random_set(small_loaded, io, Selection(samples=3, length=100, seed=5))
    assert data.to_json(io) == {
        "name": "random",
        "sha256": data.sha256,
        "samples": 3,
        "positions": 300,
        "random": True,
        "seed": 5,
    }
    assert data.sha256 == sets.random_set(small_loaded, io, Selection(samples=3, length=100, seed=5)).sha256
    assert data.sha256 != sets.random_set(small_loaded, io, Selection(samples=3, length=100, seed=6)).sha256
    with refused(InputError, "the random set"):
        sets.random_set(small_loaded, io, Selection(samples=1, length=100))
