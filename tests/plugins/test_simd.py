"""The functions of vectors (common/simd.h) against float64, in units in the last place."""

from __future__ import annotations

import cpu_library
import numpy as np
import pytest

FUNCTIONS = {
    "exp": (0, np.exp, (-104.0, 88.7)),
    "log1p_unit": (1, np.log1p, (0.0, 1.0)),
    "log_sigmoid": (2, lambda x: -np.logaddexp(0.0, -x), (-120.0, 120.0)),
    "sigmoid": (3, lambda x: 1 / (1 + np.exp(-x)), (-87.0, 120.0)),
    "tanh": (4, np.tanh, (-50.0, 50.0)),
}


def apply(variant: str, name: str, x: np.ndarray) -> np.ndarray:
    return cpu_library.apply(variant, FUNCTIONS[name][0], x)


def ulps(found: np.ndarray, exact: np.ndarray) -> float:
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(found - exact) / unit).max())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_within_two_units_in_the_last_place(variant: str, name: str) -> None:
    _, function, (low, high) = FUNCTIONS[name]
    x = np.linspace(low, high, 1 << 18).astype(np.float32)
    small = np.geomspace(1e-40, 1.0, 1 << 14).astype(np.float32)
    x = np.concatenate([x, small, -small if low < 0 else small])
    exact = function(x.astype(np.float64))
    assert ulps(apply(variant, name, x), exact) <= 2.5


@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_ends(variant: str) -> None:
    x = np.array([0.0, -0.0, -1000.0, 1000.0, -np.inf, np.inf] + [0.0] * 10, np.float32)
    np.testing.assert_array_equal(apply(variant, "exp", x)[:6], [1, 1, 0, np.inf, 0, np.inf])
    np.testing.assert_array_equal(apply(variant, "tanh", x)[:6], [0, 0, -1, 1, -1, 1])
    np.testing.assert_array_equal(apply(variant, "sigmoid", x)[:6], [0.5, 0.5, 0, 1, 0, 1])
    assert apply(variant, "log_sigmoid", x)[2] == -1000
