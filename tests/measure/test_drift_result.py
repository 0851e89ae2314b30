"""The gate on drift: what grows fails, what is only harder data does not, and files say what was measured."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refused

from xlstm_export.checks import Check
from xlstm_export.errors import UsageError
from xlstm_export.measure.drift_result import (
    COLUMNS,
    FREE,
    TEACHER,
    Drift,
    Feedback,
    FreeRun,
    Series,
    judged_growth,
)
from xlstm_export.quantize.recipe import PRECISIONS
from xlstm_export.verify.drift_gate import drift_checks, first_failing_block, grows, that_grow
from xlstm_export.verify.limits import DRIFT_LIMITS, DriftLimits, drift_limits

LIMITS = DriftLimits(output=0.02, state=0.02, kl=1e-3)


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def drift_of(*series: Series) -> Drift:
    return Drift(series, 1, 256, 16000, False, "no feedback")


def test_harder_data_is_not_drift() -> None:
    # A relative error of constant size that the last window makes three times as large in both runs.
    series = Series(TEACHER, None, "y", (1000, 16000), (0.01, 0.03), (0.01, 0.03))
    assert series.growth == pytest.approx(3.0)
    assert judged_growth(series, 1e-5) == pytest.approx(1.0)
    accumulated = replace(series, state_forced=(0.01, 0.011))
    assert judged_growth(accumulated, 1e-5) == pytest.approx(3 / 1.1)
    # A candidate that cannot even start from the reference's state is not excused by that.
    assert judged_growth(replace(series, state_forced=(0.01, math.inf)), 1e-5) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("horizons", "base"),
    [
        ((1, 10, 100, 1000, 4000, 16000), 3),
        ((1, 10, 500, 16000), 2),
        ((1, 10, 100), 1),
        ((2000, 4000), 0),
        ((10,), 0),
    ],
)
def test_growth_is_counted_from_1000_or_what_is_nearest(horizons: tuple[int, ...], base: int) -> None:
    series = Series(TEACHER, None, "y", horizons, tuple(float(h) for h in horizons), (1.0,) * len(horizons))
    assert series.base == base
    assert series.growth == horizons[-1] / horizons[base]


def test_rounding_like_fp32_cannot_fail_by_growth() -> None:
    tiny = Series(TEACHER, 0, "C", (1000, 16000), (1e-9, 9e-6), (1e-9, 1e-9))
    drift = drift_of(tiny)
    assert tiny.growth > 1000
    assert failed(drift_checks(drift, LIMITS)) == []
    larger = drift_of(replace(tiny, errors=(1e-9, 2e-5)))
    assert failed(drift_checks(larger, LIMITS)) == ["teacher-forced: block 0 states: growth"]


def test_a_state_that_fills_may_gain_error() -> None:
    """A short horizon ends where growth is otherwise counted from."""
    short = Series(TEACHER, 0, "C", (1, 100, 1000), (0.0, 0.005, 0.008), (0.0, 0.005, 0.005))
    assert failed(drift_checks(drift_of(short), LIMITS)) == []
    adds_up = replace(short, errors=(0.0, 0.001, 0.01))
    assert failed(drift_checks(drift_of(adds_up), LIMITS)) == ["teacher-forced: block 0 states: growth"]


def test_zero_and_infinite_errors_have_a_growth() -> None:
    def grown(*errors: float) -> float:
        return Series(TEACHER, None, "y", (1000, 2000), errors, errors).growth

    assert grown(0.0, 0.0) == 1.0
    assert grown(0.0, 1e-3) == math.inf
    assert grown(math.inf, math.inf) == math.inf
    assert grown(math.nan, math.nan) == math.inf


def test_the_first_bad_block_is_named() -> None:
    def states(block: int, level: float, last: float) -> Series:
        return Series(TEACHER, block, "C", (1000, 16000), (level, last), (level, level))

    output = Series(TEACHER, None, "y", (1000, 16000), (0.01, 0.04), (0.01, 0.01))
    drift = Drift(
        (output, states(0, 0.01, 0.01), states(2, 0.03, 0.03), states(1, 0.01, 0.019)), 1, 256, 1, True, ""
    )
    checks = drift_checks(drift, LIMITS)
    assert first_failing_block(checks) == 1
    by_name = {check.name: check for check in checks}
    assert failed(checks) == [
        "teacher-forced: y: level",
        "teacher-forced: y: growth",
        "teacher-forced: block 1 states: growth",
        "teacher-forced: block 2 states: level",
    ]
    assert by_name["teacher-forced: y: level"].detail["first_block"] == 1
    assert by_name["teacher-forced: block 2 states: level"].detail == {
        "tensor": "C",
        "horizon": 1000,
        "block": 2,
    }
    assert first_failing_block(drift_checks(drift, DriftLimits(1, 1, 1, growth=10))) is None


def test_there_are_limits_for_every_precision() -> None:
    assert set(DRIFT_LIMITS) == set(PRECISIONS)
    int8, bf16 = DRIFT_LIMITS["int8-wo"], DRIFT_LIMITS["bf16"]
    assert drift_limits("bf16", "int8-wo") == int8
    assert drift_limits("bf16") == bf16


def test_first_positions_count_where_they_are_no_numbers() -> None:
    output = Series(TEACHER, None, "y", (1, 10, 100, 1000), (0.5, 0.4, 0.01, 0.01), (0.01,) * 4)
    assert failed(drift_checks(drift_of(output), LIMITS)) == []
    broken = replace(output, errors=(math.inf, 0.4, 0.01, 0.01))
    (level,) = [c for c in drift_checks(drift_of(broken), LIMITS) if not c.passed]
    assert level.detail["horizon"] == 1
    short = Series(TEACHER, None, "y", (1, 10), (0.5, 0.03), (0.01, 0.01))
    assert "teacher-forced: y: level" in failed(drift_checks(drift_of(short), LIMITS))


def test_free_running_is_judged_too() -> None:
    teacher = Series(TEACHER, None, "y", (1000, 16000), (0.01, 0.01), (0.01, 0.01))
    free = replace(teacher, mode=FREE, errors=(0.01, 0.018))
    assert failed(drift_checks(drift_of(teacher, free), LIMITS)) == ["free-running: y: growth"]


@pytest.mark.parametrize(("elsewhere", "grown"), [(0.01, 1.34), (0.016, 1.70), (math.inf, math.inf)])
def test_what_accumulates_grows_on_every_stream(elsewhere: float, grown: float) -> None:
    series = Series(TEACHER, None, "y", (1000, 16000), (0.01, 0.018), (0.01, 0.01))
    here = drift_checks(drift_of(series), LIMITS)
    others = drift_checks(drift_of(replace(series, errors=(0.01, elsewhere))), LIMITS)
    assert grows(here)
    level, growth = that_grow(here, others)
    assert level == here[0]
    assert growth.value == pytest.approx(grown, rel=0.01)
    assert growth.passed == (grown < 1.5)
    assert grows([growth]) != growth.passed


@pytest.fixture
def measured() -> Drift:
    logits = Series(
        TEACHER, None, "logits", (10, 1000), (0.5, math.inf), (0.5, 0.25), (0.1, 0.2), (1.0, 0.75)
    )
    state = Series(FREE, 3, "C", (10,), (0.125,), (0.0625,))
    free = FreeRun(Feedback("tokens", "logits", seed=7), (None, 12))
    return Drift((logits, state), 2, 256, 500, True, free)


def test_rows_and_csv(measured: Drift, tmp_path: Path) -> None:
    path = tmp_path / "verify" / "drift.csv"
    measured.write_csv(path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        list(COLUMNS),
        [TEACHER, "", "logits", "10", "0.5", "0.5", "0.1", "1.0"],
        [TEACHER, "", "logits", "1000", "inf", "0.25", "0.2", "0.75"],
        [FREE, "3", "C", "10", "0.125", "0.0625", "", ""],
    ]
    assert [file.name for file in path.parent.iterdir()] == ["drift.csv"]


def test_json_has_no_infinity(measured: Drift) -> None:
    data = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert (data["batch"], data["positions"], data["repeated"]) == (2, 500, True)
    assert data["rows"][1]["error"] is None
    assert data["rows"][1]["horizon"] == 1000
    assert data["growth"] == {"teacher-forced: logits": None, "free-running: block 3 C": 1.0}
    assert data["free_running"]["seed"] == 7
    assert data["free_running"]["first_other"] == [None, 12]
    assert drift_of().to_json()["free_running"] == {"reason": "no feedback"}


def test_a_horizon_is_looked_up(measured: Drift) -> None:
    assert measured.at(10) == {"teacher-forced: logits": 0.5, "free-running: block 3 C": 0.125}
    assert measured.at(1000) == {"teacher-forced: logits": math.inf}
    with refused(UsageError, "no horizon 7", "10, 1000"):
        measured.at(7)
