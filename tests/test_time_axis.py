"""Every place that cuts, joins, reads or makes up tensors: positions on another axis, several to a step.

The same numbers are laid out in three ways, (B, S, F), (B, F, S) and (B, 4*S, F); what a place does with the
first is known from its own tests, so the others must give the same numbers laid out in their way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from xlstm_export.calibration import sets
from xlstm_export.calibration.overlap import check_contents

from xlstm_export.board.build import profile_shapes
from xlstm_export.board.replay import keep, kept_positions
from xlstm_export.errors import InputError
from xlstm_export.inputs import cut, joined, length_of, rolled, rows_of
from xlstm_export.load.loaded import Loaded
from xlstm_export.load.made_up import random_inputs
from xlstm_export.measure import data
from xlstm_export.sessions.arrays import checked_inputs
from xlstm_export.sessions.files import InputFiles
from xlstm_export.specs import IoSpec, TensorSpec

USUAL, FIRST, PATCHED = ("B", "S", 5), ("B", 5, "S"), ("B", "4*S", 5)
LAYOUTS = [USUAL, FIRST, PATCHED]
SHARED = TensorSpec("mean", "float32", (5,))


def io_of(shape: Any, *more: TensorSpec) -> IoSpec:
    output = ("B", 3, "S") if shape == FIRST else ("B", "S", 3)
    return IoSpec((TensorSpec("x", "float32", shape), *more), (TensorSpec("y", "float32", output),), ())


def numbers(rows: int, positions: int) -> np.ndarray:
    """(B, 4*S, 5), all different."""
    return np.arange(rows * positions * 20, dtype=np.float32).reshape(rows, positions * 4, 5)


def laid_out(usual: np.ndarray, shape: Any) -> np.ndarray:
    """(B, 4*S, 5) as it is for a layout; the layouts without patches take every fourth row."""
    if shape == PATCHED:
        return usual
    return usual[:, ::4].transpose(0, 2, 1) if shape == FIRST else usual[:, ::4]


@pytest.mark.parametrize("shape", LAYOUTS)
def test_cut_and_joined(shape: Any) -> None:
    io, whole = io_of(shape, SHARED), numbers(2, 9)
    inputs = {"x": laid_out(whole, shape), "mean": np.ones(5, np.float32)}
    assert length_of(inputs, io.inputs) == 9
    pieces = [cut(inputs, io, *ends) for ends in ((0, 1), (1, 6), (6, 9))]
    assert np.array_equal(pieces[1]["x"], laid_out(whole[:, 4:24], shape))
    assert all(p["x"].flags.c_contiguous for p in pieces)
    assert np.array_equal(joined([p["x"] for p in pieces], io.inputs[0]), inputs["x"])
    assert np.array_equal(rolled(inputs["x"], io.inputs[0], 2), laid_out(np.roll(whole, -8, 1), shape))
    row = rows_of(inputs, io, slice(1, 2))
    assert np.array_equal(row["x"], inputs["x"][1:])
    assert row["mean"].shape == (5,)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_sessions_check_the_axis(shape: Any) -> None:
    io = io_of(shape, SHARED)
    given = {"x": laid_out(numbers(2, 3), shape).tolist(), "mean": [0.0] * 5}
    assert checked_inputs(io, 2, given)["x"].shape == io.inputs[0].sized(2, 3)
    assert checked_inputs(io, 2, given, length=3)["mean"].shape == (5,)
    with pytest.raises(InputError, match=r"expected \["):
        checked_inputs(io, 2, given, length=1)


def test_a_part_of_a_step_is_refused() -> None:
    with pytest.raises(InputError, match=r"input x has shape \[2, 7, 5\], expected \[2, 4, 5\]"):
        checked_inputs(io_of(PATCHED), 2, {"x": np.zeros((2, 7, 5), np.float32)})
    with pytest.raises(InputError, match=r"input x has shape \[2, 3, 5\], expected \[2, 4\*S, 5\]"):
        checked_inputs(io_of(PATCHED), 2, {"x": np.zeros((2, 3, 5), np.float32)})


@pytest.mark.parametrize("shape", LAYOUTS)
def test_made_up_inputs_resemble_the_channels_of_the_example(shape: Any) -> None:
    levels = 100.0 * torch.arange(5)
    example = levels.expand(2, 12, 5) + torch.randn(2, 12, 5)
    example = example.mT if shape == FIRST else example
    loaded = Loaded(nn.Identity(), {"x": example, "mean": levels}, "y", "Identity", {})
    found = random_inputs(loaded, io_of(shape, SHARED), 3, 8, np.random.default_rng(0))
    assert found["x"].shape == io_of(shape).inputs[0].sized(3, 8)
    means = found["x"].mean((0, 2)) if shape == FIRST else found["x"].mean((0, 1))
    assert np.abs(means - levels.numpy()).max() < 2
    assert found["mean"].shape == (5,)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_calibration_windows(shape: Any, tmp_path: Path) -> None:
    io, whole = io_of(shape, SHARED), numbers(3, 200)
    mean = np.ones(5, np.float32)
    np.savez(tmp_path / "calib.npz", x=laid_out(whole, shape), mean=mean)
    found = sets.load(tmp_path / "calib.npz", io, sets.Selection(length=64, samples=9))
    assert (found.samples, found.length(io)) == (9, 64)
    windows = whole[:, : 3 * 64 * 4].reshape(9, 64 * 4, 5)
    assert np.array_equal(found.inputs["x"], laid_out(windows, shape))
    assert np.array_equal(found.inputs["mean"], mean)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_overlap_of_calibration_and_held_out_data(shape: Any) -> None:
    io, whole = io_of(shape), numbers(1, 300)
    ours, theirs = ({"x": laid_out(part, shape)} for part in (whole[:, :800], whole[:, 400:]))
    with pytest.raises(InputError, match="calib"):
        check_contents(ours, [theirs], io, ("calib", "heldout"))
    check_contents(
        {"x": laid_out(whole[:, :800], shape)}, [{"x": laid_out(whole + 1e6, shape)}], io, ("a", "b")
    )


@pytest.mark.parametrize("shape", LAYOUTS)
def test_held_out_data(shape: Any, tmp_path: Path) -> None:
    io, whole = io_of(shape), numbers(2, 30)
    target = np.arange(2 * 30 * 3, dtype=np.float32).reshape(2, 30, 3)
    given = target.transpose(0, 2, 1) if shape == FIRST else target
    np.savez(tmp_path / "heldout.npz", x=laid_out(whole, shape), target=given)
    held = data.load(tmp_path / "heldout.npz", io, limit=20)
    assert (held.rows, held.length) == (2, 20)
    assert np.array_equal(held.inputs["x"], laid_out(whole[:, :80], shape))
    output = target[:, :20] + 0.5
    assert held.score({"y": output.transpose(0, 2, 1) if shape == FIRST else output}) == pytest.approx(0.5)
    sample = held.sample(3, 4, np.random.default_rng(0))["x"]
    assert sample.shape == io.inputs[0].sized(3, 4)
    assert np.array_equal(held.streams(2)["x"], held.inputs["x"])
    wider = np.repeat(laid_out(whole, shape), 2, axis=1 if shape == FIRST else 2)
    np.savez(tmp_path / "odd.npz", x=wider, target=given)
    with pytest.raises(InputError, match="expected"):
        data.load(tmp_path / "odd.npz", io)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_a_series_of_rows_becomes_the_input(shape: Any, tmp_path: Path) -> None:
    """The CSV has a row of channels per position, whatever the model's layout is."""
    rows = numbers(1, 3)[0]  # 12 rows
    path = tmp_path / "rows.csv"
    np.savetxt(path, np.concatenate([rows, rows[:2]]), delimiter=",")
    found = InputFiles(io_of(shape)).read(path).parts[0]["x"]
    expected = np.concatenate([rows, rows[:2]])[None] if shape != PATCHED else rows[None]
    assert np.array_equal(found, expected.transpose(0, 2, 1) if shape == FIRST else expected)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_recorded_positions_and_profiles(shape: Any) -> None:
    spec, whole = TensorSpec("y", "float32", shape), numbers(1, 9)
    kept = keep({"y": laid_out(whole, shape)}, {"y": spec}, 9)["y"]
    assert kept_positions(9, spec) == list(range(9))
    assert np.array_equal(kept, laid_out(whole, shape))
    profiles = profile_shapes(io_of(shape, SHARED), 100, 2)
    one, most = spec.sized(1, 1), spec.sized(2, 100)
    assert (profiles["x"][0][0], profiles["x"][1][2]) == (one, most)
    assert profiles["mean"][1] == ((5,), (5,), (5,))
