"""What the study of the gate counts, and that its good models are many and differ."""

from __future__ import annotations

import math
from typing import Any

import gate_study
import good_models

from benchmarks import readme


def verified(precision: str, *failed: list[Any]) -> dict[str, Any]:
    return {"model": "a", "precision": precision, "passed": not failed, "failed": list(failed)}


def planted(kind: str, precision: str = "fp32", *, caught: bool | None) -> dict[str, Any]:
    about = {"model": "a", "precision": precision, "kind": kind, "where": "w", "identity": True}
    return {**about, "moved": 1e-5, "own": 3e-6, "caught": caught}


def test_rates() -> None:
    rows = [
        verified("fp32"),
        verified("fp32", ["step: y", 1e-3, 5e-6]),
        verified("fp16", ["step: y", math.inf, 5e-3]),
        planted("sign", caught=True),
        planted("eps", caught=False),
        planted("eps", caught=None),
        planted("integer", "int8", caught=True),
    ]
    found = gate_study.counted(rows)
    assert found["by_precision"]["fp32"] == {"verified": 2, "false_alarms": 1, "overflowed": 0}
    assert found["by_precision"]["fp16"] == {"verified": 1, "false_alarms": 0, "overflowed": 1}
    counts = found["fp32"]
    assert (counts["planted"], counts["caught"], counts["by_kind"]["eps"]) == (2, 1, [1, 0])
    assert found["identity"] == [4, 4]
    text = readme.gate(found)
    assert "1 false alarm" in text
    assert "finds 1 of 2 (50.0%). The missed ones (1 of eps) move it by at most 3.3 times that" in text
    assert "itself: behaviour alone finds 1 of 1" in text
    assert "int8 1 of 1" in text


def test_good_models_are_many() -> None:
    names = [model.name for model in good_models.zoo()]
    assert len(names) == len(set(names)) > 100
    assert all(any(twist in name for name in names) for twist in good_models.TWISTS)
    assert all(any(name.startswith(family) for name in names[:40]) for family in good_models.FAMILIES)
