"""Result of a drift measurement: errors over horizons, as CSV and JSON, and their growth.

Verification checks the level (how large is the error) and the growth (is it larger at the end than after 1000
positions), for outputs and for the states of each block. The limits are in `verify/limits.py`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import staged_file
from ..errors import UsageError
from ..specs import IoSpec, Json

TEACHER, FREE = "teacher-forced", "free-running"
GROWTH_FROM = 1000  # growth is counted from here: by then a state is filled
# Factor on the allowed growth if the last horizon is not beyond that position and growth is counted from an
# earlier one: the error of a state grows while the state fills. An error that adds up at every position grows
# tenfold from 100 to 1000.
WHILE_FILLING = 2.0
# Levels are judged from here. At the first positions the errors of single tokens are large: 0.4 at position 1
# for the state of an INT8 model that has 0.06 from 100 on.
JUDGED_FROM = 100
COLUMNS = ("mode", "block", "tensor", "horizon", "error", "state_forced", "kl", "top1")


@dataclass(frozen=True)
class Feedback:
    """How a model's output becomes its next input: a token drawn from logits.

    Attributes:
        input: name of the tokens (B, S).
        output: name of the logits (B, S, V), V the number of tokens.
        temperature: temperature of the draw; 0 takes the largest logit, which soon gives a repeating text.
        seed: seed of the draw.
        prompt: number of positions, at least one, that are read from the data first.
    """

    input: str
    output: str
    temperature: float = 1.0
    seed: int = 0
    prompt: int = 16


def token_feedback(io: IoSpec, vocab_size: int | None) -> Feedback | None:
    """The feedback of a language model; None if the outputs are not logits of the only input's tokens.

    Args:
        io: inputs and outputs of an export.
        vocab_size: number of tokens of the embedding.
    """
    if len(io.inputs) != 1 or not io.outputs:
        return None
    tokens, logits = io.inputs[0], io.outputs[0]
    is_tokens = np.issubdtype(tokens.dtype, np.integer) and tokens.shape == ("B", "S")
    is_logits = len(logits.shape) == 3 and logits.shape[1] in ("S", 1) and logits.shape[2] == vocab_size
    return Feedback(tokens.name, logits.name) if is_tokens and is_logits else None


@dataclass(frozen=True)
class Series:
    """Errors of one tensor over the horizons.

    Attributes:
        mode: `TEACHER` or `FREE`.
        block: block of a state; None for an output.
        tensor: name of an output, kind of a state.
        horizons: positions, ascending.
        errors: per horizon, each model with its own state.
        state_forced: per horizon, the error of a window started from the reference's state.
        kl: KL(reference ‖ candidate) in nats per position of the window, for logits; empty otherwise.
        top1: share of the window's positions where both rank the same token first; empty as `kl`.
    """

    mode: str
    block: int | None
    tensor: str
    horizons: tuple[int, ...]
    errors: tuple[float, ...]
    state_forced: tuple[float, ...]
    kl: tuple[float, ...] = ()
    top1: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        where = self.tensor if self.block is None else f"block {self.block} {self.tensor}"
        return f"{self.mode}: {where}"

    @property
    def base(self) -> int:
        """Index of the horizon that growth is counted from: the last up to 1000, but not the last of all."""
        return max((i for i, h in enumerate(self.horizons[:-1]) if h <= GROWTH_FROM), default=0)

    @property
    def growth(self) -> float:
        """Error at the last horizon over that at 1000."""
        return ratio(self.errors[-1], self.errors[self.base])


@dataclass(frozen=True)
class FreeRun:
    """Description of the free-running mode.

    Attributes:
        feedback: how tokens were chosen.
        first_other: per row, the number of positions before candidate and reference rank different tokens
            first; None if they never do.
    """

    feedback: Feedback
    first_other: tuple[int | None, ...]


@dataclass(frozen=True)
class Drift:
    """Outcome of `measure_drift`.

    Attributes:
        series: one per mode and tensor.
        batch: rows, which are independent streams.
        window: longest window, in positions.
        positions: length of the data.
        repeated: the data were shorter than the last horizon and were repeated.
        free_running: description of the free-running mode, or why it was not run.
        stepwise: the candidate read one position per call in the teacher-forced mode too.
    """

    series: tuple[Series, ...]
    batch: int
    window: int
    positions: int
    repeated: bool
    free_running: FreeRun | str
    stepwise: bool = False

    @property
    def growth(self) -> dict[str, float]:
        """`Series.growth` by name of the series."""
        return {s.name: s.growth for s in self.series}

    def at(self, horizon: int) -> dict[str, float]:
        """Errors at a horizon by name of the series.

        Raises:
            UsageError: errors were not measured at that horizon.
        """
        known = sorted({h for s in self.series for h in s.horizons})
        if horizon not in known:
            raise UsageError(f"no horizon {horizon}", f"measured at {', '.join(map(str, known))}")
        return {s.name: s.errors[s.horizons.index(horizon)] for s in self.series if horizon in s.horizons}

    def rows(self) -> Iterator[Json]:
        """One dictionary with `COLUMNS` per mode, tensor and horizon; None where a column does not apply."""
        for s in self.series:
            for i, horizon in enumerate(s.horizons):
                kl, top1 = (s.kl[i], s.top1[i]) if s.kl else (None, None)
                values = (s.mode, s.block, s.tensor, horizon, s.errors[i], s.state_forced[i], kl, top1)
                yield dict(zip(COLUMNS, values, strict=True))

    def write_csv(self, path: Path) -> None:
        """Write `rows` to a file, atomically."""
        with staged_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())

    def to_json(self) -> Json:
        """Plain data; an infinite error is null."""
        free: dict[str, Any] = {"reason": self.free_running}
        if isinstance(self.free_running, FreeRun):
            free = {**vars(self.free_running.feedback), "first_other": list(self.free_running.first_other)}
        return {
            "schema": 1,
            "batch": self.batch,
            "window": self.window,
            "positions": self.positions,
            "repeated": self.repeated,
            "stepwise": self.stepwise,
            "free_running": free,
            "growth": {name: _finite(value) for name, value in self.growth.items()},
            "rows": [{key: _finite(value) for key, value in row.items()} for row in self.rows()],
        }


def ratio(error: float, base: float) -> float:
    """`error` / `base`; 1 if both are zero, infinite if only `base` is zero or `error` is not finite."""
    if not math.isfinite(error):
        return math.inf
    if base == 0.0:
        return 1.0 if error == 0.0 else math.inf
    return error / base


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- judgement -------------------------------------------------------------------------------------


def judged_growth(series: Series, floor: float) -> float:
    """Growth of an error that is due to accumulation.

    This is the smaller of two: the growth of the error, and the growth of its ratio to the state-forced
    error. A window of harder data has larger errors in both runs without any accumulation. Errors below
    `floor` count as `floor`: FP32 rounding may give 1e-7 at 1000 and 5e-7 at 16,000, which is not drift.
    """
    own = [max(error, floor) for error in series.errors]
    raw = ratio(own[-1], own[series.base])
    if not all(math.isfinite(series.state_forced[i]) for i in (series.base, -1)):
        return raw  # no correction if the candidate fails from the reference's state
    forced = [max(error, floor) for error in series.state_forced]
    return min(raw, ratio(raw, ratio(forced[-1], forced[series.base])))
