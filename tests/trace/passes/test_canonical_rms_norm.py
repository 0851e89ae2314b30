"""RMS norm: however it is written, the form ONNX Runtime knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from textgraph import check_exact, kernels, model_of, operators, random, run

from xlstm_export.trace.passes.canonical_rms_norm import canonical_rms_norm

SQUARES = ["p = Mul(x, x)", "two = Constant <value = float {2.0}> ()\n p = Pow(x, two)"]
DIVISIONS = ["n = Div(x, r)", "i = Reciprocal(r)\n n = Mul(x, i)", "i = Reciprocal(r)\n n = Mul(i, x)"]


def norm(square: str, division: str, rest: str = "y = Mul(n, W)") -> ir.Model:
    return model_of(
        "(float[B, S, 64] x) => (float[B, S, 64] y)",
        f"""
        eps = Constant <value = float {{1e-6}}> ()
        last = Constant <value_ints = [-1]> ()
        {square}
        m = ReduceMean <keepdims = 1> (p, last)
        a = Add(m, eps)
        r = Sqrt(a)
        {division}
        {rest}
        """,
        W=random(64),
    )


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_way_to_write_it(square: str, division: str, tmp_path: Path) -> None:
    model, x = norm(square, division), random(2, 3, 64)
    fired = canonical_rms_norm(model) + canonical_rms_norm(model)
    assert fired == ("Reciprocal" in division) + ("Mul" in square)
    assert operators(model) == {"Pow": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1, "Mul": 1}
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * random(64)
    # A sum of 64 squares, a root, a quotient, a product in FP32: some 2^-23 = 1.2e-7 each.
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, rtol=1e-6)
    assert kernels(model, tmp_path / "optimized.onnx") == ["SimplifiedLayerNormalization"]


def test_the_power_is_exact() -> None:
    assert check_exact(norm(SQUARES[0], DIVISIONS[0]), canonical_rms_norm, {"x": random(2, 3, 64)}) == 1


@pytest.mark.parametrize("rest", ["o = Mul(n, i)\n y = Mul(o, W)", "o = Mul(n, r)\n y = Mul(o, W)"])
def test_root_that_others_read_too_is_left_alone(rest: str) -> None:
    model = norm(SQUARES[1], DIVISIONS[1], rest)
    assert check_exact(model, canonical_rms_norm, {"x": random(2, 3, 64)}) == 0
