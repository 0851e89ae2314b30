"""GELU: halved at the end, the same bits; ONNX Runtime makes one kernel of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from textgraph import check_exact, kernels, model_of, operators, random, run

from xlstm_export.trace.passes.canonical_gelu import canonical_gelu

BODY = """
    root = Constant <value = float {1.4142135381698608}> ()
    one = Constant <value = float {1.0}> ()
    half = Constant <value = float {0.5}> ()
    d = Div(x, root)
    e = Erf(d)
    a = Add(e, one)
"""


@pytest.mark.parametrize("last", ["h = Mul(half, a)\n y = Mul(x, h)", "h = Mul(a, half)\n y = Mul(h, x)"])
def test_same_bits_and_one_kernel(last: str, tmp_path: Path) -> None:
    model = model_of("(float[B, 64] x) => (float[B, 64] y)", BODY + last)
    x = {"x": 4 * random(5, 64)}
    assert check_exact(model, canonical_gelu, x) == 1
    assert operators(model) == {"Div": 1, "Erf": 1, "Add": 1, "Mul": 2}
    assert kernels(model, tmp_path / "optimized.onnx") == ["Gelu"]
    # Its own erf: 2.4e-7 seen.
    np.testing.assert_allclose(run(model, x)[0], run(model, x, as_written=True)[0], atol=1e-6)
    assert canonical_gelu(model) == 0


@pytest.mark.parametrize(
    "last",
    [
        "h = Mul(one, a)\n y = Mul(x, h)",  # not halved
        "h = Mul(half, a)\n y = Mul(d, h)",  # of another value
        "h = Mul(half, a)\n p = Mul(x, h)\n y = Add(p, h)",  # the half is read twice
        "h = Mul(half, e)\n y = Mul(x, h)",  # no one
    ],
)
def test_other_products_are_left_alone(last: str) -> None:
    model = model_of("(float[B, 64] x) => (float[B, 64] y)", BODY + last)
    assert canonical_gelu(model) == 0
