"""The PyTorch forms of the two operators against the FP64 recurrence of `oracle.py`.

Float64 results agree to rounding, raw states included. Float32 results are judged in units of what
rounding can do to the sums at hand (`oracle.mlstm_scale`), and the chunkwise form by the step form too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EPS, HELD, HELD_IN_CHUNKS, HOLDING, MLSTM_CASES, SCALE, SLSTM_CASES, single

from xlstm_export.ops import reference as ops
from xlstm_export.specs import CHUNK

RAGGED = (1, 63, 64, 65, 199)

# FP64: a few dozen roundings of 1e-16, times exponents of up to 40 in size.
EXACT = 1e-12
repeatable = settings(max_examples=25, deadline=None, derandomize=True)


def run_mlstm(form: Callable[..., Any], data: oracle.Arrays, dtype: torch.dtype, **options: Any) -> list[Any]:
    """h, C, n, m of a PyTorch form as NumPy arrays of `dtype`."""
    x = {name: torch.tensor(array).to(dtype) for name, array in data.items()}
    options = {"scale": SCALE, "eps": EPS, **options}
    h, state = form(*(x[name] for name in "qkvif"), tuple(x[name] for name in "Cnm"), **options)
    return [tensor.numpy() for tensor in (h, *state)]


def run_slstm(data: oracle.Arrays, dtype: torch.dtype, **options: Any) -> list[Any]:
    """ys, y, c, n, m of the PyTorch form as NumPy arrays of `dtype`."""
    x = {name: torch.tensor(array).to(dtype) for name, array in data.items()}
    ys, state = ops.slstm_sequence(x["x"], x["R"], x["bias"], tuple(x[k] for k in "ycnm"), **options)
    return [tensor.numpy() for tensor in (ys, *state)]


@cache
def mlstm_case(name: str, S: int) -> tuple[oracle.Arrays, tuple[Any, ...], tuple[Any, ...]]:
    """Operands (values that FP32 holds), the recurrence's results, and the scales of their errors."""
    data = oracle.mlstm_operands(len(name), S=S, dtype="float32", **MLSTM_CASES[name])
    operands = data.values()
    return (
        data,
        oracle.mlstm(*operands, scale=SCALE, eps=EPS),
        oracle.mlstm_scale(*operands, scale=SCALE, eps=EPS),
    )


# --- mLSTM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MLSTM_CASES)
@pytest.mark.parametrize("S", RAGGED)
def test_mlstm_in_float64(name: str, S: int) -> None:
    data, reference, bounds = mlstm_case(name, S)
    chunks = (7, CHUNK, 1000) if S > CHUNK else (CHUNK,)
    forms: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (ops.mlstm_sequence, {}),
        (ops.mlstm, {}),
        *((ops.mlstm_chunkwise, {"chunk": chunk}) for chunk in chunks),
    ]
    for form, options in forms:
        result = run_mlstm(form, data, torch.float64, **options)
        h, C, n, m = (
            oracle.worst(ours, theirs, scale)
            for ours, theirs, scale in zip(
                result, reference, (*bounds, np.maximum(1.0, np.abs(reference[3]))), strict=True
            )
        )
        assert max(h, C, n, m) <= EXACT, f"{form.__name__} {options}: h {h:.1e} C {C:.1e} n {n:.1e} m {m:.1e}"


@pytest.mark.parametrize("name", MLSTM_CASES)
def test_mlstm_stabilizer_is_the_recurrence_s_own(name: str) -> None:
    """Not one that merely gives the same outputs: raw states of all implementations are interchangeable."""
    data, reference, _ = mlstm_case(name, 65)
    m = run_mlstm(ops.mlstm_sequence, data, torch.float64)[3]
    # One rounding unit: torch's logsigmoid and NumPy's logaddexp may differ in their last bit.
    np.testing.assert_array_max_ulp(m, reference[3], maxulp=4)


