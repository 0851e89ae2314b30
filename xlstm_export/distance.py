"""Distances between two results, and between recurrent states independently of their stabilizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from .specs import Json, StateSpec


@dataclass(frozen=True)
class Difference:
    """Distance of a candidate from its reference, both in float64.

    Attributes:
        relative_l2: ‖a − b‖ / ‖b‖.
        cosine: cosine of the two flattened tensors; it does not depend on scale.
        norm_ratio: ‖a‖ / ‖b‖, the scale that the cosine ignores.
        max_abs: largest absolute error; `at` is its index.
    """

    relative_l2: float
    cosine: float
    norm_ratio: float
    max_abs: float
    at: tuple[int, ...]

    def to_json(self) -> Json:
        return {**asdict(self), "at": list(self.at)}


def difference(candidate: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare two tensors of the same shape; NaN, and Inf in one of them only, are an infinite error.

    Mask constants on which both agree (infinities, or values that dwarf all others, such as -1e4) are left
    out: beside them no error would be seen.
    """
    a, b = without_masks(candidate, reference)
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        return Difference(math.inf, 0.0, math.inf, math.inf, at)
    error = np.abs(a - b)
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norm_b == 0.0:
        same = norm_a == 0.0
        return Difference(
            0.0 if same else math.inf, float(same), 1.0 if same else math.inf, float(error.max()), at
        )
    cosine = float(np.dot(a.ravel(), b.ravel()) / (norm_a * norm_b)) if norm_a else 0.0
    return Difference(float(np.linalg.norm(a - b)) / norm_b, cosine, norm_a / norm_b, float(error.max()), at)


def without_masks(candidate: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, with zeros where both have the same mask constant."""
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    compared = ~_masked(a, b)
    return np.where(compared, a, 0.0), np.where(compared, b, 0.0)


# A constant this many times as large as everything else is a mask. The smallest in use is -1e3.
DWARFS, SMALLEST_MASK = 1e3, 1e3
# The most negative number of a type is a mask too, and differs between types.
BEYOND = 1e37


def _masked(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where both hold the same mask constant."""
    beyond = (np.abs(b) > BEYOND) & (np.abs(a) > BEYOND) & (np.sign(a) == np.sign(b))
    size = np.where(beyond | ~np.isfinite(b), 0.0, np.abs(b))
    peak = float(size.max(initial=0.0))
    if peak < SMALLEST_MASK:
        return beyond
    at_peak = size == peak
    rest = b[~at_peak & ~beyond]
    # Rounding errors of what is zero are no scale to measure by.
    scale = float(np.sqrt(np.mean(np.square(rest)))) if rest.size and np.isfinite(rest).all() else 0.0
    if scale < 1e-6 or peak < DWARFS * scale or not np.array_equal(a[at_peak], b[at_peak]):
        return beyond
    return beyond | at_peak


def gauge_free(
    state: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], states: tuple[StateSpec, ...]
) -> dict[str, np.ndarray]:
    """`state` expressed with the stabilizers m of `reference`.

    (C, n, m) and (C·eᵃ, n·eᵃ, m − a) are the same mLSTM state, likewise (c, n, m) of an sLSTM: only
    C·eᵐ and n·eᵐ have a meaning. With the same m in both states, their raw tensors can be compared.

    Args:
        state, reference: past name → (B, ...), of the same model.
        states: the model's states.

    Returns:
        past name → float64 array without the m tensors, in the gauge of `reference`.
    """
    shifts = {
        s.block: np.asarray(state[s.past], np.float64) - np.asarray(reference[s.past], np.float64)
        for s in states
        if s.kind == "m"
    }
    result = {}
    for spec in states:
        if spec.kind == "m":
            continue
        value = np.asarray(state[spec.past], dtype=np.float64)
        if spec.kind in ("C", "n", "c") and spec.block in shifts:
            shift = shifts[spec.block]
            shift = shift.reshape(shift.shape + (1,) * (value.ndim - shift.ndim))
            with np.errstate(over="ignore", invalid="ignore"):
                # Zero stays zero for every shift, also where exp of the shift is out of range.
                zero = (value == 0.0) & np.isfinite(shift)
                value = np.where(zero, 0.0, value * np.exp(shift))
        result[spec.past] = value
    return result


def compare_states(
    candidate: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], states: tuple[StateSpec, ...]
) -> dict[str, Difference]:
    """Gauge-free difference per state tensor, by past name; of a small y relative to `SMALL_Y`."""
    ours = gauge_free(candidate, reference, states)
    bounded = {s.past for s in states if s.kind == "y"}
    found = {name: difference(ours[name], reference[name]) for name in ours}
    return {
        name: _of_small(far, ours[name], reference[name]) if name in bounded else far
        for name, far in found.items()
    }


# A cell's last result y is at most 1 and is added to pre-activations: what counts is its absolute error.
# Where output gates are shut it is 1e-8, and the sigmoid of a runtime may give exactly 0 there.
SMALL_Y = 1e-2


def _of_small(far: Difference, candidate: np.ndarray, reference: np.ndarray) -> Difference:
    """The difference of a y; one that is smaller than `SMALL_Y` (root mean square) counts as that large."""
    a, b = np.asarray(candidate, np.float64), np.asarray(reference, np.float64)
    least = SMALL_Y * float(np.sqrt(b.size))
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.linalg.norm(b) >= least:
        return far
    return replace(far, relative_l2=float(np.linalg.norm(a - b)) / least)
