"""From a histogram of magnitudes to the range of a symmetric 8-bit grid: 255 levels from −amax to amax.

A method may cut off the largest values: they are then all represented by amax, and everything else is
represented more finely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xlstm_export.errors import UsageError

LEVELS = 127  # steps between 0 and amax
# Clips that `mse` tries: 2^(1/32) is 2.2% apart, down to 1/128 of the largest value.
_STEPS_PER_OCTAVE, _OCTAVES = 32, 7


@dataclass(frozen=True)
class Distribution:
    """How often magnitudes of a tensor occur, zeros apart: any grid holds those exactly.

    Attributes:
        weights: (bins,) of the magnitudes in [i · width, (i + 1) · width).
        zeros: weight of the values that are exactly 0.
        width: of a bin.
        peak: the largest magnitude, exact.
    """

    weights: np.ndarray
    zeros: float
    width: float
    peak: float

    @property
    def used(self) -> int:
        """Bins up to the last that is not empty."""
        return int(np.flatnonzero(self.weights)[-1]) + 1


def amax_max(distribution: Distribution, percentile: float) -> float:
    """The largest value seen: nothing is cut off."""
    return distribution.peak


def amax_percentile(distribution: Distribution, percentile: float) -> float:
    """The magnitude that `percentile` % of the values do not exceed, interpolated inside its bin."""
    below = distribution.zeros + np.concatenate([[0.0], np.cumsum(distribution.weights)])
    wanted = percentile / 100 * below[-1]
    # The smallest magnitude that reaches the share: of several equal sums the first.
    index = int(np.searchsorted(below, wanted, side="left"))
    if index == 0:  # zeros alone are more than that
        return distribution.width
    inside = (wanted - below[index - 1]) / (below[index] - below[index - 1])
    return float((index - 1 + inside) * distribution.width)


def amax_mse(distribution: Distribution, percentile: float) -> float:
    """The clip with the smallest expected squared error of rounding and clipping together."""
    clips = distribution.peak * 2.0 ** (-np.arange(_STEPS_PER_OCTAVE * _OCTAVES + 1) / _STEPS_PER_OCTAVE)
    errors = [squared_error(distribution, clip) for clip in clips]
    return float(clips[int(np.argmin(errors))])  # the largest of equally good ones


def squared_error(distribution: Distribution, clip: float) -> float:
    """Expected squared error of the grid with amax = `clip`, values spread evenly inside each bin.

    With step s and k = min(round(x / s), 127), the integral of the squared error from 0 to x is
    k s³/12 + (x − k s)³/3, also beyond the clip. Its differences at the edges of the bins are exact for
    steps below the width of a bin, where an error at the centres would not be.
    """
    used = distribution.used
    # The last bin ends at the largest value: nothing lies between it and the bin's edge.
    edges = np.minimum(np.arange(used + 1) * distribution.width, distribution.peak)
    step = clip / LEVELS
    k = np.minimum(np.rint(edges / step), LEVELS)
    integral = k * step**3 / 12 + (edges - k * step) ** 3 / 3
    widths = np.maximum(
        np.diff(edges), np.finfo(float).tiny
    )  # the last may have none: peak at its lower edge
    last = clip / LEVELS * min(np.rint(distribution.peak / step), LEVELS) - distribution.peak
    mean = np.where(np.diff(edges) > 0, np.diff(integral) / widths, last**2)
    return float(distribution.weights[:used] @ mean / (distribution.zeros + distribution.weights.sum()))


def amax_entropy(distribution: Distribution, percentile: float) -> float:
    """The clip whose 128 levels lose the least information: smallest Kullback-Leibler divergence.

    For each clip at the edge of a bin, p is the histogram up to it with all that is cut off in its last
    bin, q the same histogram in 128 levels, each spread evenly over those of its bins that are not empty.

    What is cut off counts by how often it occurs, not by how far away it is: on heavy tails the clip is a
    fraction of that of `mse` (8 instead of 53, largest value 90, in the last block of the byte model).
    """
    weights = distribution.weights[: distribution.used]
    levels = LEVELS + 1
    if len(weights) <= levels:
        return distribution.peak
    clips = range(levels, len(weights) + 1)
    divergences = [_divergence(weights, clip, levels) for clip in clips]
    best = int(np.argmin(divergences))
    return float(min(clips[best] * distribution.width, distribution.peak))


def _divergence(weights: np.ndarray, clip: int, levels: int) -> float:
    kept = weights[:clip]
    p = kept.copy()
    p[-1] += weights[clip:].sum()
    level = np.arange(clip) * levels // clip
    full = kept > 0
    sums = np.bincount(level, weights=kept, minlength=levels)
    bins = np.bincount(level, weights=full, minlength=levels)
    q = np.where(full, sums[level] / np.maximum(bins[level], 1), 0.0)
    if not q.any():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    # What was cut off may stand in a bin that was empty: q needs something there, or it is infinitely far.
    q = np.maximum(q, 1e-12)
    held = p > 0
    return float(p[held] @ np.log(p[held] / q[held]))


METHODS: dict[str, Callable[[Distribution, float], float]] = {
    "max": amax_max,
    "percentile": amax_percentile,
    "entropy": amax_entropy,
    "mse": amax_mse,
}


def check(method: str, percentile: float) -> None:
    """Refuse a method there is none of, or a percentile that makes no sense.

    Raises:
        UsageError: so it is.
    """
    if method not in METHODS:
        raise UsageError(f"no calibration method {method!r}", f"methods are {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise UsageError(f"percentile is {percentile}", "it must be above 0 and at most 100; 99.99 is usual")


def amax(distribution: Distribution, method: str, percentile: float = 99.99) -> float:
    """The range of a tensor, at most its largest value, as a float32 number.

    0.0 where nothing but zeros was seen: any grid will do.
    """
    check(method, percentile)
    if distribution.peak == 0.0:
        return 0.0
    found = METHODS[method](distribution, percentile)
    return float(np.float32(min(found, distribution.peak)))
