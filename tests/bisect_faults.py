"""Faults planted in exports, for the tests of bisection."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from xlstm_export import runfolder

Edit = Callable[[onnx.ModelProto], None]
MLSTM, SLSTM = "XlstmMlstm", "XlstmSlstm"


def tamper(source: Path, out: Path, edit: Edit) -> Path:
    folder = shutil.copytree(source, out, ignore=shutil.ignore_patterns("verify", "bench", "fp16", "int8*"))
    return tamper_with(folder, edit)


def tamper_with(folder: Path, edit: Edit) -> Path:
    """Edit the graph or the weights of a run folder in place."""
    model = onnx.load(folder / runfolder.MODEL)
    edit(model)
    (folder / runfolder.MODEL_DATA).unlink()  # onnx would append to it
    onnx.save_model(
        model,
        folder / runfolder.MODEL,
        save_as_external_data=True,
        location=runfolder.MODEL_DATA,
        size_threshold=1024,
    )
    return folder


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def swap_gates(model: onnx.ModelProto) -> None:
    node = nodes(model, MLSTM)[1]
    node.input[3], node.input[4] = node.input[4], node.input[3]
