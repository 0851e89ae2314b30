"""Ends of blocks get their names, and stay what they are otherwise."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from textgraph import operators, random, run

from xlstm_export.trace import passes
from xlstm_export.trace.passes.name_boundaries import name_boundaries


def marked(signature: str, body: str) -> ir.Model:
    """`body` with `MARK k (x)` for a marker of block k."""
    for block in range(3):
        body = body.replace(f"MARK {block}", f"xlstm.Boundary <block = {block}>")
    text = f'<ir_version: 10, opset_import: ["" : 18, "xlstm" : 1]> g {signature} {{ {body} }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:  # tracing knows the shapes
        node.outputs[0].shape = ir.Shape(["B", 4])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model


def names(model: ir.Model) -> list[str | None]:
    return [value.name for node in model.graph for value in node.outputs]


def test_computed_values_take_the_name() -> None:
    model = marked(
        "(float[B, 4] x) => (float[B, 4] y)",
        "a = Exp(x)\n m = MARK 0 (a)\n b = Tanh(m)\n n = MARK 1 (b)\n c = Add(n, a)\n y = Neg(c)",
    )
    assert name_boundaries(model) == 2
    assert names(model) == ["hidden_0", "hidden_1", "c", "y"]
    run(model, {"x": random(2, 4)})
    assert name_boundaries(model) == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("m = MARK 0 (x)\n y = Exp(m)", ["hidden_0", "y"]),  # an input
        ("y = Exp(x)\n m = MARK 0 (y)\n z = Neg(m)", ["y", "hidden_0", "z"]),  # an output
        ("a = Exp(x)\n m = MARK 0 (a)\n n = MARK 1 (m)\n y = Neg(n)", ["hidden_0", "hidden_1", "y"]),
        ("a = Exp(x)\n m = MARK 0 (a)\n n = MARK 1 (a)\n y = Add(m, n)", ["hidden_0", "hidden_1", "y"]),
        ("a = Exp(x)\n y = MARK 0 (a)", ["hidden_0", "y"]),  # the marker is an output
        ("y = MARK 0 (x)", ["hidden_0", "y"]),
    ],
)
def test_values_with_a_name_of_their_own(body: str, expected: list[str]) -> None:
    outputs = "float[B, 4] y, float[B, 4] z" if "z =" in body else "float[B, 4] y"
    model = marked(f"(float[B, 4] x) => ({outputs})", body)
    name_boundaries(model)
    assert names(model) == expected
    assert [value.name for value in model.graph.outputs] == (["y", "z"] if "z" in outputs else ["y"])
    run(model, {"x": random(2, 4)})


def test_no_pass_looks_through_a_marker() -> None:
    """Two views, two transposes, two casts with a block's end between them."""
    model = marked(
        "(float[B, 4] x) => (float[4, B] y)",
        """
        t = Constant <value_ints = [0, 2, 2]> ()
        a = Reshape(x, t)
        m = MARK 0 (a)
        s = Constant <value_ints = [0, 4]> ()
        b = Reshape(m, s)
        c = Transpose <perm = [1, 0]> (b)
        n = MARK 1 (c)
        d = Transpose <perm = [1, 0]> (n)
        e = Cast <to = 11> (d)
        o = MARK 2 (e)
        f = Cast <to = 1> (o)
        y = Transpose <perm = [1, 0]> (f)
        """,
    )
    shapes = {"a": ["B", 2, 2], "m": ["B", 2, 2], "c": [4, "B"], "n": [4, "B"]}
    for node in model.graph:
        value = node.outputs[0]
        value.shape = ir.Shape(shapes.get(value.name, ["B", 4]))
        if value.name in ("e", "o"):
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    model.graph.outputs[0].shape = ir.Shape([4, "B"])
    fired = passes.run_passes(model)
    assert {name: count for name, count in fired.items() if count} == {"name_boundaries": 3}
    assert operators(model) == {"Reshape": 2, "Transpose": 3, "Cast": 2}
    assert {"hidden_0", "hidden_1", "hidden_2"} <= set(names(model))
