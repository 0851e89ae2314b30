"""Graph passes, one case of their docstrings at a time: what the pass does, and that no value changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from xlstm_export.errors import BuildError
from xlstm_export.passes import fold_weight_transposes as folding
from xlstm_export.passes.copy_dims_in_reshape import copy_dims_in_reshape
from xlstm_export.passes.fold_weight_transposes import fold_weight_transposes
from xlstm_export.passes.last_position import keep_last_position
from xlstm_export.passes.merge_static_views import merge_static_views

Arrays = dict[str, np.ndarray]


def model_of(signature: str, body: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text: `signature` is "(inputs) => (outputs)", weights are added by name."""
    text = f'<ir_version: 10, opset_import: ["" : 18]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    ShapeInferencePass()(model)
    return model


def run(model: ir.Model, inputs: Arrays) -> list[np.ndarray]:
    """Outputs in ONNX Runtime, the checker's blessing included."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator stands in the graph, constants and unused nodes left out."""
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- copy_dims_in_reshape ---------------------------------------------------------------------------

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


# --- fold_weight_transposes -------------------------------------------------------------------------


def test_weight_read_only_transposed_is_stored_transposed() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 3] y, float[B, 3] z)",
        """
        first = Transpose <perm = [1, 0]> (W)
        second = Transpose <perm = [1, 0]> (W)
        y = MatMul(x, first)
        xx = Mul(x, x)
        z = MatMul(xx, second)
        """,
        W=random(3, 4),
    )
    x = {"x": random(2, 4)}
    before = run(model, x)
    assert fold_weight_transposes(model) == 2
    assert operators(model) == {"MatMul": 2, "Mul": 1}
    assert list(model.graph.initializers) == ["W.T"]
    np.testing.assert_array_equal(model.graph.initializers["W.T"].const_value.numpy(), random(3, 4).T)
    same(run(model, x), before)


