"""Transposed weights: stored transposed, or used by Gemm where a table is shared, or left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from textgraph import model_of, operators, random, run, same

from xlstm_export.trace.passes.fold_weight_transposes import fold_weight_transposes


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


def test_transposed_weight_is_written_in_row_order(tmp_path: Path) -> None:
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
