"""Layer norm, however it is written: one node with its weights, equal to the norm in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from textgraph import check_exact, model_of, operators, random, run

from xlstm_export.trace.passes.fuse_layer_norm import fuse_layer_norm

X = random(2, 3, 4, 32) + 3  # a mean that is not zero
# 32 terms per sum and a root in FP32 at 2^-23 = 1.2e-7 each; x / deviation is some 4 before the mean goes.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def expected(x: np.ndarray, scale: np.ndarray | float = 1.0, bias: np.ndarray | float = 0.0) -> np.ndarray:
    wide = x.astype(np.float64)
    centered = wide - wide.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def decomposed(
    square: str = "s = Mul(d, d)",
    variance: str = "v = ReduceMean <keepdims = 1> (s, last)",
    division: str = "y = Div(d, r)",
    axis: str = "-1",
    kind: str = "float",
    **weights: np.ndarray,
) -> ir.Model:
    eps = "{1e-5}"
    return model_of(
        f"({kind}[B, S, 4, 32] x) => ({kind}[B, S, 4, 32] y)",
        f"""
        eps = Constant <value = {kind} {eps}> ()
        last = Constant <value_ints = [{axis}]> ()
        m = ReduceMean <keepdims = 1> (x, last)
        d = Sub(x, m)
        {square}
        {variance}
        a = Add(v, eps)
        r = Sqrt(a)
        {division}
        """,
        **weights,
    )


SQUARES = [
    "s = Mul(d, d)",
    "two = Constant <value = float {2.0}> ()\n s = Pow(d, two)",
    # The mean once more under another name, as torch writes a variance.
    "third = Constant <value_ints = [3]> ()\n m2 = ReduceMean <keepdims = 1> (x, third)\n"
    "d2 = Sub(x, m2)\n s = Mul(d2, d2)",
]
VARIANCES = [
    "v = ReduceMean <keepdims = 1> (s, last)",
    "v3 = ReduceMean <keepdims = 0> (s, last)\n shape = Constant <value_ints = [0, 0, 4, 1]> ()\n"
    "v = Reshape(v3, shape)",
]
DIVISIONS = ["y = Div(d, r)", "i = Reciprocal(r)\n y = Mul(d, i)", "i = Reciprocal(r)\n y = Mul(i, d)"]


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_way_to_write_it(square: str, variance: str, division: str) -> None:
    model = decomposed(square, variance, division)
    assert fuse_layer_norm(model) == 1
    assert operators(model) == {"LayerNormalization": 1}
    np.testing.assert_allclose(run(model, {"x": X})[0], expected(X), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"axis": "2", "variance": "v = ReduceMean <keepdims = 1> (s, last)"},  # over heads
        {"axis": "2, 3"},
        {"square": "s = Mul(d, x)"},
        {"square": "two = Constant <value = float {3.0}> ()\n s = Pow(d, two)"},
        {"division": "y = Div(r, d)"},
        {"division": "y = Mul(d, r)"},
        {"division": "y = Div(x, r)"},
    ],
)
def test_what_is_no_layer_norm_is_left_alone(changes: dict[str, str]) -> None:
    model = decomposed(**changes)
    before = operators(model)
    assert fuse_layer_norm(model) == 0
    assert operators(model) == before


def test_other_types_are_left_alone() -> None:
    assert fuse_layer_norm(decomposed(kind="double")) == 0


def norm_then(rest: str, norm: str = "n = LayerNormalization <axis = -1, epsilon = 1e-5> (x, G)") -> ir.Model:
    weights = {
        "G": np.ones(32, dtype=np.float32),
        "H": random(32, 1)[:, 0],
        "W": random(32),
        "b": random(32, 2)[:, 1],
        "heads": random(4, 32),
        "one": random(1),
    }
    text = rest + norm
    used = {name: w for name, w in weights.items() if f"{name})" in text or f"{name}," in text}
    return model_of("(float[B, S, 4, 32] x) => (float[B, S, 4, 32] y)", f"{norm}\n{rest}", **used)


@pytest.mark.parametrize(
    ("rest", "left", "fired"),
    [
        ("s = Mul(n, W)\n a = Add(s, b)\n y = Exp(a)", {"Exp": 1}, 2),
        ("s = Mul(W, n)\n y = Exp(s)", {"Exp": 1}, 1),
        ("s = Add(b, n)\n y = Exp(s)", {"Exp": 1}, 1),
        ("s = Mul(n, heads)\n y = Exp(s)", {"Mul": 1, "Exp": 1}, 0),  # a weight per head
        ("s = Mul(n, one)\n y = Exp(s)", {"Mul": 1, "Exp": 1}, 0),
        ("s = Mul(n, W)\n y = Mul(s, n)", {"Mul": 2}, 0),  # read twice
        ("s = Mul(n, W)\n a = Add(s, b)\n t = Mul(a, W)\n y = Exp(t)", {"Mul": 1, "Exp": 1}, 2),
        ("s = Add(n, b)\n t = Mul(s, W)\n y = Exp(t)", {"Mul": 1, "Exp": 1}, 1),
    ],
)
def test_weights_are_taken_in(rest: str, left: dict[str, int], fired: int) -> None:
    model = norm_then(rest)
    before = run(model, {"x": X})
    assert fuse_layer_norm(model) == fired
    assert operators(model) == {"LayerNormalization": 1, **left}
    np.testing.assert_allclose(run(model, {"x": X})[0], before[0], rtol=1e-5)


def test_norm_with_a_scale_takes_in_a_bias_only() -> None:
    model = norm_then(
        "s = Mul(n, W)\n y = Exp(s)", "n = LayerNormalization <axis = -1, epsilon = 1e-5> (x, H)"
    )
    assert check_exact(model, fuse_layer_norm, {"x": X}) == 0
    model = norm_then(
        "s = Add(n, b)\n y = Exp(s)", "n = LayerNormalization <axis = -1, epsilon = 1e-5> (x, H)"
    )
    assert fuse_layer_norm(model) == 1


def test_weights_of_a_decomposed_norm() -> None:
    model = decomposed(
        division="n = Div(d, r)\n w = Mul(n, W)\n y = Add(w, b)", W=random(32), b=random(32, 2)[:, 1]
    )
    # The output keeps its own node, so the last Add stays.
    assert fuse_layer_norm(model) == 2
    assert operators(model) == {"LayerNormalization": 1, "Add": 1}
    np.testing.assert_allclose(run(model, {"x": X})[0], expected(X, random(32), random(32, 2)[:, 1]), **CLOSE)
