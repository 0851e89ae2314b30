"""The decode graph: the exported function for one position, without what only shapes need."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import pytest

from xlstm_export import distance as compare
from xlstm_export import runfolder, sessions
from xlstm_export.load import checkpoint
from xlstm_export.sessions.cpu import decode
from xlstm_export.trace import export as trace


def test_nothing_but_arithmetic_is_left(small_export: Path) -> None:
    graph = onnx.ModelProto.FromString(decode.decode_graph(small_export / "model.onnx", batch=1))
    operators = [node.op_type for node in graph.graph.node]
    assert not {"Scan", "Shape", "Identity", "XlstmMlstm", "XlstmSlstm"} & set(operators)
    assert not graph.functions
    assert operators.count("Transpose") == 1, "the sLSTM's gates go from (4, H) to (H, 4)"
    outputs = {output.name for output in graph.graph.output}
    for node in graph.graph.node:
        assert node.op_type not in ("Squeeze", "Unsqueeze") or node.output[0] in outputs
    whole = onnx.load(str(small_export / "model.onnx"), load_external_data=False)
    weights = {t.name for t in whole.graph.initializer if t.external_data}
    assert weights <= {t.name for t in graph.graph.initializer if t.external_data}, (
        "weights stay in their file"
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_same_function_as_the_whole_graph(batch: int, small_export: Path) -> None:
    """The whole graph at S = 1, without the session's help, from a state that is not fresh."""
    rng = np.random.default_rng(0)
    session = sessions.OrtSession(small_export, batch)
    session.prefill({"tokens": rng.integers(0, 256, (batch, 70))})
    past = session.state()
    tokens = rng.integers(0, 256, (batch, 1))
    whole = onnxruntime.InferenceSession(str(small_export / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in whole.get_outputs()]
    expected = dict(zip(names, whole.run(None, {"tokens": tokens, **past}), strict=True))
    found = session.step({"tokens": tokens})["logits"]
    assert compare.difference(found, expected["logits"]).relative_l2 < 1e-6
    state = session.state()
    for spec in runfolder.read_io(small_export).states:
        assert compare.difference(state[spec.past], expected[spec.present]).relative_l2 < 1e-6


def test_convolution_of_one_row_keeps_its_window(tmp_path: Path) -> None:
    """Kernel 2: the state has one row, so its slice and concat shrink to the sizes views are made of."""
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "checkpoint", conv=2))
    session = sessions.OrtSession(trace.export(loaded, tmp_path / "out"))
    reference = sessions.TorchSession(loaded)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 9))
    expected = reference.prefill({"tokens": tokens})["logits"]
    for t in range(9):
        found = session.step({"tokens": tokens[:, t : t + 1]})["logits"]
        assert compare.difference(found, expected[:, t : t + 1]).relative_l2 < 5e-6
