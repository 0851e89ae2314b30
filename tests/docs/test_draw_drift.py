"""The README's picture is drawn from what a verification wrote."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def draw_drift() -> ModuleType:
    source = importlib.util.spec_from_file_location("draw_drift", ROOT / "docs" / "draw_drift.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def write_runs(runs: Path, module: ModuleType, error: float) -> None:
    row = {"mode": "teacher-forced", "block": None, "tensor": "y", "error": error}
    other = {**row, "block": 0, "tensor": "C", "error": 0.5}
    report = {
        "precision": {"drift": {"rows": [{**r, "horizon": at} for at in (1, 100) for r in (row, other)]}},
        "checks": [{"name": "teacher-forced: y: level", "limit": 0.1}],
    }
    for model in module.MODELS:
        for precision in module.PRECISIONS:
            folder = runs / model / precision / "verify"
            folder.mkdir(parents=True)
            (folder / "report.json").write_text(json.dumps(report))


def test_a_point_per_position_and_a_line_per_limit(draw_drift: ModuleType, tmp_path: Path) -> None:
    write_runs(tmp_path, draw_drift, error=0.01)
    tree = ElementTree.fromstring(draw_drift.picture(tmp_path))
    curves = len(draw_drift.MODELS) * len(draw_drift.PRECISIONS)
    assert len(tree.findall(f"{SVG}polyline")) == curves
    heights = {float(circle.attrib["cy"]) for circle in tree.findall(f"{SVG}circle")}
    assert heights == {draw_drift._y(0.01)}
    limits = [line for line in tree.findall(f"{SVG}line") if "limit" in line.attrib["class"]]
    assert {float(line.attrib["y1"]) for line in limits} == {draw_drift._y(0.1)}
    assert len(limits) == curves


def test_the_committed_picture_has_both_colour_schemes() -> None:
    text = (ROOT / "docs" / "drift.svg").read_text(encoding="utf-8")
    assert len(text) < 10_000
    assert "prefers-color-scheme: dark" in text
    ElementTree.fromstring(text)
