"""Every tick of the table in docs/models.md: that family, form and type through the whole of verify."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import large_models
import models
import own_models
import pytest
import tirex2_models
import tirex_models
from nvidia_builder import check_builds
from places import ROOT

from xlstm_export import runfolder
from xlstm_export.load import checkpoint
from xlstm_export.options import CalibrateOptions, Context, ExportOptions, VerifyOptions
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.specs import OWN, STANDARD
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify
from xlstm_export.verify.precision import verify_precision

Make = Callable[[Path, bool], checkpoint.Loaded]
FAMILIES: dict[str, Make] = {
    "xLSTMLMModel": lambda p, stateless: checkpoint.load_checkpoint(models.make(p / "model")),
    "xLSTMLarge": lambda p, stateless: checkpoint.load_checkpoint(large_models.make_large(p / "model")),
    "Hugging Face": lambda p, stateless: checkpoint.load_checkpoint(large_models.make_hf(p / "model")),
    "TiRex": lambda p, stateless: checkpoint.load_checkpoint(
        tirex_models.make(p / "model"), stateless=stateless
    ),
    "TiRex-2": lambda p, stateless: checkpoint.load_checkpoint(
        tirex2_models.make(p / "model"), stateless=stateless
    ),
    "nn.Module": lambda p, stateless: own_models.loaded(own_models.Classifier()),
    "nn.LSTM": lambda p, stateless: own_models.loaded(own_models.BesideBoth()),
    "Vision-LSTM": lambda p, stateless: own_models.loaded(own_models.VisionCells(alternate=stateless)),
    "your own cell": lambda p, stateless: checkpoint.load_module("examples.custom_cell.adapters:build"),
    "LinearAttention": lambda p, stateless: checkpoint.load_checkpoint(models.make(p / "model")),
}


def options(family: str, *, stateless: bool, dtype: str = "fp32") -> ExportOptions:
    recurrence = STANDARD if family == "LinearAttention" else OWN
    return ExportOptions(stateless=stateless, dtype=dtype, recurrence=recurrence)


# The form decides the ends of a graph, the type how its weights are stored: neither sees the other.
FORMS = {
    "streaming-fp32": (False, "fp32"),
    "stateless-fp32": (True, "fp32"),
    "streaming-bf16": (False, "bf16"),
    "stateless-fp16": (True, "fp16"),
}


def diagonal(columns: Iterable[str]) -> list[Any]:
    """Every family with every column. Quick are one column per family and every column at least once."""
    names = list(columns)
    return [
        pytest.param(
            family,
            column,
            marks=() if position == row % len(names) else pytest.mark.slow,
            id=f"{family}-{column}",
        )
        for row, family in enumerate(FAMILIES)
        for position, column in enumerate(names)
    ]


@pytest.mark.parametrize(("family", "form"), diagonal(FORMS))
def test_family(family: str, form: str, tmp_path: Path) -> None:
    stateless, dtype = FORMS[form]
    loaded = FAMILIES[family](tmp_path, stateless)
    out = trace.export(loaded, tmp_path / "out", options(family, stateless=stateless, dtype=dtype))
    assert bool(runfolder.read_io(out).states) != stateless
    report = verify.verify(out, loaded)
    assert [check for check in report.checks if not check.passed] == []


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[checkpoint.Loaded, Path]:
    """A family's FP32 export, which the other precisions are made of."""
    folder = tmp_path_factory.mktemp("family")
    loaded = FAMILIES[request.param](folder, False)
    return loaded, trace.export(loaded, folder / "run", options(request.param, stateless=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exported", "precision"), diagonal(["fp16", "int8", "int4-wo"]), indirect=["exported"]
)
def test_family_in_other_precisions(exported: tuple[checkpoint.Loaded, Path], precision: str) -> None:
    """Fences, rules of TensorRT, all ways of calling, NVIDIA's builder; ranges are from made-up data."""
    loaded, run = exported
    recipe = preset(precision)
    scales = (
        stages.calibrate(run, loaded, CalibrateOptions(random_data=True), Context(threads=1))
        if recipe.needs_scales
        else None
    )
    folder = quantize.quantize(run, recipe, scales=scales)
    report = verify_precision(folder, loaded, VerifyOptions(horizon=150, free_horizon=20), Context(threads=1))
    drift = [check for check in report.checks if ": level" in check.name or ": KL" in check.name]
    # Made-up models and data say nothing about how good a precision is; that it is one at all they do.
    failed = [check for check in report.checks if not check.passed and check not in drift]
    assert failed == []
    worst = max(check.value for check in drift if "level" in check.name)
    assert worst < (2.0 if precision == "int4-wo" else 1.0)
    if runfolder.RunFolder.open(run).options.recurrence == OWN:  # TensorRT has no LinearAttention
        check_builds(folder / "model.onnx")


@pytest.mark.parametrize("family", ["xLSTMLarge", "nn.Module", "your own cell"])
def test_family_in_nvidias_builder(family: str, tmp_path: Path) -> None:
    """The others are built in test_tensorrt_build.py and test_tirex.py."""
    loaded = FAMILIES[family](tmp_path, False)
    check_builds(trace.export(loaded, tmp_path / "out") / "model.onnx")


def test_the_table_has_a_row_per_family_and_none_more() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = text.split("| family | checkpoint |")[1].split("\n\n")[0]
    rows = [row for row in table.splitlines()[2:] if row]
    assert len(rows) == len(FAMILIES)
    for name, row in zip(FAMILIES, rows, strict=True):
        assert re.search(re.escape(name), row.split("|")[1])
