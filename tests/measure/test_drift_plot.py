"""Pictures of drift: the same bytes each time, whatever the errors are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from refusals import refused

from xlstm_export.errors import UsageError
from xlstm_export.measure.drift_plot import plot_drift
from xlstm_export.measure.drift_result import FREE, TEACHER, Drift, Series


@pytest.fixture
def drift() -> Drift:
    series = (
        Series(TEACHER, None, "logits", (1, 10, 100), (1e-3, 2e-3, 4e-3), (1e-3, 1e-3, 1e-3)),
        Series(TEACHER, 0, "C", (1, 10, 100), (0.0, 1e-3, math.inf), (0.0, 1e-3, 1e-3)),
        Series(FREE, None, "logits", (1, 10), (1e-3, 3e-3), (1e-3, 1e-3)),
    )
    return Drift(series, 1, 256, 100, False, "")


def test_an_svg_shows_every_candidate_and_mode(drift: Drift, tmp_path: Path) -> None:
    path = tmp_path / "verify" / "drift.svg"
    plot_drift({"int8": drift, "fp16": drift}, path)
    root = ElementTree.parse(path).getroot()
    texts = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    for label in ("int8, teacher-forced", "int8, free-running", "fp16, teacher-forced", "position"):
        assert label in texts
    plot_drift(drift, path)
    assert ">teacher-forced</text>" in path.read_text(encoding="utf-8")  # one alone is named too
    assert {"Outputs", "States, worst of all blocks", "relative L2 error", "100"} <= texts
    assert [file.name for file in path.parent.iterdir()] == ["drift.svg"]


def test_limits_are_drawn(drift: Drift, tmp_path: Path) -> None:
    plot_drift(drift, tmp_path / "drift.svg", (0.02, 0.03))
    text = (tmp_path / "drift.svg").read_text(encoding="utf-8")
    assert [text.count(f">limit {limit}<") for limit in ("0.0200", "0.0300")] == [1, 1]


def test_the_same_drift_gives_the_same_bytes(drift: Drift, tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    plot_drift(drift, first)
    plot_drift(drift, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 5000


def test_states_are_the_worst_of_all_blocks_with_gaps(drift: Drift, tmp_path: Path) -> None:
    """Zero, infinity and no number have no place on a logarithmic axis."""
    larger = Series(TEACHER, 1, "n", (1, 10, 100), (math.nan, 5e-3, 2e-3), (0.0, 1e-3, 1e-3))
    plot_drift(replace(drift, series=(*drift.series, larger)), tmp_path / "drift.svg")
    text = (tmp_path / "drift.svg").read_text(encoding="utf-8")
    assert "teacher-forced: 5.00e-03 at 10<" in text
    states = text[text.rindex("States, worst") :]
    assert states.count("<circle") == 1
    assert "nan" not in text
    assert "inf" not in text


def test_what_cannot_be_drawn_is_refused(drift: Drift, tmp_path: Path) -> None:
    for ending in ("pdf", "png"):
        with refused(UsageError, f"drift.{ending}", "drift.svg"):
            plot_drift(drift, tmp_path / f"drift.{ending}")
    with refused(UsageError, "no drift"):
        plot_drift({}, tmp_path / "drift.svg")
