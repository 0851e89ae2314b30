"""The documents hold the figures of benchmarks/results, and every figure has a place in one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from places import ROOT

from benchmarks import readme


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_tables_are_those_of_the_results(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert readme.updated(text, readme.RESULTS) == text, "run benchmarks/readme.py"


def test_every_table_has_a_place() -> None:
    texts = "".join((ROOT / document).read_text(encoding="utf-8") for document in readme.DOCUMENTS)
    for marker in (*readme.TABLES, "gpu"):
        assert texts.count(f"<!-- {marker} -->") == texts.count(f"<!-- /{marker} -->") == 1


def test_other_figures_change_the_table(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(readme.RESULTS, results)
    figures = json.loads((results / "cpu.json").read_text())
    figures["decode"]["exported"]["p50_ms"] = 123.4
    (results / "cpu.json").write_text(json.dumps(figures))
    made = readme.updated("before\n<!-- summary -->\nold\n<!-- /summary -->\nafter\n", results)
    assert made.startswith("before\n<!-- summary -->\nSpeed of a model")
    assert "a decode step takes 123.4 ms" in made
    assert made.endswith("\n<!-- /summary -->\nafter\n")


def test_without_figures_a_table_stays(tmp_path: Path) -> None:
    text = "<!-- summary -->\nold\n<!-- /summary -->\n"
    assert readme.updated(text, tmp_path) == text
