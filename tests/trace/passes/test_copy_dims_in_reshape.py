"""Targets that read dimensions: zeros where the data has them at the same index, left alone elsewhere."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from textgraph import model_of, operators, random, run, same

from xlstm_export.trace.passes.copy_dims_in_reshape import copy_dims_in_reshape

READ_B_AND_S = """
    b = Shape <start = 0, end = 1> (x)
    s = Shape <start = 1, end = 2> (x)
"""


def test_dims_read_at_their_own_index_become_zeros() -> None:
    model = model_of(
        "(float[B, S, 6] x) => (float[B, S, 2, 3] y)",
        f"""
        {READ_B_AND_S}
        tail = Constant <value_ints = [2, -1]> ()
        shape = Concat <axis = 0> (b, s, tail)
        y = Reshape <allowzero = 1> (x, shape)
        """,
    )
    x = {"x": random(2, 5, 6)}
    before = run(model, x)
    assert copy_dims_in_reshape(model) == 1
    assert operators(model) == {"Reshape": 1}
    (reshape,) = (node for node in model.graph if node.op_type == "Reshape")
    assert ir.convenience.get_const_tensor(reshape.inputs[1]).numpy().tolist() == [0, 0, 2, -1]
    assert "allowzero" not in reshape.attributes
    same(run(model, x), before)


def test_dim_read_from_another_tensor_of_the_same_symbol_becomes_zero() -> None:
    model = model_of(
        "(float[B, S, 6] x, float[B, 4] state) => (float[B, S, 2, 3] y)",
        """
        b = Shape <start = 0, end = 1> (state)
        s = Shape <start = 1, end = 2> (x)
        tail = Constant <value_ints = [2, 3]> ()
        shape = Concat <axis = 0> (b, s, tail)
        y = Reshape(x, shape)
        """,
    )
    assert copy_dims_in_reshape(model) == 1


@pytest.mark.parametrize(
    ("pieces", "shape"),
    [
        ("s, b, tail", "S, B, 6"),  # each at the index of the other
        ("rows, tail", "R, 6"),  # a computed size, not a dimension
        ("b, both, s", "B, 6, S"),  # behind a constant
    ],
)
def test_other_reshapes_are_left_alone(pieces: str, shape: str) -> None:
    model = model_of(
        f"(float[B, S, 6] x) => (float[{shape}] y)",
        f"""
        {READ_B_AND_S}
        rows = Mul(b, s)
        tail = Constant <value_ints = [6]> ()
        both = Constant <value_ints = [6]> ()
        shape = Concat <axis = 0> ({pieces})
        y = Reshape(x, shape)
        """,
    )
    before = operators(model)
    assert copy_dims_in_reshape(model) == 0
    assert operators(model) == before


def test_unknown_dims_are_not_taken_for_equal() -> None:
    """Two dimensions without a symbol may differ."""
    model = model_of(
        "(float[B, S, 6] x, float[B, T] z) => (float[B, U, V] y)",
        """
        b = Shape <start = 0, end = 1> (x)
        t = Shape <start = 1, end = 2> (z)
        tail = Constant <value_ints = [-1]> ()
        shape = Concat <axis = 0> (b, t, tail)
        y = Reshape(x, shape)
        """,
    )
    for value in model.graph.inputs:
        value.shape = ir.Shape(["B", None, *list(value.shape)[2:]])
    assert copy_dims_in_reshape(model) == 0
    assert run(model, {"x": random(2, 4, 6), "z": random(2, 8)})[0].shape == (2, 8, 3)


def test_shape_that_tracing_lost_is_written_down() -> None:
    model = model_of(
        "(float[B, S, 6] x) => (float[B, S, 2, 3] y)",
        f"""
        {READ_B_AND_S}
        tail = Constant <value_ints = [2, 3]> ()
        shape = Concat <axis = 0> (b, s, tail)
        a = Reshape(x, shape)
        y = Exp(a)
        """,
    )
    (reshape,) = (node for node in model.graph if node.op_type == "Reshape")
    reshape.outputs[0].shape = ir.Shape([None] * 4)
    assert copy_dims_in_reshape(model) == 1
    assert [str(dim) for dim in reshape.outputs[0].shape] == ["B", "S", "2", "3"]
