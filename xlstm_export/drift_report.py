"""Errors over the horizon as data: series of them, CSV and JSON, and the gate.

The gate looks at the level (how large is the error) and at growth (is it larger at the end than after 1000
positions), for outputs and for the states of each block. Every limit stands in `DRIFT_LIMITS` with a reason.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .checks import LIMITS, Check
from .config import IoSpec
from .errors import UsageError
from .runfolder import readable_os_errors

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

    @property
    def accumulation(self) -> tuple[float, ...]:
        """Per horizon, by what factor the candidate's own state makes the error larger."""
        return tuple(ratio(e, f) for e, f in zip(self.errors, self.state_forced, strict=True))


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


@dataclass(frozen=True)
class DriftLimits:
    """What `drift_checks` holds errors against.

    Attributes:
        output, state: relative L2 of outputs and states at any horizon from `JUDGED_FROM` on.
        kl: KL divergence at the same horizons, nats per position.
        growth: error at the last horizon over that at 1000; `WHILE_FILLING` times as much where it has to be
            counted from an earlier one.
        floor: errors count as this large at least where growth is judged.
    """

    output: float
    state: float
    kl: float
    growth: float = 1.5
    # FP32 rounding through all blocks; what stays below it may be ten times larger at the end than at 1000
    # without anything that another order of additions would not do as well.
    floor: float = LIMITS["state"]


# By the name of a precision. Levels are about three times the largest error from position 100 on over 16,000
# positions of two trained models, a language model and a forecaster: they find what is broken (weights of
# forget gates 1% off give states 0.06 off), not what a precision costs, which the task's metric tells. A
# forecaster's relative error is large where its values pass through zero, hence the output of "int4-wo".
# Growth: on the same models, over stretches from many places of their data, no precision had more than 1.41
# (`judged_growth`) from 1000 positions on, and none more than 1.59 from 100 to 1000. Forget gates 20% off had
# 1.95, a matrix memory stored in BF16 after every position 1.53.
DRIFT_LIMITS: dict[str, DriftLimits] = {
    "fp32": DriftLimits(output=LIMITS["output"], state=LIMITS["state"], kl=1e-8),  # seen 3e-7, 1e-6
    "fp16": DriftLimits(output=2.5e-3, state=3e-3, kl=1e-5),  # seen 8e-4, 9e-4, 1e-6
    "bf16": DriftLimits(output=2e-2, state=2e-2, kl=2e-4),  # seen 6e-3, 7e-3, 6e-5
    "int8-wo": DriftLimits(output=0.03, state=0.05, kl=1e-3),  # seen 0.010, 0.017, 2e-4
    "int8": DriftLimits(output=0.1, state=0.3, kl=0.03),  # seen 0.04, 0.10, 0.011
    "int4-wo": DriftLimits(output=0.5, state=0.6, kl=0.15),  # seen 0.16, 0.21, 0.043
}


def drift_limits(*precisions: str) -> DriftLimits:
    """The wider limit of each kind, for a candidate of several: INT8 weights with states stored in BF16."""
    limits = [DRIFT_LIMITS[precision] for precision in precisions]
    widest = {field.name: max(getattr(x, field.name) for x in limits) for field in fields(DriftLimits)}
    return DriftLimits(**widest)


def drift_checks(drift: Drift, limits: DriftLimits) -> list[Check]:
    """Level and growth of outputs and of each block's states, in both modes.

    A check of states stands for the block, with its worst tensor in the detail. Where an output fails, its
    detail names the first block that does. State-forced errors are told, not judged.

    Args:
        drift: what was measured.
        limits: of the candidate's precision, from `DRIFT_LIMITS`.
    """
    checks: list[Check] = []
    for mode in dict.fromkeys(s.mode for s in drift.series):
        series = [s for s in drift.series if s.mode == mode]
        states = []
        for block in sorted({s.block for s in series if s.block is not None}):
            group = [s for s in series if s.block == block]
            states += _pair(f"{mode}: block {block} states", group, limits.state, limits)
        first = first_failing_block(states)
        outputs = []
        for one in (s for s in series if s.block is None):
            outputs += _pair(one.name, [one], limits.output, limits)
            if one.kl:
                outputs.append(_level(f"{one.name}: KL", one, one.kl, limits.kl))
        checks += [c if c.passed else replace(c, detail={**c.detail, "first_block": first}) for c in outputs]
        checks += states
    return checks


def first_failing_block(checks: Sequence[Check]) -> int | None:
    """The lowest block whose states fail; None where none do."""
    return min((c.detail["block"] for c in checks if not c.passed and "block" in c.detail), default=None)


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


def _pair(name: str, group: Sequence[Series], level: float, limits: DriftLimits) -> list[Check]:
    """Level and growth of the worst of some tensors."""
    worst = max(group, key=lambda s: _largest(s, s.errors)[0])
    grown = max(group, key=lambda s: judged_growth(s, limits.floor))
    detail = {"tensor": grown.tensor, "from": grown.horizons[grown.base], "to": grown.horizons[-1]}
    if grown.block is not None:
        detail["block"] = grown.block
    detail["errors"] = [grown.errors[grown.base], grown.errors[-1]]
    growth = judged_growth(grown, limits.floor)
    full = grown.horizons[grown.base] >= GROWTH_FROM
    return [
        _level(f"{name}: level", worst, worst.errors, level),
        Check(f"{name}: growth", growth, limits.growth * (1.0 if full else WHILE_FILLING), detail),
    ]


def _level(name: str, series: Series, values: Sequence[float], limit: float) -> Check:
    value, horizon = _largest(series, values)
    detail: dict[str, Any] = {"tensor": series.tensor, "horizon": horizon}
    if series.block is not None:
        detail["block"] = series.block
    return Check(name, value, limit, detail)


def _largest(series: Series, values: Sequence[float]) -> tuple[float, int]:
    """The largest value of those that count, and its horizon; infinite where any value is no number."""
    last = series.horizons[-1]
    counted = []
    for value, horizon in zip(values, series.horizons, strict=True):
        if not math.isfinite(value):
            return math.inf, horizon
        if horizon >= min(JUDGED_FROM, last):
            counted.append((value, horizon))
    return max(counted, key=lambda pair: pair[0])
