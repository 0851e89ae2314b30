"""NVIDIA's own ONNX parser and builder accept what is exported: every body, and whole models.

The plan is built for a GPU by name and never run, so this needs none.
"""

from __future__ import annotations

from pathlib import Path

import large_models
import models
import onnx
import pytest
from nvidia_builder import check_builds, needs_builder, single_node
from op_bodies import BODIES
from tier_marks import quick

from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions
from xlstm_export.trace import export as trace

pytestmark = needs_builder


@pytest.mark.parametrize("body", BODIES)
def test_single_operator(body: str, tmp_path: Path) -> None:
    check_builds(single_node(body, tmp_path / "single.onnx"))


def test_model(small_export: Path) -> None:
    check_builds(small_export / "model.onnx")


@pytest.mark.slow
def test_model_with_tied_weights_and_last_logits(tmp_path: Path) -> None:
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "tied", tie_weights=True))
    check_builds(trace.export(loaded, tmp_path / "out", ExportOptions(last_logits=True)) / "model.onnx")


@pytest.mark.parametrize("dtype", quick(["fp32", "bf16", "fp16"], ["bf16"]))
def test_large_model(tmp_path: Path, dtype: str) -> None:
    """The 7B architecture, weights stored in each type."""
    loaded = checkpoint.load_checkpoint(
        large_models.make_hf(tmp_path / "model", num_blocks=2, num_hidden_layers=2)
    )
    check_builds(trace.export(loaded, tmp_path / "out", ExportOptions(dtype=dtype)) / "model.onnx")


def test_parse_error_is_noticed(tmp_path: Path) -> None:
    """What this file rests on: an operator that nobody knows fails the build."""
    path = single_node("slstm", tmp_path / "unknown.onnx")
    model = onnx.load(path)
    model.functions.pop()
    onnx.save(model, path)
    with pytest.raises(AssertionError):
        check_builds(path)
