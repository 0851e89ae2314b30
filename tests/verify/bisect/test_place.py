"""Where in a value an error begins, and what is said of a check that fails without a wrong value."""

from __future__ import annotations

import numpy as np

from xlstm_export.checks import Check
from xlstm_export.verify.bisect.place import Bisection, BlockError, Place, located, of_check

WRONG = Place(1, "blocks.1", "Add_3", "Add", "add_2", 0.1, 1e-6, "")


def test_the_earliest_position_comes_first() -> None:
    expected = np.ones((3, 8, 4), np.float32)
    found = expected.copy()
    found[0, 6, 1] = found[2, 3, 2] = found[1, 3, 0] = 2
    place = located(WRONG, found, expected, (3, 8), 100)
    assert (place.at, place.row, place.position) == ((1, 3, 0), 1, 103)


def test_positions_first_rows_second() -> None:
    """As nn.LSTM has them."""
    expected = np.zeros((8, 3, 4), np.float32)
    found = expected.copy()
    found[5, 2, 0] = 1
    assert located(WRONG, found, expected, (3, 8), 0).at == (5, 2, 0)
    assert located(WRONG, found, expected, (3, 8), 0).row == 2


def test_values_of_other_shapes() -> None:
    """Heads before positions; a state, which has none; a value of no row."""
    found = np.zeros((3, 2, 8, 5), np.float32)
    expected = found.copy()
    found[1, 0, 7, 0] = np.nan
    place = located(WRONG, found, expected, (3, 8), 0)
    assert (place.row, place.position) == (1, 7)
    state = Place(1, "blocks.1", "Add_3", "Add", "present_1_C", 0.1, 1e-6, "")
    assert located(state, found[:, :, :3], expected[:, :, :3], (3, 3), 0).position is None
    place = located(WRONG, found[0, 0], expected[0, 0] + 1, (3, 4), 0)
    assert (place.at, place.row, place.position) == ((0, 0), None, None)
    assert located(WRONG, found, expected[0], (3, 8), 0) is WRONG


def test_a_check_that_fails_is_a_place_too() -> None:
    near = BlockError(2, "blocks.2", 3e-7, "hidden_2")
    check = Check("prefill 64: y", 7e-6, 5e-6, {"at": (0, 1, 2), "max_abs": 0.1})
    found = Bisection(of_check(check, near), "PyTorch", (near,), failed=check.name)
    assert found.to_json()["block"] == 2
    assert "“prefill 64: y” fails" in found.sentence()
    assert "the errors add up; the largest one is at [0, 1, 2]" in found.sentence()
    rules = Check("rules of TensorRT 10.3 broken", 1.0, 0.0, {"violations": ["node Q_3 has no scale"]})
    assert "node Q_3 has no scale" in of_check(rules, None).why
