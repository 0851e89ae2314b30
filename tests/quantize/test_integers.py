"""Integer weights against rounding written out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from xlstm_export.quantize import integers


def restored(q: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.astype(np.float32) * scales.reshape(shape)


@pytest.mark.parametrize(
    ("shape", "axis"), [((24, 16), 1), ((24, 16), 0), ((3, 24, 16), 2), ((2, 8, 4, 8), 3)]
)
def test_channel_scales_hold_the_largest_weight(shape: tuple[int, ...], axis: int) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scales = integers.channel_scales(weight, axis, clip=False)
    others = tuple(i for i in range(len(shape)) if i != axis)
    np.testing.assert_allclose(scales, np.abs(weight).max(others) / 127, rtol=1e-6)
    error = np.abs(restored(integers.to_int8(weight, scales, axis), scales, axis) - weight)
    assert (error <= scales.max() / 2 * 1.0001).all()


def test_clipping_lowers_the_error_of_every_channel() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 8)).astype(np.float32)
    weight[0] = 9.0  # one weight of each channel far outside
    errors = []
    for clip in (False, True):
        scales = integers.block_scales(weight, 512, clip=clip)
        back = integers.to_int4(weight, scales) * np.repeat(scales, 512, axis=0)
        errors.append(np.square(back - weight).sum(0))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_blocks_of_rows() -> None:
    weight = np.random.default_rng(0).standard_normal((128, 6)).astype(np.float32)
    weight[64:] *= 100
    scales = integers.block_scales(weight, 64, clip=False)
    assert scales.shape == (2, 6)
    np.testing.assert_allclose(scales[0], np.abs(weight[:64]).max(0) / 7, rtol=1e-6)
    np.testing.assert_allclose(scales[1], np.abs(weight[64:]).max(0) / 7, rtol=1e-6)
    q = integers.to_int4(weight, scales)
    assert q.min() >= -8
    assert q.max() <= 7
    assert (
        np.abs(q * np.repeat(scales, 64, axis=0) - weight) <= np.repeat(scales, 64, axis=0) / 2 * 1.001
    ).all()


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_scales_that_are_exact_in_half(half: type) -> None:
    """What is rounded is the scale, before the weights are; and it stays a normal number."""
    weight = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    weight[:, 0] *= 1e-9
    scales = integers.channel_scales(weight, 1, clip=True, half=half)
    assert (scales.astype(half).astype(np.float32) == scales).all()
    assert (scales >= float(ml_dtypes.finfo(half).smallest_normal)).all()
    back = restored(integers.to_int8(weight, scales, 1), scales, 1)
    assert np.linalg.norm(back[:, 1:] - weight[:, 1:]) / np.linalg.norm(weight[:, 1:]) < 0.01


def test_a_channel_of_zeros() -> None:
    weight = np.zeros((16, 2), np.float32)
    scales = integers.channel_scales(weight, 1, clip=True)
    assert (scales > 0).all()
    assert not integers.to_int8(weight, scales, 1).any()
