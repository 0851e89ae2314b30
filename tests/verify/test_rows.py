"""Rows of a result are compared with rows: rounding in one that is almost zero is no error."""

from __future__ import annotations

import numpy as np
import pytest

from xlstm_export.verify.ways import _error

EVERY = np.array([[1.0, 1.0], [1e-3, 0.0], [1.0, -1.0]], np.float32)


def test_a_row_that_cancelled_has_the_rounding_of_a_usual_one() -> None:
    assert _error(EVERY[1:2] + 1e-8, EVERY[1:2], EVERY) < 2e-8
    assert _error(EVERY[:1] + 1e-6, EVERY[:1], EVERY) == pytest.approx(1e-6, rel=0.1)


def test_what_another_row_leaves_is_an_error() -> None:
    assert _error(EVERY[1:2] + 0.01 * EVERY[:1], EVERY[1:2], EVERY) > 5e-3
    assert _error(np.full((1, 2), np.nan), EVERY[1:2], EVERY) == np.inf
    assert _error(EVERY[:1], np.zeros((1, 2)), EVERY) == np.inf
