"""The cut to the last position: as high as possible, and nowhere others would see it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from textgraph import Arrays, model_of, random, run, same

from xlstm_export.errors import BuildError
from xlstm_export.trace.passes.fold_weight_transposes import fold_weight_transposes
from xlstm_export.trace.passes.last_position import keep_last_position


def check_last(model: ir.Model, inputs: Arrays, output: int = 0) -> None:
    """The pass cuts the output to its last position and changes no other one."""
    before = run(model, inputs)
    name = model.graph.outputs[output].name
    keep_last_position(model, name)
    after = run(model, inputs)
    before[output] = before[output][:, -1:]
    assert model.graph.outputs[output].name == name
    assert model.graph.outputs[output].shape[1] == 1
    same(after, before)


def first_reader(model: ir.Model) -> str:
    """The operator that reads the cut."""
    (cut,) = (node for node in model.graph if node.op_type == "Slice")
    return next(use.node.op_type for use in cut.outputs[0].uses())


def test_cut_moves_above_position_wise_operators() -> None:
    model = model_of(
        "(float[B, S, 4] x) => (float[B, S, 3] y)",
        """
        sum = Add(x, x)
        n = LayerNormalization <axis = -1> (sum, G)
        h = MatMul(n, W)
        hb = Add(h, b)
        a = Tanh(hb)
        y = Softmax <axis = -1> (a)
        """,
        G=random(4),
        W=random(4, 3),
        b=random(3),
    )
    check_last(model, {"x": random(2, 5, 4)})
    assert first_reader(model) == "LayerNormalization"


def test_cut_moves_above_a_tied_head() -> None:
    model = model_of(
        "(int64[B, S] ids) => (float[B, S, 9] y)",
        """
        e = Gather(W, ids)
        sum = Add(e, e)
        n = LayerNormalization <axis = -1> (sum, G)
        w = Transpose <perm = [1, 0]> (W)
        y = MatMul(n, w)
        """,
        W=random(9, 4),
        G=random(4),
    )
    fold_weight_transposes(model)
    check_last(model, {"ids": np.array([[1, 2, 3], [4, 5, 6]])})
    assert first_reader(model) == "LayerNormalization"


def test_output_of_another_operator_is_cut_itself() -> None:
    model = model_of("(float[B, S, 4] x) => (float[B, S, 4] y)", "y = Add(x, x)")
    check_last(model, {"x": random(2, 5, 4)})


@pytest.mark.parametrize("axis", [1, -2])
def test_operator_across_positions_is_not_passed(axis: int) -> None:
    model = model_of(
        "(float[B, S, 4] x) => (float[B, S, 4] y)",
        f"xx = Add(x, x)\n p = Softmax <axis = {axis}> (xx)\n y = Mul(p, two)",
        two=np.array(2.0, dtype=np.float32),
    )
    check_last(model, {"x": random(2, 5, 4)})
    assert first_reader(model) == "Mul"


def test_value_that_others_read_is_not_cut() -> None:
    """The hidden state before the head is an output too, or feeds one."""
    for middle in ("hidden = Mul(xx, two)", "h = Mul(xx, two)\n hidden = Add(h, h)"):
        name = "hidden" if "h =" not in middle else "h"
        model = model_of(
            "(float[B, S, 4] x) => (float[B, S, 3] y, float[B, S, 4] hidden)",
            f"xx = Add(x, x)\n {middle}\n y = MatMul({name}, W)",
            W=random(4, 3),
            two=np.array(2.0, dtype=np.float32),
        )
        check_last(model, {"x": random(2, 5, 4)})
        assert first_reader(model) == "MatMul"


def test_length_read_by_others_is_not_cut() -> None:
    """A tied head reads the shape of its input; so may something that needs all positions."""
    model = model_of(
        "(int64[B, S] ids) => (float[B, S, 9] y, int64[3] size)",
        """
        e = Gather(W, ids)
        n = Add(e, e)
        w = Transpose <perm = [1, 0]> (W)
        y = MatMul(n, w)
        size = Shape(n)
        """,
        W=random(9, 4),
    )
    fold_weight_transposes(model)
    check_last(model, {"ids": np.array([[1, 2, 3], [4, 5, 6]])})


def test_output_that_is_read_in_the_graph_is_cut_itself() -> None:
    model = model_of(
        "(float[B, S, 4] x) => (float[B, S, 3] y, float[B, S, 3] z)",
        "xx = Add(x, x)\n y = MatMul(xx, W)\n z = Mul(y, y)",
        W=random(4, 3),
    )
    check_last(model, {"x": random(2, 5, 4)})


def test_output_without_positions_is_refused() -> None:
    model = model_of(
        "(float[B, S, 4] x) => (float[B, 4] y)", "y = ReduceMean <keepdims = 0> (x, one)", one=np.array([1])
    )
    with pytest.raises(BuildError, match="output y has no sequence axis"):
        keep_last_position(model, "y")
