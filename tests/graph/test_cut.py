"""Cut graphs: the pieces are the whole, on the same weight file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from refusals import refused

from xlstm_export import runfolder
from xlstm_export.errors import InputError, UsageError
from xlstm_export.graph import cut as graph_cut
from xlstm_export.graph import files
from xlstm_export.load import checkpoint
from xlstm_export.sessions import OrtSession
from xlstm_export.verify.segments import Segments


def test_the_segments_one_after_the_other_are_the_graph(small_export: Path) -> None:
    """Up to rounding: at a border the runtime cannot fuse operators as it does elsewhere."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 70))
    session = OrtSession(small_export, 2)
    expected = session.prefill({"tokens": tokens})["logits"]
    segments = Segments(runfolder.RunFolder.open(small_export), 2, 0)
    assert segments.blocks == 3
    entry, states = {"tokens": tokens}, {}
    for index in range(segments.blocks):
        result, state = segments.open(index).run([entry])
        entry, states = {f"hidden_{index}": result}, {**states, **state}
    assert close(segments.open(3).run_outputs(entry)["logits"], expected)
    assert states.keys() == session.state().keys()
    for name, value in session.state().items():
        assert close(states[name], value)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected))


def test_a_segment_holds_nothing_of_the_others(small_export: Path) -> None:
    model = graph_cut.segment(files.load_graph(small_export / runfolder.MODEL), 1)
    assert {v.name for v in model.graph.inputs} == {"hidden_0"} | {
        f"past_1_{kind}" for kind in ("conv", "y", "c", "n", "m")
    }
    names = [name for name in model.graph.initializers if ".blocks." in name]
    assert names
    assert all(".blocks.1." in name for name in names)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_first_blocks_keep_their_states_and_the_head(small_export: Path, count: int) -> None:
    model = graph_cut.first_blocks(files.load_graph(small_export / runfolder.MODEL), count)
    blocks = {int((v.name or "").split("_")[1]) for v in model.graph.inputs if v.name != "tokens"}
    assert blocks == set(range(count))
    assert next(v.name for v in model.graph.outputs) == "logits"
    assert len(graph_cut.boundaries(model)) == count
    assert any("lm_head" in name for name in model.graph.initializers)


def test_a_graph_without_blocks() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Neg", [x])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    with refused(UsageError, "no stack of blocks"):
        graph_cut.segment(model, 0)
    with refused(UsageError, "no stack of blocks"):
        graph_cut.first_blocks(model, 1)


@pytest.mark.parametrize("content", [b"no protobuf at all", None])
def test_what_is_no_graph(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with refused(InputError, str(path), "cannot be read as ONNX"):
        files.load_graph(path)


def test_the_weights_are_not_copied(small_export: Path, small_loaded: checkpoint.Loaded) -> None:
    model = graph_cut.segment(files.load_graph(small_export / runfolder.MODEL), 0)
    external = [v.const_value for v in model.graph.initializers.values() if v.const_value.size > 1024]
    assert external
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in external)


def test_weights_with_a_second_name(small_export: Path, tmp_path: Path) -> None:
    """ONNX's own check refuses them, the first blocks of a large model are verified on such a file."""
    for name in (runfolder.MODEL, runfolder.MODEL_DATA):
        shutil.copy(small_export / name, tmp_path)
    (tmp_path / "second").hardlink_to(tmp_path / runfolder.MODEL_DATA)
    files.load_graph(tmp_path / runfolder.MODEL)


def test_weights_that_end_too_early(small_export: Path, tmp_path: Path) -> None:
    shutil.copy(small_export / runfolder.MODEL, tmp_path)
    weights = (small_export / runfolder.MODEL_DATA).read_bytes()
    (tmp_path / runfolder.MODEL_DATA).write_bytes(weights[:-1])
    with refused(InputError, "cannot be read as ONNX", "ends at byte"):
        files.load_graph(tmp_path / runfolder.MODEL)
    (tmp_path / runfolder.MODEL_DATA).unlink()
    with refused(InputError, "cannot be read as ONNX", runfolder.MODEL_DATA):
        files.load_graph(tmp_path / runfolder.MODEL)
