"""NVIDIA's own ONNX parser and builder as a check of a file; see `rtx_build.py` for what runs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from op_bodies import build
from places import ROOT

needs_builder = pytest.mark.skipif(
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
