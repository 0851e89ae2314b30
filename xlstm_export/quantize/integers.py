"""Weights as integers: scales per output channel or block of rows, from the largest value or least error.

Symmetric, zero point 0. Weights are read one at a time; their integers are computed when the file is written.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

INT8, INT4 = 127, 7  # largest magnitude; INT4 also has -8, which symmetric scales leave for what is clipped
# Fractions of the largest weight to clip at. Below one half the clipped part outweighs any gain.
CLIPS = np.linspace(1.0, 0.5, 21)
_CHUNK = 1 << 22  # elements whose errors are in memory at once


def channel_scales(weight: np.ndarray, axis: int, *, clip: bool, half: type | None = None) -> np.ndarray:
    """INT8 scales, one per index along `axis`.

    Args:
        weight: any shape, float32.
        axis: the output channel.
        clip: the scale with the least squared error instead of the one that holds the largest weight.
        half: 16-bit type in which the scales must be exact.

    Returns:
        (weight.shape[axis],) float32, positive.
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    return _scales(rows, INT8, clip, half)


def block_scales(weight: np.ndarray, size: int, *, clip: bool, half: type | None = None) -> np.ndarray:
    """INT4 scales, one per `size` rows of each column.

    Args:
        weight: (K, N) float32, K a multiple of `size`.

    Returns:
        (K / size, N) float32, positive.
    """
    K, N = weight.shape
    rows = weight.reshape(K // size, size, N).transpose(0, 2, 1).reshape(-1, size)
    return _scales(rows, INT4, clip, half).reshape(K // size, N)


def to_int8(weight: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    """Round to int8 with a scale per index along `axis`."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.clip(np.rint(weight / scales.reshape(shape)), -INT8, INT8).astype(np.int8)


def to_int4(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Round (K, N) to integers from -8 to 7 (as int8) with scales (K / size, N)."""
    size = weight.shape[0] // scales.shape[0]
    return np.clip(np.rint(weight / np.repeat(scales, size, axis=0)), -INT4 - 1, INT4).astype(np.int8)


def _scales(rows: np.ndarray, largest: int, clip: bool, half: type | None) -> np.ndarray:
    """One scale per row."""
    amax = np.abs(rows).max(axis=1)
    tiny = float(ml_dtypes.finfo(half or np.float32).smallest_normal)
    plain = _exact(np.maximum(amax / largest, tiny), half, tiny)
    if not clip:
        return plain
    found = plain.copy()
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part, best = rows[start : start + step], plain[start : start + step].copy()
        least = _squared_error(part, best, largest)
        for fraction in CLIPS[1:]:
            scale = _exact(np.maximum(plain[start : start + step] * fraction, tiny), half, tiny)
            error = _squared_error(part, scale, largest)
            better = error < least
            best[better], least[better] = scale[better], error[better]
        found[start : start + step] = best
    return found


def _squared_error(rows: np.ndarray, scales: np.ndarray, largest: int) -> np.ndarray:
    column = scales[:, None]
    restored = np.clip(np.rint(rows / column), -largest, largest) * column
    return np.square(rows - restored).sum(axis=1, dtype=np.float64)


def _exact(scales: np.ndarray, half: type | None, tiny: float) -> np.ndarray:
    scales = scales.astype(np.float32)
    if half is None:
        return scales
    return np.maximum(scales.astype(half).astype(np.float32), np.float32(tiny))
