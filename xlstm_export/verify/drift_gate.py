"""Checks of the drift along a stream: level and growth of errors, with limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import Check
from ..inputs import batch_of
from ..measure.drift import measure_drift
from ..measure.drift_result import GROWTH_FROM, JUDGED_FROM, WHILE_FILLING, Drift, Series, judged_growth
from ..quantize.recipe import Recipe
from ..runfolder import read_io
from ..sessions import OrtSession
from .limits import DriftLimits, drift_limits

GROWTH = ": growth"  # how the names of these checks end


def state_judge(stream: Mapping[str, np.ndarray]) -> Callable[[Path, Path, Recipe], list[Check]]:
    """The check that `quantize` makes of a state that is stored in half: no drift along `stream`.

    Args:
        stream: inputs by name (B, S, ...).
    """

    def judge(folder: Path, candidate: Path, recipe: Recipe) -> list[Check]:
        batch = batch_of(stream, read_io(folder).inputs)
        with (
            OrtSession(folder, batch, rounding=True) as reference,
            OrtSession(candidate, batch, rounding=True) as narrow,
        ):
            drift = measure_drift(reference, narrow, stream)
        return drift_checks(drift, drift_limits(recipe.precision, recipe.state_dtype))

    return judge


def drift_checks(drift: Drift, limits: DriftLimits) -> list[Check]:
    """Level and growth of outputs and of each block's states, in both modes.

    There is one check of states per block; its detail names the worst tensor. The detail of an output that
    fails names the first block whose states fail. State-forced errors are reported, without a limit.

    Args:
        drift: what was measured.
        limits: limits of the candidate's precision, from `DRIFT_LIMITS`.
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


def grows(checks: Sequence[Check]) -> bool:
    """Whether an error grows by more than its limit."""
    return any(check.name.endswith(GROWTH) and not check.passed for check in checks)


def that_grow(checks: Sequence[Check], others: Sequence[Check]) -> list[Check]:
    """The checks of streams, where growth that fails is the geometric mean of it and that of other streams.

    What accumulates does so on every stream. Where few positions decide an error, its ratio of one horizon to
    another depends on where in the stream they are.
    """
    other = {check.name: check.value for check in others}

    def judged(check: Check) -> Check:
        if check.passed or not check.name.endswith(GROWTH):
            return check
        both = [check.value, other[check.name]]
        return replace(check, value=math.sqrt(math.prod(both)), detail={**check.detail, "growths": both})

    return [judged(check) for check in checks]


def first_failing_block(checks: Sequence[Check]) -> int | None:
    """Index of the first block whose states fail; None if there is none."""
    return min((c.detail["block"] for c in checks if not c.passed and "block" in c.detail), default=None)


def _pair(name: str, group: Sequence[Series], level: float, limits: DriftLimits) -> list[Check]:
    """Checks of level and growth, for the worst tensor of a group."""
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
        Check(f"{name}{GROWTH}", growth, limits.growth * (1.0 if full else WHILE_FILLING), detail),
    ]


def _level(name: str, series: Series, values: Sequence[float], limit: float) -> Check:
    value, horizon = _largest(series, values)
    detail: dict[str, Any] = {"tensor": series.tensor, "horizon": horizon}
    if series.block is not None:
        detail["block"] = series.block
    return Check(name, value, limit, detail)


def _largest(series: Series, values: Sequence[float]) -> tuple[float, int]:
    """The largest judged value and its horizon; infinite if any value is not finite."""
    last = series.horizons[-1]
    counted = []
    for value, horizon in zip(values, series.horizons, strict=True):
        if not math.isfinite(value):
            return math.inf, horizon
        if horizon >= min(JUDGED_FROM, last):
            counted.append((value, horizon))
    return max(counted, key=lambda pair: pair[0])
