"""Errors over the horizon as data: series of them, CSV and JSON, and the gate.

The gate looks at the level (how large is the error) and at growth (is it larger at the end than after 1000
positions), for outputs and for the states of each block. Every limit stands in `DRIFT_LIMITS` with a reason.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import readable_os_errors
from ..errors import UsageError
from ..specs import IoSpec

TEACHER, FREE = "teacher-forced", "free-running"
GROWTH_FROM = 1000  # growth is counted from here: by then a state is as full as it gets
# How much more growth is allowed where the horizon ends there, and it is counted from an earlier one: a state
# that fills gains error. An error that adds up at every position grows tenfold from 100 to 1000.
WHILE_FILLING = 2.0
# Levels are judged from here: errors of the first positions are those of single tokens, 0.4 at position 1 for
# the state of an INT8 model that is at 0.06 from 100 on.
JUDGED_FROM = 100
COLUMNS = ("mode", "block", "tensor", "horizon", "error", "state_forced", "kl", "top1")


@dataclass(frozen=True)
class Feedback:
    """How a model's output becomes its next input: a token drawn from logits.

    Attributes:
        input: name of the tokens (B, S).
        output: name of the logits (B, S, V), V the number of tokens.
        temperature: of the draw; 0 takes the largest logit, which soon repeats itself.
        seed: of the draw.
        prompt: so many positions, one at least, come from the data first.
    """

    input: str
    output: str
    temperature: float = 1.0
    seed: int = 0
    prompt: int = 16


def token_feedback(io: IoSpec, vocab_size: int | None) -> Feedback | None:
    """The natural feedback of a language model; None where outputs are not tokens of the only input.

    Args:
        io: of an export.
        vocab_size: how many tokens the embedding has.
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
        block: of a state; None for an output.
        tensor: name of an output, kind of a state.
        horizons: positions, ascending.
        errors: per horizon, each model with its own state.
        state_forced: per horizon, the window begun with the reference's state.
        kl: KL(reference ‖ candidate) in nats per position of the window, for logits; empty otherwise.
        top1: share of the window's positions where both rank the same token first; as `kl`.
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
        """Index of the horizon growth is counted from: the last one up to 1000, at most the last but one."""
        return max((i for i, h in enumerate(self.horizons[:-1]) if h <= GROWTH_FROM), default=0)

    @property
    def growth(self) -> float:
        """Error at the last horizon over that at 1000."""
        return ratio(self.errors[-1], self.errors[self.base])


@dataclass(frozen=True)
class FreeRun:
    """What the free-running mode was.

    Attributes:
        feedback: how tokens were chosen.
        first_other: per row, after how many positions the two for the first time ranked another token first;
            None: never.
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
        repeated: the data were shorter than the last horizon and began anew after their end.
        free_running: what it was, or why there was none.
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
            UsageError: no such horizon.
        """
        known = sorted({h for s in self.series for h in s.horizons})
        if horizon not in known:
            raise UsageError(f"no horizon {horizon}", f"measured at {', '.join(map(str, known))}")
        return {s.name: s.errors[s.horizons.index(horizon)] for s in self.series if horizon in s.horizons}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dictionary with `COLUMNS` per mode, tensor and horizon; None where a column does not apply."""
        for s in self.series:
            for i, horizon in enumerate(s.horizons):
                kl, top1 = (s.kl[i], s.top1[i]) if s.kl else (None, None)
                values = (s.mode, s.block, s.tensor, horizon, s.errors[i], s.state_forced[i], kl, top1)
                yield dict(zip(COLUMNS, values, strict=True))

    def write_csv(self, path: Path) -> None:
        """Write `rows` to a file, atomically."""
        with readable_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                with temporary.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(self.rows())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
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
    """`error` / `base`: 1 where both are zero, infinite where `error` is, however large `base`."""
    if not math.isfinite(error):
        return math.inf
    if base == 0.0:
        return 1.0 if error == 0.0 else math.inf
    return error / base


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the gate ---------------------------------------------------------------------------------------


def judged_growth(series: Series, floor: float) -> float:
    """Growth of an error that is the candidate's own doing.

    The smaller of two: the growth of the error, and the growth of its multiple of the state-forced error. A
    window of harder data is worse in both runs and has not accumulated anything. Errors below `floor` count
    as `floor`: what rounds like FP32 may be 1e-7 at 1000 and 5e-7 at 16,000 and is no drift.
    """
    own = [max(error, floor) for error in series.errors]
    raw = ratio(own[-1], own[series.base])
    if not all(math.isfinite(series.state_forced[i]) for i in (series.base, -1)):
        return raw  # a candidate that cannot continue from the reference's state excuses nothing
    forced = [max(error, floor) for error in series.state_forced]
    return min(raw, ratio(raw, ratio(forced[-1], forced[series.base])))
