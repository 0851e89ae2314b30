"""Comparison of two graphs: equal ones in another order and under other names; faults made by seed."""

from __future__ import annotations

from pathlib import Path

import mutations
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xlstm_export.graph.compare import compare_graphs, tensor_difference
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset


@pytest.fixture(scope="module")
def source(small_export: Path) -> onnx.ModelProto:
    return onnx.load(small_export / "model.onnx")


def differences(found: onnx.ModelProto, right: onnx.ModelProto) -> list[str]:
    return [x.text for x in compare_graphs(ir.from_proto(found), ir.from_proto(right)).mismatches]


def test_an_equal_graph_under_other_names_and_in_another_order(source: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(source)
    outside = {x.name for x in (*other.graph.input, *other.graph.output)}

    def renamed(name: str) -> str:
        return name if not name or name in outside else f"other.{name}"

    for tensor in other.graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in other.graph.node:
        node.name = ""
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
    weights = list(other.graph.initializer)[::-1]
    del other.graph.initializer[:]
    other.graph.initializer.extend(weights)
    found = compare_graphs(ir.from_proto(other), ir.from_proto(source))
    assert found.mismatches == []
    assert found.weights > 20
    assert found.nodes >= len(source.graph.node)  # and those of the bodies


@pytest.mark.parametrize("seed", range(2))
def test_every_fault_is_seen(source: onnx.ModelProto, seed: int) -> None:
    kinds = set()
    for kind, where, model in mutations.mutated(source, seed):
        kinds.add(kind)
        assert differences(model, source), (kind, where)
    assert len(kinds) >= 13


def test_every_fault_of_integers_is_seen(small_export: Path, tmp_path: Path) -> None:
    made = quantize.quantize(small_export, preset("int8-wo"), out=tmp_path / "out")
    right = onnx.load(made / "model.onnx")
    kinds = set()
    for kind, where, model in mutations.mutated(right, 1):
        kinds.add(kind)
        assert differences(model, right), (kind, where)
    assert "quantization_scale" in kinds


def test_a_weight_is_named_with_its_place(source: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    (tensor,) = (t for t in model.graph.initializer if t.name.endswith("blocks.1.ffn.proj_up.weight.T"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    before, values[3, 2] = values[3, 2], 7.0
    mutations.put(tensor, values)
    (text,) = differences(model, source)
    assert text.startswith(f"{tensor.name}[3, 2] is 7, should be {before:.9g} (1 of ")


def test_what_no_output_needs_is_named(source: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    model.graph.initializer.append(onnx.helper.make_tensor("left", onnx.TensorProto.FLOAT, [1], [1.0]))
    model.graph.node.append(onnx.helper.make_node("Neg", [model.graph.input[1].name], ["gone"], "dead"))
    assert differences(model, source) == [
        "dead takes no part in any output",
        "left takes no part in any output",
    ]


def test_a_changed_body_of_an_operator(source: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    scan = next(n for f in model.functions for n in f.node if n.op_type == "Scan")
    body = next(a.g for a in scan.attribute if a.name == "body")
    node = next(n for n in body.node if n.op_type == "Exp")
    node.op_type = "Neg"
    assert any("is a Neg, should be a Exp" in text for text in differences(model, source))


def test_bits_decide() -> None:
    """Two NaN are equal; two zeros of other sign are not."""
    a, b = np.array([np.nan, 0.0], np.float32), np.array([np.nan, -0.0], np.float32)
    assert tensor_difference(ir.tensor(a), ir.tensor(a.copy())) == ""
    assert tensor_difference(ir.tensor(a), ir.tensor(b)) == "[1] is 0, should be -0 (1 of 2 elements differ)"
    assert tensor_difference(ir.tensor(a), ir.tensor(a[:1])) == " has shape [2], should have [1]"
    assert "has type FLOAT" in tensor_difference(ir.tensor(a), ir.tensor(a.astype(np.float16)))
