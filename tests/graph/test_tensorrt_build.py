"""NVIDIA's own ONNX parser and builder accept what is exported: every body, and whole models.

The plan is built for a GPU by name and never run, so this needs none.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import large_models
import models
import onnx
import pytest
from places import ROOT
from test_bodies import BODIES, build

from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="NVIDIA's parser and builder are missing: pip install tensorrt-rtx",
)

SCRIPT = ROOT / "tests" / "rtx_build.py"


def check_builds(model: Path) -> None:
    """Parse and build in a process of its own, which a native abort cannot take the tests along with."""
    command = [sys.executable, str(SCRIPT), str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"
    assert json.loads(result.stdout.splitlines()[-1])["plan_bytes"] > 0


def single_node(body: str, path: Path) -> Path:
    """A graph of one operator and its body, the sizes fixed that a checkpoint fixes."""
    attributes = (("scale", 0.5), ("eps", 1e-6)) if "mlstm" in body else ()
    if "clamp" in body:
        attributes = (("forget_max", 15.0),)
    halves = ("q", "k", "v") if "mlstm" in body else ("x", "R", "bias")
    types = tuple((name, onnx.TensorProto.FLOAT16) for name in halves) if "cast" in body else ()
    model = build(body, types, attributes)
    sizes = {"H": 2, "D": 8, "Dk": 8, "Dv": 8, **({"S": 1} if "step" in body else {})}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("body", BODIES)
def test_single_operator(body: str, tmp_path: Path) -> None:
    check_builds(single_node(body, tmp_path / "single.onnx"))


def test_model(small_export: Path) -> None:
    check_builds(small_export / "model.onnx")


def test_model_with_tied_weights_and_last_logits(tmp_path: Path) -> None:
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "tied", tie_weights=True))
    check_builds(trace.export(loaded, tmp_path / "out", last_logits=True) / "model.onnx")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_large_model(tmp_path: Path, dtype: str) -> None:
    """The 7B architecture, weights stored in each type."""
    loaded = checkpoint.load_checkpoint(
        large_models.make_hf(tmp_path / "model", num_blocks=2, num_hidden_layers=2)
    )
    check_builds(trace.export(loaded, tmp_path / "out", dtype=dtype) / "model.onnx")


def test_parse_error_is_noticed(tmp_path: Path) -> None:
    """What this file rests on: an operator that nobody knows fails the build."""
    path = single_node("slstm", tmp_path / "unknown.onnx")
    model = onnx.load(path)
    model.functions.pop()
    onnx.save(model, path)
    with pytest.raises(AssertionError):
        check_builds(path)
