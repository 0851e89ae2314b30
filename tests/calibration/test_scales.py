"""Scales on disk: what is written is read again; damage, mixtures and wrong names are told."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from xlstm_export.calibration.scales import CHANNELS, SCALES, Scales, TensorScale, bucket_labels, trend

from xlstm_export.errors import InputError, SetupError


def scale(first: float | None, last: float, amax: float = 1.0) -> TensorScale:
    rms = None if first is None else first / 10
    return TensorScale(amax, max(first or 0.0, last), (first, None, last), (rms, None, last / 5), 12)


@pytest.fixture
def scales() -> Scales:
    return Scales(
        method="mse",
        percentile=None,
        data={"name": "calib.txt", "sha256": "12", "samples": 3, "positions": 9, "random": False, "seed": 0},
        model={"model.onnx": "ab" * 32, "model.onnx.data": "cd" * 32},
        versions={"numpy": "2"},
        borders=(0, 1, 8),
        options={"batch": 4},
        tensors={
            "steady": scale(1.0, 1.1),
            "grows": scale(2.0, 16.0, 0.1),
            "shrinks": scale(8.0, 4.0),
            "once": scale(None, 1.0),
            "zeros": TensorScale(0.0, 0.0, (0.0, None, 0.0), (0.0, None, 0.0), 12),
        },
        channel_amax={
            name: np.arange(4, dtype=np.float32) for name in ("steady", "grows", "shrinks", "once", "zeros")
        },
    )


def test_read_gives_what_was_written(scales: Scales, tmp_path: Path) -> None:
    scales.write(tmp_path)
    found = Scales.read(tmp_path)
    assert found.to_json() == scales.to_json()
    assert found.tensors == scales.tensors
    assert {path.name for path in tmp_path.iterdir()} == {SCALES, CHANNELS}
    assert found.amax("grows") == 0.1
    assert np.array_equal(found.channels("grows"), np.arange(4))
    assert found.channels("grows").dtype == np.float32
    assert found.all_amax()["shrinks"] == 1.0
    assert set(found.all_channels()) == set(found.all_amax()) == set(scales.tensors)


@pytest.mark.parametrize("value", [10**400, "1e", None, [1]])
def test_numbers_that_are_none(scales: Scales, tmp_path: Path, value: object) -> None:
    """An integer beyond every float too."""
    scales.write(tmp_path)
    data = json.loads((tmp_path / SCALES).read_text())
    data["tensors"]["grows"]["amax"] = value
    (tmp_path / SCALES).write_text(json.dumps(data))
    with refused(InputError, "does not hold scales"):
        Scales.read(tmp_path)


def test_a_full_disk_leaves_the_old_pair(
    scales: Scales, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two files belong together: neither takes its name before both are complete."""
    scales.write(tmp_path)
    old = (tmp_path / CHANNELS).read_bytes()

    def full(data: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xlstm_export.calibration.scales.json_text", full)
    scales.channel_amax["once"][:] = 9
    with refused(SetupError, "full"):
        scales.write(tmp_path)
    assert (tmp_path / CHANNELS).read_bytes() == old
    Scales.read(tmp_path)


def test_writing_again_gives_the_same_bytes(scales: Scales, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        scales.write(tmp_path / folder)
    for name in (SCALES, CHANNELS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names_that_were_not_observed(scales: Scales) -> None:
    for ask in (scales.amax, scales.channels):
        with refused(InputError, "no range for grow", "close to it are grows"):
            ask("grow")
        with refused(InputError, "no range for 123456", "calibrate this graph again"):
            ask("123456")


def test_another_graph(scales: Scales) -> None:
    scales.require_graph("ab" * 32)
    with refused(InputError, "hash abababababab…", "this one has ffffffffffff…", "again"):
        scales.require_graph("ff" * 32)


def test_missing_and_damaged_files(scales: Scales, tmp_path: Path) -> None:
    with refused(InputError, "scales.json does not exist", "xlstm-export calibrate"):
        Scales.read(tmp_path)
    scales.write(tmp_path)
    good = json.loads((tmp_path / SCALES).read_text())
    for content, words in {
        "{": ["cannot be read"],
        "[]": ["schema 'list'"],
        json.dumps({**good, "schema": 2}): ["schema 2", "reads 1"],
        json.dumps({**good, "tensors": {"a": {}}}): ["does not hold scales"],
        json.dumps({**good, "tensors": {"steady": good["tensors"]["steady"]}}): ["name different tensors"],
        json.dumps({key: good[key] for key in good if key != "method"}): ["does not hold scales"],
    }.items():
        (tmp_path / SCALES).write_text(content)
        with refused(InputError, *words):
            Scales.read(tmp_path)


def test_channels_of_another_calibration(scales: Scales, tmp_path: Path) -> None:
    scales.write(tmp_path)
    content = bytearray((tmp_path / CHANNELS).read_bytes())
    content[-1] ^= 1
    (tmp_path / CHANNELS).write_bytes(content)
    with refused(InputError, "channels.safetensors does not belong to the scales.json beside it"):
        Scales.read(tmp_path)
    (tmp_path / CHANNELS).unlink()
    with refused(InputError, "channels.safetensors cannot be read"):
        Scales.read(tmp_path)


def test_a_folder_that_cannot_be_written(scales: Scales, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(SetupError, "cannot be written"):
        scales.write(tmp_path / "file")


def test_trend_by_hand(scales: Scales) -> None:
    rows = trend(scales)
    assert [(row.name, row.amax_ratio, row.rms_ratio) for row in rows] == [
        ("grows", 8.0, 16.0),
        ("shrinks", 0.5, 1.0),
        ("steady", pytest.approx(1.1), pytest.approx(2.2)),
    ]
    assert (rows[0].first, rows[0].last, rows[0].amax_first, rows[0].amax_last) == ("0", "8…", 2.0, 16.0)


def test_labels() -> None:
    assert bucket_labels((0, 1, 8, 64)) == ["0", "1…7", "8…63", "64…"]
    assert bucket_labels((0,)) == ["0…"]
