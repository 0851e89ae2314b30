"""A share of the rate of bisection, and what counts as the right place."""

from __future__ import annotations

import json
from pathlib import Path

import bisect_rate
import onnx
import pytest
from planted import planted, right_places


@pytest.mark.slow
def test_planted_faults_are_named(tmp_path: Path) -> None:
    kinds = ["row", "not_carried", "state_unread", "per_batch"]
    trials = list(bisect_rate.of_model("lm", tmp_path, kinds, range(5, 6)))
    assert [trial.kind for trial in trials] == kinds
    assert [trial for trial in trials if trial.caught and not trial.right] == []
    assert sum(trial.caught for trial in trials) >= 3
    bisect_rate.write(tmp_path / "rate.json", trials)
    assert json.loads((tmp_path / "rate.json").read_text())["wrong"] == []


def test_right_places_are_those_of_the_fault(small_export: Path) -> None:
    """What reads a wrong weight, what was added behind a state; not what lies behind them."""
    right = onnx.load(small_export / "model.onnx")
    wrong = planted(right, "not_carried", 0)
    assert wrong is not None
    nodes, values = right_places(right, wrong)
    assert nodes == {"fault"}
    assert len(values) == 1
    assert values.pop().startswith("present_")
    wrong = planted(right, "element", 0)
    assert wrong is not None
    nodes, _ = right_places(right, wrong)
    assert 1 <= len(nodes) <= 2
    assert right_places(right, right) == (set(), set())
