"""Pictures of drift: the same bytes each time, whatever the errors are."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from refusals import refused

from xlstm_export.errors import SetupError, UsageError
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
    pytest.importorskip("matplotlib")
    path = tmp_path / "verify" / "drift.svg"
    plot_drift({"int8": drift, "fp16": drift}, path)
    text = path.read_text(encoding="utf-8")
    for label in ("int8, teacher-forced", "int8, free-running", "fp16, teacher-forced", "position"):
        assert f"<!-- {label} -->" in text
    assert [file.name for file in path.parent.iterdir()] == ["drift.svg"]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_drift_gives_the_same_bytes(drift: Drift, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending}"
    plot_drift(drift, first)
    plot_drift(drift, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 5000


def test_what_cannot_be_drawn_is_refused(drift: Drift, tmp_path: Path) -> None:
    with refused(UsageError, "drift.pdf", "png, svg"):
        plot_drift(drift, tmp_path / "drift.pdf")
    with refused(UsageError, "0 drifts"):
        plot_drift({}, tmp_path / "drift.png")


def test_without_matplotlib_the_hint_says_what_to_install(
    drift: Drift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused(SetupError, "matplotlib", "pip install matplotlib"):
        plot_drift(drift, tmp_path / "drift.png")