@pytest.mark.parametrize("name", MLSTM_CASES)
@pytest.mark.parametrize("S", RAGGED)
def test_mlstm_in_float32(name: str, S: int) -> None:
    data, reference, bounds = mlstm_case(name, S)
    steps = oracle.mlstm_errors(run_mlstm(ops.mlstm_sequence, data, torch.float32), reference, bounds)
    chunks = oracle.mlstm_errors(run_mlstm(ops.mlstm_chunkwise, data, torch.float32), reference, bounds)
    limit = single(data, "ifm")
    for what, error in steps.items():
        assert error <= limit, f"steps: {what} {error:.1e}"
        # Gates multiply in one form and their logarithms add in the other. Both have the same limit, and
        # where the step form stays far below, the chunkwise form may not lose more than a few units.
        bound = min(limit, 4 * error + limit / 4)
        assert chunks[what] <= bound, f"chunks: {what} {chunks[what]:.1e}, steps {error:.1e}"


@pytest.mark.parametrize("gates", [2.0, 40.0])
def test_mlstm_over_ten_thousand_steps(gates: float) -> None:
    data = oracle.mlstm_operands(5, B=1, S=10_000, H=2, Dk=3, Dv=2, gates=gates, m=None, dtype="float32")
    reference = oracle.mlstm(*data.values(), scale=SCALE, eps=EPS)
    bounds = oracle.mlstm_scale(*data.values(), scale=SCALE, eps=EPS)
    for form in (ops.mlstm_sequence, ops.mlstm_chunkwise):
        errors = oracle.mlstm_errors(run_mlstm(form, data, torch.float64), reference, bounds)
        # The oracle itself rounds m 10⁴ times, without the compensation that ops.mlstm_step has.
        assert max(errors.values()) <= 10_000 * gates * 2**-53, f"{form.__name__}: {errors}"
        errors = oracle.mlstm_errors(run_mlstm(form, data, torch.float32), reference, bounds)
        assert max(errors.values()) <= single(data, "if"), f"{form.__name__}: {errors}"


@pytest.mark.parametrize("forget", HOLDING)
def test_mlstm_holds_its_state_for_ten_thousand_steps(forget: float) -> None:
    data = oracle.mlstm_operands(0, B=1, S=10_000, H=1, Dk=2, Dv=2, m=None, dtype="float32")
    data["C"][:], data["n"][:], data["m"][:] = 1.0, 1.0, 80.0
    data["i"][:], data["f"][:] = -1e4, forget
    reference = oracle.mlstm(*data.values(), scale=SCALE, eps=EPS)
    bounds = oracle.mlstm_scale(*data.values(), scale=SCALE, eps=EPS)
    for form, limit in ((ops.mlstm_sequence, HELD), (ops.mlstm_chunkwise, HELD_IN_CHUNKS)):
        errors = oracle.mlstm_errors(run_mlstm(form, data, torch.float32), reference, bounds)
        assert max(errors["C"], errors["n"]) <= limit, f"{form.__name__}: {errors}"


@pytest.mark.parametrize("m", [-80.0, -20.0, 20.0, 80.0])
def test_mlstm_has_no_nan_where_the_recurrence_has_none(m: float) -> None:
    """A state of one extreme stabilizer, met by gates of the other extreme."""
    for gate in (-1e4, -40.0, 40.0, 1e4):
        data = oracle.mlstm_operands(2, S=70, size=1e4, dtype="float32")
        data["m"][:] = m
        data["i"][:] = gate
        data["f"][:] = -gate
        for form in (ops.mlstm_sequence, ops.mlstm_chunkwise):
            assert all(np.isfinite(x).all() for x in run_mlstm(form, data, torch.float32)), f"gate {gate}"


