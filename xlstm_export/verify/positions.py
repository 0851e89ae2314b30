"""Errors by position: quantiles of them, so that a few ill-conditioned positions do not stand for all.

The error of a position is ‖a − b‖ over its values, divided by the root mean square of ‖b‖ over the positions
of the longest call. All calls have this scale, so that a short one is judged as a part of a long one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import Check, Replay
from ..distance import without_masks
from ..inputs import Arrays
from ..specs import Json, TensorSpec
from .limits import OWN_ERRORS, POSITIONS, output_limit

# Positions of all rows that a quantile needs; with fewer, it would be the worst one or next to it.
FEWEST = {50: 48, 99: 300, 100: 1}
NAMED = 12  # ill-conditioned positions that a verdict lists


@dataclass(frozen=True)
class Worst:
    """The largest value of a quantile over all calls, and the call, row and position it comes from."""

    value: float
    call: str
    at: tuple[int, int]
    replay: Replay | None


class Positions:
    """Collects the errors of calls.

    Args:
        outputs: the outputs that are compared.
        usual: outputs of the longest call, which are the scale.
    """

    def __init__(self, outputs: Iterable[TensorSpec], usual: Arrays) -> None:
        self.specs = {spec.name: spec for spec in outputs}
        self.scales = {name: _scale(usual[name], spec) for name, spec in self.specs.items()}
        self.worst: dict[tuple[str, int], Worst] = {}

    def errors(self, name: str, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Errors (rows, positions) of an output; infinite where it is no number."""
        a, b = (_by_position(x, self.specs[name]) for x in without_masks(found, expected))
        gap = np.linalg.norm(a - b, axis=-1)
        scale = self.scales[name]
        relative = gap / scale if scale else np.where(gap == 0.0, 0.0, np.inf)
        return np.where(np.isfinite(relative), relative, np.inf)

    def add(
        self,
        call: str,
        name: str,
        found: np.ndarray,
        expected: np.ndarray,
        *,
        most: float = math.inf,
        replay: Replay | None = None,
    ) -> None:
        """Take the quantiles of an output of a call; not of 16-bit values, which become their neighbours."""
        if output_limit(0.0, expected):
            return
        errors = np.minimum(most, self.errors(name, found, expected))
        row, position = np.unravel_index(int(errors.argmax()), errors.shape)
        for quantile, value in quantiles(errors).items():
            worst = self.worst.get((name, quantile))
            if worst is None or value > worst.value:
                self.worst[name, quantile] = Worst(value, call, (int(row), int(position)), replay)

    def checks(self) -> list[Check]:
        """One check of each output and quantile, of the call in which it is largest."""
        return [
            Check(
                f"positions of {name}: quantile {quantile}",
                worst.value,
                POSITIONS[quantile],
                {"output": name, "quantile": quantile, "call": worst.call, "worst": list(worst.at)},
                worst.replay,
            )
            for (name, quantile), worst in self.worst.items()
        ]


def quantiles(errors: np.ndarray) -> dict[int, float]:
    """The quantiles of `POSITIONS`; of few positions the largest only."""
    wanted = [q for q in POSITIONS if errors.size >= FEWEST[q]]
    # Of the values that are there, not between two of them, of which one may be infinite.
    return {q: float(np.percentile(errors, q, method="higher")) for q in wanted}


def ill_conditioned(own: Mapping[str, np.ndarray]) -> list[Json]:
    """Positions at which PyTorch's own FP32 is further from float64 than any error may be elsewhere.

    Args:
        own: its errors by output, (rows, positions) of the longest call.

    Returns:
        output, row, position and error of each, the largest first.
    """
    found = [
        {"output": name, "row": int(row), "position": int(at), "pytorch_fp32": float(errors[row, at])}
        for name, errors in own.items()
        for row, at in np.argwhere(errors > POSITIONS[100] / OWN_ERRORS)
    ]
    return sorted(found, key=lambda place: -place["pytorch_fp32"])


def with_ill_conditioned(coverage: Json, found: Sequence[Json]) -> Json:
    """What the checks touched, with the ill-conditioned positions, of which the worst are listed."""
    if not found:
        return coverage
    first = found[0]
    text = (
        f"{len(found)} positions are ill-conditioned: there PyTorch's own FP32 is up to "
        f"{first['pytorch_fp32']:.0e} from the reference ({first['output']}, row {first['row']}, position "
        f"{first['position']}), and the limits are multiples of that."
    )
    listed = {"count": len(found), "worst": list(found[:NAMED])}
    return {**coverage, "ill_conditioned": listed, "sentence": f"{coverage['sentence']} {text}"}


def _by_position(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Values as (rows, positions, rest); one row or one position where there is no such axis."""
    if not spec.batched:
        return values.reshape(1, 1, -1)
    axis = spec.time_axis
    if axis is None:
        return values.reshape(values.shape[0], 1, -1)
    moved = np.moveaxis(values, axis, 1)
    return moved.reshape(values.shape[0], values.shape[axis] // spec.steps, -1)


def _scale(values: np.ndarray, spec: TensorSpec) -> float:
    """Root mean square over positions of the norm of a position."""
    inside = _by_position(without_masks(values, values)[1], spec)
    norms = np.linalg.norm(np.where(np.isfinite(inside), inside, 0.0), axis=-1)
    return float(np.sqrt(np.mean(np.square(norms))))