@pytest.mark.parametrize("block", [1, 40, 1 << 23])
def test_transposed_weight_is_written_in_blocks(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks smaller than a row, of some rows, and larger than the tensor."""
    monkeypatch.setattr(folding, "WRITE_BLOCK", block)
    model = model_of(
        "(float[3, N, 5] x) => (float[3, N, 7] y)",
        "w = Transpose <perm = [0, 2, 1]> (W)\n y = MatMul(x, w)",
        W=random(3, 7, 5),
    )
    x = {"x": random(3, 2, 5)}
    before = run(model, x)
    fold_weight_transposes(model)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    stored = np.fromfile(tmp_path / "m.data", dtype=np.float32, count=3 * 5 * 7)
    np.testing.assert_array_equal(stored.reshape(3, 5, 7), random(3, 7, 5).transpose(0, 2, 1))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    same(session.run(None, x), before)


@pytest.mark.parametrize("shape", ["B, S, 4", "B, 4"])
def test_weight_tied_with_a_table_becomes_a_gemm(shape: str) -> None:
    """One stored copy serves the table and the head, for inputs of any rank."""
    model = model_of(
        f"(int64[B, S] ids, float[{shape}] x) => (float[B, S, 4] e, float[{shape[:-1]}9] y)",
        """
        e = Gather(W, ids)
        w = Transpose <perm = [1, 0]> (W)
        y = MatMul(x, w)
        """,
        W=random(9, 4),
    )
    x = {"ids": np.array([[1, 8, 0]]), "x": random(*((1, 3, 4) if "S" in shape else (5, 4)))}
    x["ids"] = np.repeat(x["ids"], len(x["x"]), axis=0)
    before = run(model, x)
    assert fold_weight_transposes(model) == 1
    assert list(model.graph.initializers) == ["W"]
    assert operators(model)["Gemm"] == 1
    assert operators(model)["Transpose"] == 0
    same(run(model, x), before)


@pytest.mark.parametrize(
    "body",
    [
        # Two permutations of one weight.
        "a = Transpose <perm = [1, 0, 2]> (V)\n b = Transpose <perm = [2, 1, 0]> (V)\n y = Add(a, b)",
        # Tied, but the transpose feeds something else than a product.
        "e = Gather(W, i)\n w = Transpose <perm = [1, 0]> (W)\n y = Add(e, w)",
        # Tied, and on the left of the product.
        "e = Gather(W, i)\n w = Transpose <perm = [1, 0]> (W)\n y = MatMul(w, e)",
        # No weight at all.
        "y = Transpose <perm = [1, 0]> (x)",
    ],
)
def test_other_transposes_are_left_alone(body: str) -> None:
    weights = {"W": random(3, 3), "V": random(3, 3, 3), "i": np.array([0, 1, 2])}
    weights = {name: array for name, array in weights.items() if f"{name})" in body or f"({name}," in body}
    shape = "3, 3, 3" if "V" in body else "3, 3"
    model = model_of(f"(float[3, 3] x) => (float[{shape}] y)", body, **weights)
    before = operators(model)
    assert fold_weight_transposes(model) == 0
    assert operators(model) == before


def test_weight_that_is_an_output_is_left_alone() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 3] y, float[3, 4] W)",
        "w = Transpose <perm = [1, 0]> (W)\n y = MatMul(x, w)",
        W=random(3, 4),
    )
    assert fold_weight_transposes(model) == 0


# --- last_position ----------------------------------------------------------------------------------


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


# --- merge_static_views -----------------------------------------------------------------------------


def test_chain_that_returns_to_its_shape_goes_away() -> None:
    model = model_of(
        "(float[1, 1, 6] x) => (float[1, 1, 6] y)",
        """
        s = Constant <value_ints = [1, 1, 2, 3]> ()
        a = Reshape(x, s)
        b = Transpose <perm = [0, 2, 1, 3]> (a)
        t = Constant <value_ints = [1, 1, -1]> ()
        c = Reshape(b, t)
        y = Exp(c)
        """,
    )
    x = {"x": random(1, 1, 6)}
    before = run(model, x)
    assert merge_static_views(model) > 0
    assert operators(model) == {"Exp": 1}
    same(run(model, x), before)


def test_chain_becomes_one_shared_reshape() -> None:
    model = model_of(
        "(float[1, 1, 6] x) => (float[2, 3] y, float[2, 3] z)",
        """
        s = Constant <value_ints = [1, 1, 2, 3]> ()
        t = Constant <value_ints = [2, 3]> ()
        zero = Constant <value_ints = [0]> ()
        a = Reshape(x, s)
        b = Squeeze(a, zero)
        c = Reshape(b, t)
        y = Exp(c)
        d = Flatten <axis = 3> (a)
        e = Reshape(d, t)
        z = Tanh(e)
        """,
    )
    x = {"x": random(1, 1, 6)}
    before = run(model, x)
    merge_static_views(model)
    assert operators(model) == {"Reshape": 1, "Exp": 1, "Tanh": 1}
    same(run(model, x), before)


def test_transpose_that_moves_data_is_no_view() -> None:
    model = model_of(
        "(float[1, 2, 3] x) => (float[1, 2, 3] y)",
        """
        a = Transpose <perm = [0, 2, 1]> (x)
        t = Constant <value_ints = [1, 2, 3]> ()
        b = Reshape(a, t)
        y = Exp(b)
        """,
    )
    x = {"x": random(1, 2, 3)}
    before = run(model, x)
    merge_static_views(model)
    assert operators(model) == {"Transpose": 1, "Reshape": 1, "Exp": 1}
    same(run(model, x), before)


def test_views_of_unknown_shape_and_outputs_are_left_alone() -> None:
    model = model_of(
        "(float[B, 6] x, float[1, 6] w) => (float[B, 2, 3] y, float[6] z)",
        """
        s = Constant <value_ints = [0, 2, 3]> ()
        y = Reshape(x, s)
        t = Constant <value_ints = [6]> ()
        z = Reshape(w, t)
        """,
    )
    x = {"x": random(4, 6), "w": random(1, 6)}
    before = run(model, x)
    assert merge_static_views(model) == 0
    same(run(model, x), before)


def test_output_reads_through_the_views_before_it() -> None:
    model = model_of(
        "(float[1, 6] x) => (float[6] y)",
        """
        s = Constant <value_ints = [2, 3]> ()
        a = Reshape(x, s)
        t = Constant <value_ints = [6]> ()
        y = Reshape(a, t)
        """,
    )
    x = {"x": random(1, 6)}
    before = run(model, x)
    merge_static_views(model)
    same(run(model, x), before)
    assert operators(model)["Reshape"] <= 2