# --- sLSTM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget_max", [math.inf, 15.0, 0.5])
@pytest.mark.parametrize("name", SLSTM_CASES)
@pytest.mark.parametrize("S", [1, 65])
def test_slstm(name: str, S: int, forget_max: float) -> None:
    data = oracle.slstm_operands(len(name), S=S, dtype="float32", **SLSTM_CASES[name])
    reference = oracle.slstm(*data.values(), forget_max=forget_max)
    limit = single(data, "xm")
    errors = oracle.slstm_errors(run_slstm(data, torch.float64, forget_max=forget_max), reference)
    assert max(errors.values()) <= max(EXACT, limit * 2**-29), f"float64: {errors}"
    errors = oracle.slstm_errors(run_slstm(data, torch.float32, forget_max=forget_max), reference)
    assert max(errors.values()) <= limit, f"float32: {errors}"


def test_slstm_sequence_is_steps() -> None:
    data = oracle.slstm_operands(3, S=9)
    x = {name: torch.tensor(array) for name, array in data.items()}
    state = tuple(x[k] for k in "ycnm")
    ys, end = ops.slstm(x["x"], x["R"], x["bias"], state, forget_max=1.0)
    for t in range(9):
        state = ops.slstm_step(x["x"][:, t], x["R"], x["bias"], state, forget_max=1.0)
        torch.testing.assert_close(ys[:, t], state[0], rtol=0, atol=0)
    for ours, theirs in zip(end, state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_slstm_clamp_changes_the_result() -> None:
    """A clamp that no test data reaches would pass the comparison above without existing."""
    data = oracle.slstm_operands(1, size=40.0)
    free, clamped = run_slstm(data, torch.float64), run_slstm(data, torch.float64, forget_max=0.5)
    assert np.abs(free[0] - clamped[0]).max() > 0.1


def test_slstm_fresh_rule_is_elementwise() -> None:
    """Some units fresh (n = 0), whatever their m says, others in midstream: each follows its own rule."""
    data = oracle.slstm_operands(4, S=5, m=80.0, dtype="float32")
    fresh = np.random.default_rng(0).random(data["n"].shape) < 0.5
    assert fresh.any()
    assert not fresh.all()
    for kind in "cn":
        data[kind][fresh] = 0.0
    reference = oracle.slstm(*data.values())
    result = run_slstm(data, torch.float32)
    errors = oracle.slstm_errors(result, reference)
    assert max(errors.values()) <= single(data, "xm"), errors
    # The m of a fresh unit means nothing.
    data["m"][fresh] *= -1
    for ours, theirs in zip(run_slstm(data, torch.float32), result, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("forget", HOLDING)
def test_slstm_holds_its_state_for_ten_thousand_steps(forget: float) -> None:
    data = oracle.slstm_operands(0, B=1, S=10_000, H=1, D=2, size=0.0, m=None, dtype="float32")
    data["R"][:], data["bias"][:] = 0.0, 0.0
    data["c"][:], data["n"][:], data["m"][:] = 0.5, 1.0, 80.0
    data["x"][:, :, 0], data["x"][:, :, 1] = -1e4, forget
    errors = oracle.slstm_errors(run_slstm(data, torch.float32), oracle.slstm(*data.values()))
    assert max(errors["c"], errors["n"]) <= HELD, errors


def test_slstm_over_ten_thousand_steps() -> None:
    data = oracle.slstm_operands(5, B=1, S=10_000, H=1, D=3, m=None, dtype="float32")
    reference = oracle.slstm(*data.values())
    errors = oracle.slstm_errors(run_slstm(data, torch.float64), reference)
    assert max(errors.values()) <= EXACT, errors
    errors = oracle.slstm_errors(run_slstm(data, torch.float32), reference)
    assert max(errors.values()) <= single(data, "x"), errors


# --- Properties -------------------------------------------------------------------------------------


def pieces_of(S: int, cuts: list[int]) -> list[slice]:
    edges = sorted({0, S, *(cut % S for cut in cuts)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@repeatable
@given(seed=st.integers(0, 2**16), S=st.integers(1, 150), cuts=st.lists(st.integers(0, 1000), max_size=6))
def test_mlstm_in_any_pieces(seed: int, S: int, cuts: list[int]) -> None:
    data = oracle.mlstm_operands(seed, B=1, S=S, gates=5.0)
    whole = run_mlstm(ops.mlstm, data, torch.float64)
    bounds = oracle.mlstm_scale(*data.values(), scale=SCALE, eps=EPS)
    outputs = []
    for piece in pieces_of(S, cuts):
        part = {name: x[:, piece] if name in "qkvif" else x for name, x in data.items()}
        h, *state = run_mlstm(ops.mlstm, part, torch.float64)
        outputs.append(h)
        data.update(zip("Cnm", state, strict=True))
    errors = oracle.mlstm_errors([np.concatenate(outputs, axis=1), *state], whole, bounds)
    assert max(errors.values()) <= EXACT, errors


@repeatable
@given(seed=st.integers(0, 2**16), S=st.integers(1, 30), cuts=st.lists(st.integers(0, 1000), max_size=4))
def test_slstm_in_any_pieces(seed: int, S: int, cuts: list[int]) -> None:
    data = oracle.slstm_operands(seed, B=1, S=S)
    whole = run_slstm(data, torch.float64)
    outputs = []
    for piece in pieces_of(S, cuts):
        ys, *state = run_slstm({**data, "x": data["x"][:, piece]}, torch.float64)
        outputs.append(ys)
        data.update(zip("ycnm", state, strict=True))
    for ours, theirs in zip([np.concatenate(outputs, axis=1), *state], whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)  # the very same steps


@repeatable
@given(seed=st.integers(0, 2**16), S=st.integers(1, 80), row=st.integers(0, 2))
def test_batch_rows_are_independent(seed: int, S: int, row: int) -> None:
    """What the other rows hold, even NaN, does not reach a row."""
    data = oracle.mlstm_operands(seed, B=3, S=S)
    spoilt = {name: array.copy() for name, array in data.items()}
    for array in spoilt.values():
        array[np.arange(3) != row] = np.nan
    for ours, theirs in zip(
        run_mlstm(ops.mlstm, spoilt, torch.float64), run_mlstm(ops.mlstm, data, torch.float64), strict=True
    ):
        np.testing.assert_array_equal(ours[row], theirs[row])
    data = oracle.slstm_operands(seed, B=3, S=min(S, 5))
    spoilt = {name: array.copy() for name, array in data.items()}
    for name in ("x", *"ycnm"):
        spoilt[name][np.arange(3) != row] = np.nan
    for ours, theirs in zip(run_slstm(spoilt, torch.float64), run_slstm(data, torch.float64), strict=True):
        np.testing.assert_array_equal(ours[row], theirs[row])


@repeatable
@given(seed=st.integers(0, 2**16), S=st.integers(1, 80), shift=st.floats(-20, 20))
def test_outputs_do_not_depend_on_the_gauge(seed: int, S: int, shift: float) -> None:
    """(C·eᵃ, n·eᵃ, m − a) is the same mLSTM state as (C, n, m), likewise (c, n, m) of an sLSTM."""
    data = oracle.mlstm_operands(seed, S=S)
    moved = {
        **data,
        "C": data["C"] * math.exp(shift),
        "n": data["n"] * math.exp(shift),
        "m": data["m"] - shift,
    }
    # eps is added in units of the gauge, so that only without it the statement is exact.
    reference = run_mlstm(ops.mlstm, data, torch.float64, eps=0.0)
    bounds = oracle.mlstm_scale(*data.values(), scale=SCALE, eps=0.0)
    errors = oracle.mlstm_errors(run_mlstm(ops.mlstm, moved, torch.float64, eps=0.0), reference, bounds)
    assert max(errors["h"], errors["C"], errors["n"]) <= EXACT, errors

    data = oracle.slstm_operands(seed, S=min(S, 10))
    moved = {
        **data,
        "c": data["c"] * math.exp(shift),
        "n": data["n"] * math.exp(shift),
        "m": data["m"] - shift,
    }
    errors = oracle.slstm_errors(run_slstm(moved, torch.float64), run_slstm(data, torch.float64))
    assert max(errors[kind] for kind in ("ys", "y", "c", "n")) <= EXACT, errors
