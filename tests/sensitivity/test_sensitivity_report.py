from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from xlstm_export.quantize.recipe import Recipe, Rule, read_recipe
from xlstm_export.sensitivity.measure import Measured
from xlstm_export.sensitivity.plot import draw
from xlstm_export.sensitivity.report import note, write_evidence
from xlstm_export.sensitivity.result import COLUMNS, Sensitivity
from xlstm_export.sensitivity.search import Candidate, Limits, Unit


def candidate(name: str, drop: float, saved: int) -> Candidate:
    measured = Measured(2.0 * (1.0 + drop), 0.01, 0.02, "block 1 C", 1.1, 1000 - saved)
    return Candidate(name, Recipe("int8", rules=(Rule(f"^{name}$", "int8"),)), measured, drop, saved)


@pytest.fixture
def result() -> Sensitivity:
    """Two units; the second, a gate, is left alone and cannot even be built in the naive candidate."""
    units = tuple(Unit(n, (n,), r, 0, frozenset({"int8"})) for n, r in (("up", "projection"), ("g", "gate")))
    failed = Candidate("everything", Recipe("int8"), Measured.failed("no kernel\nmore"), math.inf, 0)
    found = candidate("the first 1 of 2", 0.001, 400)
    return Sensitivity(
        recipe=found.recipe,
        metric="bits per byte",
        reference=2.0,
        limits=Limits(0.005, 1.5),
        units=units,
        choices={"up": "int8", "g": "float"},
        alone={"up": candidate("only up", 0.001, 400), "g": candidate("only g", 0.5, 100)},
        base=candidate("nothing", 0.0, 0),
        general=failed,
        default=candidate("default", 0.001, 400),
        rejected=(candidate("default, smooth", 0.002, 400),),
        found=found,
        tried=(found,),
        about={"precision": "int8", "horizon": 4096, "rows": 1, "positions": 8192},
    )


def test_files(result: Sensitivity, tmp_path: Path) -> None:
    write_evidence(result, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evidence.csv",
        "evidence.json",
        "evidence.svg",
        "recipe.yaml",
    ]
    assert read_recipe(tmp_path / "recipe.yaml") == result.recipe


def test_json_has_no_infinity(result: Sensitivity, tmp_path: Path) -> None:
    write_evidence(result, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "evidence.json").read_text(), parse_constant=refuse)
    everything = data["candidates"][1]
    assert (everything["drop"], everything["failure"], everything["within"]) == (
        None,
        "no kernel\nmore",
        False,
    )
    assert [u["choice"] for u in data["units"]] == ["int8", "float"]
    assert {u["alone"] for u in data["units"]} <= {c["name"] for c in data["candidates"]}


def test_table(result: Sensitivity, tmp_path: Path) -> None:
    write_evidence(result, tmp_path)
    with (tmp_path / "evidence.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == [c.name for c in result.candidates]
    assert float(rows[-1]["drop"]) == 0.001
    assert rows[-1]["rules"] == "^the first 1 of 2$ → int8"


def test_note_says_what_was_measured(result: Sensitivity) -> None:
    text = note(result)
    for part in ("bits per byte", "8192", "4096", "+0.100%", "0.500%", "cannot be built: no kernel"):
        assert part in text
    assert "more" not in text.split("\n")[3]  # one line per candidate


def test_excluded_the_most_harmful_first(result: Sensitivity) -> None:
    assert result.excluded == ("g",)


def test_the_picture_names_every_unit_and_is_repeatable(result: Sensitivity) -> None:
    text = draw(result)
    assert text == draw(result)
    for words in ("up", "g", "INT8", "left as it is", "bits per byte: % worse than FP32", "limit 0.500%"):
        assert f">{words}<" in text
    assert text.count("<rect") == 1 + 2 * len(result.units)  # the background; two plots
    assert not re.search(r"20\d\d-\d\d-\d\d", text)


def test_a_unit_that_cannot_be_built_fills_the_axis(result: Sensitivity) -> None:
    """Its value says why; what improves goes to the left of zero."""
    failed = Candidate("only g", Recipe("int8"), Measured.failed("no kernel"), math.inf, 0)
    broken = replace(result, alone={"up": candidate("only up", -0.002, 400), "g": failed})
    text = draw(broken)
    assert ">∞ %<" in text
    assert ">-0.200 %<" in text
    assert "nan" not in text
    assert "inf" not in text
