"""What is told of a graph: nodes per block, weights, passes; and every damaged file is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from rich.console import Console

from xlstm_export.cli.tables import show_graph
from xlstm_export.errors import InputError
from xlstm_export.graph.info import GraphInfo, graph_info
from xlstm_export.ops import bodies as functions

TEXT = """<ir_version: 10, opset_import: ["" : 18, "xlstm" : 1]>
    g (int64[B, S] tokens, float[B, 2, 4, 4] past_0_C, float[B, 2, 4] past_0_n, float[B, 2] past_0_m)
    => (float[B, S, 9] logits, float[B, 2, 4, 4] present_0_C, float[B, 2, 4] n1, float[B, 2] m1,
        float[B, 1, 8] present_1_conv)
    {
        e = Gather(E, tokens)
        norm = LayerNormalization <axis = -1> (e, G)
        heads = Reshape(norm, to_heads)
        gates = MatMul(norm, W_if)
        i, f = Split <axis = -1, num_outputs = 2> (gates)
        h, present_0_C, n1, m1 = xlstm.XlstmMlstm <scale = 0.5, eps = 1e-6>
            (heads, heads, heads, i, f, past_0_C, past_0_n, past_0_m)
        flat = Reshape(h, to_flat)
        middle = Add(flat, e)
        up = MatMul(middle, W)
        hidden_0 = Add(middle, up)
        t = Tanh(hidden_0)
        present_1_conv = Slice(hidden_0, last, end, one)
        hidden_1 = Add(hidden_0, t)
        out = LayerNormalization <axis = -1> (hidden_1, G)
        logits = MatMul(out, W_head)
    }"""


def model() -> onnx.ModelProto:
    """Two blocks: an mLSTM with a feed-forward part, and one without a recurrence that has a state."""
    proto = onnx.parser.parse_model(TEXT)
    arrays = {
        "E": np.zeros((9, 8), np.float32),
        "G": np.ones(8, np.float32),
        "W_if": np.zeros((8, 4), np.float32),
        "W": np.zeros((8, 8), np.float32),
        "W_head": np.zeros((8, 9), np.float32),
        "to_heads": np.array([0, 0, 2, 4]),
        "to_flat": np.array([0, 0, 8]),
        "last": np.array([-1]),
        "end": np.array([2**31]),
        "one": np.array([1]),
    }
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto.functions.append(functions.mlstm_function())
    onnx.checker.check_model(proto)
    return proto


@pytest.fixture
def info(tmp_path: Path) -> GraphInfo:
    onnx.save(model(), tmp_path / "model.onnx")
    return graph_info(tmp_path / "model.onnx")


def test_nodes_per_block(info: GraphInfo) -> None:
    assert [(b.name, b.kind, b.nodes) for b in info.blocks] == [
        ("before", "other", 1),
        ("0", "mlstm", 9),
        ("1", "other", 3),  # the Slice that only a state needs is counted where it reads
        ("head", "other", 2),
    ]
    assert info.nodes == sum(block.nodes for block in info.blocks) == 15
    assert info.operators_by_kind["mlstm"]["Add"] == 2


def test_inputs_weights_and_opsets(info: GraphInfo) -> None:
    assert (info.inputs[0].name, info.inputs[0].dtype, info.inputs[0].shape) == (
        "tokens",
        "int64",
        ("B", "S"),
    )
    assert info.outputs[0].shape == ("B", "S", 9)
    assert info.opsets == {"ai.onnx": 18, "xlstm": 1}
    assert info.weight_bytes == {"float": 4 * (72 + 8 + 32 + 64 + 72), "int64": 8 * (4 + 3 + 3)}


def test_what_the_file_does_not_tell(info: GraphInfo) -> None:
    assert info.nodes_before is None
    assert info.passes == {}


def test_what_the_file_tells(tmp_path: Path) -> None:
    proto = model()
    told = {"xlstm_export.passes": '{"merge_views": 3, "cancel_casts": 0}', "xlstm_export.nodes_before": "40"}
    onnx.helper.set_model_props(proto, told)
    onnx.save(proto, tmp_path / "m.onnx")
    info = graph_info(tmp_path / "m.onnx")
    assert info.passes == {"merge_views": 3, "cancel_casts": 0}
    assert info.nodes_before == 40
    text = shown(info)
    assert "15 nodes (40 before the passes)" in text
    assert "merge_views 3×" in text
    assert "cancel_casts" not in text


def test_senseless_metadata_is_ignored(tmp_path: Path) -> None:
    proto = model()
    onnx.helper.set_model_props(proto, {"xlstm_export.passes": "{", "xlstm_export.nodes_before": "many"})
    onnx.save(proto, tmp_path / "m.onnx")
    info = graph_info(tmp_path / "m.onnx")
    assert (info.passes, info.nodes_before) == ({}, None)


def test_without_names_only_the_totals(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[B] x) => (float[B] y) { a = Exp(x)\n y = Exp(a) }'
    )
    onnx.save(proto, tmp_path / "m.onnx")
    info = graph_info(tmp_path / "m.onnx")
    assert info.blocks == ()
    assert info.operators == {"Exp": 2}
    assert "Exp×2" in shown(info)


def test_external_data_is_not_opened(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    assert graph_info(tmp_path / "m.onnx").weight_bytes["float"] == 992


def test_json_and_table(info: GraphInfo) -> None:
    told = json.loads(json.dumps(info.to_json()))
    assert told["blocks"][1]["operators"]["XlstmMlstm"] == 1
    assert "mlstm" in shown(info)


def test_equal_blocks_share_a_line(tmp_path: Path) -> None:
    body = "".join(f"t{k} = Tanh(hidden_{k})\n hidden_{k + 1} = Add(hidden_{k}, t{k})\n" for k in range(4))
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[B] x) => (float[B] y) '
        f"{{ hidden_0 = Exp(x)\n {body} y = Neg(hidden_4) }}"
    )
    onnx.save(proto, tmp_path / "m.onnx")
    assert "1–4" in shown(graph_info(tmp_path / "m.onnx"))


def shown(info: GraphInfo) -> str:
    out = io.StringIO()
    show_graph(Console(file=out, width=200), info)
    return out.getvalue()


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        graph_info(tmp_path / "no.onnx")
    with pytest.raises(InputError, match="cannot read"):
        graph_info(tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip archive", b"\xff" * 100, b"{}"])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"m\.onnx"):
        graph_info(path)


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """A cut between two fields parses; the opset and the functions are the last ones to be there."""
    path = tmp_path / "m.onnx"
    proto = model()
    data = proto.SerializeToString()
    graph_end = data.index(proto.graph.SerializeToString()) + proto.graph.ByteSize()
    for length in range(0, graph_end, 97):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            graph_info(path)


def test_node_that_reads_nothing_is_refused(tmp_path: Path) -> None:
    proto = model()
    del proto.graph.initializer[0]
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="a value that none computes"):
        graph_info(tmp_path / "m.onnx")
