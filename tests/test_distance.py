"""Numbers that must see every real difference, and states compared as what they mean."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import oracle
import pytest

from xlstm_export.distance import compare_states, difference, gauge_free
from xlstm_export.specs import StateSpec

BATCH, HEADS, DIM = 2, 3, 4
STATES = (
    StateSpec(0, "conv", (3, 8)),
    StateSpec(0, "C", (HEADS, DIM, DIM)),
    StateSpec(0, "n", (HEADS, DIM)),
    StateSpec(0, "m", (HEADS,)),
    StateSpec(1, "y", (HEADS, DIM)),
    StateSpec(1, "c", (HEADS, DIM)),
    StateSpec(1, "n", (HEADS, DIM)),
    StateSpec(1, "m", (HEADS, DIM)),
)
Arrays = dict[str, np.ndarray]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def state(rng: np.random.Generator) -> Arrays:
    return {s.past: rng.standard_normal((BATCH, *s.shape)) for s in STATES}


def shifted(state: Arrays, by: Any = None, seed: int = 1) -> Arrays:
    """The same state with every stabilizer moved by `by`, or by a random amount of its own."""
    rng = np.random.default_rng(seed)
    result = dict(state)
    for block in (0, 1):
        m = state[f"past_{block}_m"]
        a = rng.uniform(-20, 20, m.shape) if by is None else np.full(m.shape, float(by))
        result[f"past_{block}_m"] = m - a
        for kind in ("C", "n", "c"):
            if f"past_{block}_{kind}" in state:
                value = state[f"past_{block}_{kind}"]
                result[f"past_{block}_{kind}"] = value * np.exp(
                    a.reshape(a.shape + (1,) * (value.ndim - a.ndim))
                )
    return result


def worst(found: Arrays, expected: Arrays) -> float:
    return max(d.relative_l2 for d in compare_states(found, expected, STATES).values())


# --- difference -----------------------------------------------------------------------------------------


def test_equal_tensors(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4))
    result = difference(x, x)
    assert (result.relative_l2, result.norm_ratio, result.max_abs) == (0.0, 1.0, 0.0)
    assert result.cosine == pytest.approx(1.0, abs=1e-15)


def test_numbers_by_hand() -> None:
    result = difference(np.array([[3.0, 0.0], [0.0, 5.0]]), np.array([[3.0, 0.0], [4.0, 0.0]]))
    assert result.relative_l2 == pytest.approx(math.sqrt(41) / 5)
    assert result.cosine == pytest.approx(9 / (math.sqrt(34) * 5))
    assert result.norm_ratio == pytest.approx(math.sqrt(34) / 5)
    assert result.max_abs == 5.0
    assert result.at == (1, 1)


def test_cosine_is_blind_to_scale_and_the_norm_ratio_is_not(rng: np.random.Generator) -> None:
    x = rng.standard_normal(100)
    result = difference(1.01 * x, x)
    assert result.cosine == pytest.approx(1.0, abs=1e-12)
    assert result.norm_ratio == pytest.approx(1.01)
    assert result.relative_l2 == pytest.approx(0.01)


def test_norm_ratio_is_blind_to_direction_and_cosine_is_not(rng: np.random.Generator) -> None:
    x = rng.standard_normal(100)
    result = difference(-x, x)
    assert result.norm_ratio == pytest.approx(1.0)
    assert result.cosine == pytest.approx(-1.0)
    assert result.relative_l2 == pytest.approx(2.0)


def test_float32_is_compared_in_float64() -> None:
    """Near 1e30 the squares of the norms overflow float32."""
    x = np.full(1000, 1e30, dtype=np.float32)
    result = difference(x * np.float32(1.5), x)
    assert result.relative_l2 == pytest.approx(0.5)
    assert result.norm_ratio == pytest.approx(1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_candidate_that_is_not_finite(value: float) -> None:
    candidate = np.zeros((2, 3))
    candidate[1, 2] = value
    result = difference(candidate, np.zeros((2, 3)))
    assert result.relative_l2 == result.max_abs == result.norm_ratio == math.inf
    assert result.cosine == 0.0
    assert result.at == (1, 2)


def test_first_index_that_is_not_finite_is_reported() -> None:
    candidate = np.array([[0.0, 9.0], [math.nan, math.inf]])
    assert difference(candidate, np.zeros((2, 2))).at == (1, 0)


@pytest.mark.parametrize("constant", [-1e3, -1e4, -1e9, -math.inf])
def test_error_beside_a_mask_constant_is_seen(rng: np.random.Generator, constant: float) -> None:
    reference = rng.standard_normal((2, 8, 5)) * 0.1
    candidate = reference * 1.01
    reference[:, 5:], candidate[:, 5:] = constant, constant
    found = difference(candidate, reference)
    assert found.relative_l2 == pytest.approx(0.01)
    assert found.norm_ratio == pytest.approx(1.01)
    assert found.at[1] < 5


def test_most_negative_number_is_a_mask_in_every_type(rng: np.random.Generator) -> None:
    reference = rng.standard_normal((2, 8))
    candidate = reference.astype(np.float32)
    reference[0, 0], candidate[0, 0] = np.finfo(np.float64).min, np.finfo(np.float32).min
    assert difference(candidate, reference).relative_l2 < 1e-7


@pytest.mark.parametrize("wrong", [0.0, 1e4, math.inf, math.nan])
def test_missing_mask_constant_is_a_difference(rng: np.random.Generator, wrong: float) -> None:
    for constant in (-1e4, -math.inf):
        reference = rng.standard_normal((2, 8))
        reference[:, 5:] = constant
        candidate = reference.copy()
        candidate[1, 6] = wrong
        assert difference(candidate, reference).relative_l2 > 1e-3


def test_large_values_that_are_no_constant_stay_in_the_norm(rng: np.random.Generator) -> None:
    reference = rng.standard_normal((2, 8))
    reference[0, 0] = 1e6
    candidate = reference + 1e-3
    assert difference(candidate, reference).relative_l2 < 1e-8


def test_rounding_beside_a_large_output_is_no_error() -> None:
    reference, candidate = np.array([5e3, 1e-17, 0.0]), np.array([5e3, 0.0, 0.0])
    assert difference(candidate, reference).relative_l2 < 1e-12


def test_broken_reference_never_passes() -> None:
    result = difference(np.ones(3), np.array([1.0, math.nan, 1.0]))
    assert not result.relative_l2 <= 1e9


def test_zero_reference() -> None:
    nothing = difference(np.zeros(3), np.zeros(3))
    assert (nothing.relative_l2, nothing.cosine, nothing.norm_ratio) == (0.0, 1.0, 1.0)
    something = difference(np.array([0.0, 1e-30]), np.zeros(2))
    assert something.relative_l2 == something.norm_ratio == math.inf
    assert (something.max_abs, something.at) == (1e-30, (1,))


def test_zero_candidate() -> None:
    result = difference(np.zeros(2), np.array([3.0, 4.0]))
    assert (result.relative_l2, result.cosine, result.norm_ratio) == (1.0, 0.0, 0.0)
    assert (result.max_abs, result.at) == (4.0, (1,))


def test_scalars_have_an_index_too() -> None:
    assert difference(np.float64(2.0), np.float64(1.0)).at == ()


def test_shapes_must_agree() -> None:
    """No broadcasting: (3,) against (1, 3) is a bug of the caller."""
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(3,\)"):
        difference(np.zeros((1, 3)), np.zeros(3))


# --- States ---------------------------------------------------------------------------------------------


def test_a_moved_stabilizer_is_no_difference(state: Arrays) -> None:
    moved = shifted(state)
    assert worst(moved, state) < 1e-13
    assert worst(state, moved) < 1e-13
    # Raw tensors differ wildly, so the test above says something.
    assert difference(moved["past_0_C"], state["past_0_C"]).relative_l2 > 10


@pytest.mark.parametrize("by", [-300.0, -30.0, 30.0, 300.0])
def test_extreme_shifts(state: Arrays, by: float) -> None:
    assert worst(shifted(state, by), state) < 1e-12


def test_results_are_in_the_gauge_of_the_reference(state: Arrays) -> None:
    moved = gauge_free(shifted(state), state, STATES)
    assert sorted(moved) == sorted(s.past for s in STATES if s.kind != "m")
    for name, value in moved.items():
        np.testing.assert_allclose(value, state[name], rtol=1e-12)


@pytest.mark.parametrize("kind", ["C", "n", "c"])
@pytest.mark.parametrize("factor", [1.01, math.e, -1.0, 0.0])
def test_wrong_scale_of_one_tensor_is_a_difference(state: Arrays, kind: str, factor: float) -> None:
    """C and n share their gauge: scaling one of them, or both without m, changes the state."""
    block = 1 if kind == "c" else 0
    wrong = dict(state)
    wrong[f"past_{block}_{kind}"] = factor * state[f"past_{block}_{kind}"]
    found = compare_states(shifted(wrong), state, STATES)
    assert found[f"past_{block}_{kind}"].relative_l2 == pytest.approx(abs(factor - 1))
    assert max(d.relative_l2 for name, d in found.items() if name != f"past_{block}_{kind}") < 1e-13


def test_wrong_stabilizer_is_a_difference(state: Arrays) -> None:
    wrong = {**state, "past_0_m": state["past_0_m"] + 0.01}
    found = compare_states(wrong, state, STATES)
    assert found["past_0_C"].relative_l2 == pytest.approx(math.expm1(0.01))
    assert found["past_0_n"].relative_l2 == pytest.approx(math.expm1(0.01))
    assert found["past_1_c"].relative_l2 == 0.0


def test_shift_the_wrong_way_is_a_difference(state: Arrays) -> None:
    """(C·eᵃ, n·eᵃ, m + a) is e²ᵃ times the state."""
    moved = shifted(state, 1.0)
    moved["past_0_m"] = state["past_0_m"] + 1.0
    assert worst(moved, state) == pytest.approx(math.exp(2) - 1)


@pytest.mark.parametrize("name", ["past_1_y", "past_0_conv"])
def test_tensors_without_a_gauge_are_compared_as_they_are(state: Arrays, name: str) -> None:
    wrong = {**state, name: 1.5 * state[name]}
    assert compare_states(wrong, state, STATES)[name].relative_l2 == pytest.approx(0.5)


def test_each_head_has_its_own_gauge(state: Arrays) -> None:
    """Stabilizers exchanged between two heads or two rows are noticed."""
    for axis in (0, 1):
        wrong = {**state, "past_0_m": np.flip(state["past_0_m"], axis).copy()}
        assert compare_states(wrong, state, STATES)["past_0_C"].relative_l2 > 0.1


def test_zero_states(state: Arrays) -> None:
    """Nothing times any scale is nothing: m means nothing then, however far out it is."""
    zero = {name: np.zeros_like(value) for name, value in state.items()}
    far = {name: np.full_like(value, 1e4 if name.endswith("m") else 0.0) for name, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert worst(zero, zero) == worst(far, zero) == worst(zero, far) == 0.0
        assert worst(state, zero) == math.inf
        assert worst(zero, state) == 1.0


def test_shift_beyond_every_range_is_a_difference(state: Arrays) -> None:
    wrong = {**state, "past_0_m": state["past_0_m"] + 1e4}
    assert compare_states(wrong, state, STATES)["past_0_C"].relative_l2 == math.inf
    wrong = {**state, "past_0_m": state["past_0_m"] - 1e4}
    assert compare_states(wrong, state, STATES)["past_0_C"].relative_l2 == 1.0


@pytest.mark.parametrize("name", ["past_0_C", "past_0_m", "past_1_m", "past_1_y"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite(state: Arrays, name: str, value: float) -> None:
    wrong = {**state, name: state[name].copy()}
    wrong[name][0, 0] = value
    assert worst(wrong, state) == math.inf


def test_nan_stabilizer_of_an_empty_state_is_a_difference(state: Arrays) -> None:
    """The rule that zero stays zero in every gauge must not hide it: the next step would be NaN."""
    zero = {name: np.zeros_like(value) for name, value in state.items()}
    wrong = {**zero, "past_0_m": np.full_like(zero["past_0_m"], math.nan)}
    assert worst(wrong, zero) == math.inf


def test_recurrences_with_another_stabilizer_end_in_the_same_state(rng: np.random.Generator) -> None:
    """Not only by construction: started in another gauge, an mLSTM stays in the same state."""
    q, k, v = rng.standard_normal((3, BATCH, 6, HEADS, DIM))
    i, f = rng.standard_normal((2, BATCH, 6, HEADS))
    C, n, m = (rng.standard_normal((BATCH, *s.shape)) for s in STATES[1:4])
    a = 3.0
    ends = []
    for start in ((C, n, m), (C * np.exp(a), n * np.exp(a), m - a)):
        h, *end = oracle.mlstm(q, k, v, i, f, *start, scale=0.5, eps=0.0)
        ends.append((h, dict(zip(("past_0_C", "past_0_n", "past_0_m"), end, strict=True))))
    (h, expected), (moved_h, found) = ends
    np.testing.assert_allclose(moved_h, h, rtol=1e-10)
    assert max(d.relative_l2 for d in compare_states(found, expected, STATES[1:4]).values()) < 1e-12


def test_a_small_last_result_of_a_cell_counts_absolutely() -> None:
    """Output gates that are shut: 1e-8 in float64, exactly 0 in a runtime. NaN stays an infinite error."""
    states = (StateSpec(0, "y", (4,)),)
    reference = {"past_0_y": np.full((2, 4), 1e-8)}
    (far,) = compare_states({"past_0_y": np.zeros((2, 4))}, reference, states).values()
    assert far.relative_l2 == pytest.approx(1e-6)
    (off,) = compare_states({"past_0_y": np.full((2, 4), 2e-3)}, reference, states).values()
    assert off.relative_l2 == pytest.approx(0.2, rel=1e-4)
    (broken,) = compare_states({"past_0_y": np.full((2, 4), np.nan)}, reference, states).values()
    assert broken.relative_l2 == np.inf
    usual = {"past_0_y": np.full((2, 4), 0.5)}
    (same,) = compare_states({"past_0_y": np.full((2, 4), 0.505)}, usual, states).values()
    assert same.relative_l2 == pytest.approx(0.01)
