"""The CUDA kernel of `XlstmSlstm`, its own source run on a CPU, against the FP64 recurrence.

What it may err: twice what the recurrence errs in FP32 (`slstm_cases.check`). Results start as NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import oracle
import pytest
from op_cases import HELD, HOLDING, SLSTM_FUNCTIONS, SLSTM_INPUTS, slstm_errors, slstm_inputs, slstm_limit
from slstm_cases import IO, WEIGHTS, check, dequantized, operands, run
from xlstm_export.plugins.native import NativeError, NativeLibrary

TYPES = list(itertools.product(WEIGHTS, IO))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fresh": {"m": None},
    "gates of ±40": {"size": 40.0},
    "m within ±80": {"m": 80.0},
    "zeros": {"size": 0.0, "m": None},
    "denormal": {"size": 1e-39},
    "huge": {"size": 1e4},
}


@pytest.fixture(scope="session")
def library() -> NativeLibrary:
    return emulated.library()


@pytest.fixture
def small_device() -> Iterator[None]:
    """An Orin: 163 KB of shared memory to a CTA."""
    emulated.device(shared_limit=163 << 10, processors=8)
    yield
    emulated.device()


# --- Shapes and types -------------------------------------------------------------------------------


@pytest.mark.parametrize("function", SLSTM_FUNCTIONS)
def test_functions(library: NativeLibrary, function: str) -> None:
    gates = SLSTM_FUNCTIONS[function]
    for name in SLSTM_INPUTS:
        for S in (1, 65):
            data = slstm_inputs(name, S)
            found = run(library, data, in_place=S == 1, **gates)
            errors = slstm_errors(found, oracle.slstm(*data.values(), **gates), gates)
            assert max(errors.values()) <= slstm_limit(data, gates), (name, S, errors)


@pytest.mark.parametrize(("weight", "io"), TYPES)
def test_shapes(library: NativeLibrary, weight: str, io: str) -> None:
    rng = np.random.default_rng(TYPES.index((weight, io)))
    for D in (16, 24, 40, 64, 96):
        B, S, H = (int(rng.integers(1, most + 1)) for most in (9, 70, 4))
        data = operands(D, weight, io, D=D, H=H, B=B, S=max(1, S * 16 // D))
        check(run(library, data, in_place=D % 16 == 0), data)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("D", "B", "S"), [(128, 2, 9), (192, 1, 5), (192, 4, 3), (256, 3, 3), (384, 1, 2), (512, 1, 3)]
)
def test_large_heads(library: NativeLibrary, weight: str, D: int, B: int, S: int) -> None:
    data = operands(D + B, weight, "f16", D=D, H=1, B=B, S=S)
    check(run(library, data), data)


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("D", "B"), [(192, 1), (256, 4), (512, 5)])
def test_large_heads_on_a_small_device(library: NativeLibrary, weight: str, D: int, B: int) -> None:
    data = operands(D + B, weight, "f32", D=D, H=1, B=B, S=3)
    check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("D", "B", "processors"), [(264, 3, 8), (320, 1, 20), (512, 5, 132), (333, 2, 132)])
def test_one_position_of_a_large_head(
    library: NativeLibrary, weight: str, D: int, B: int, processors: int
) -> None:
    # Shared out over CTAs, which must not overwrite what others still read.
    try:
        emulated.device(processors=processors)
        data = operands(D, weight, "f32", D=D, H=2, B=B, S=1)
        apart = run(library, data)
        check(apart, data)
        for ours, theirs in zip(run(library, data, in_place=True), apart, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    finally:
        emulated.device()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("D", [1, 5, 17, 33, 100, 145, 199, 277])
def test_odd_head_sizes(library: NativeLibrary, weight: str, D: int) -> None:
    data = operands(D, weight, "f32", D=D, H=2, B=3, S=3)
    check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_batches(library: NativeLibrary, weight: str) -> None:
    for B in range(1, 10):
        data = operands(B, weight, "bf16", D=32, H=3, B=B, S=4)
        check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_unaligned_tensors(library: NativeLibrary, weight: str) -> None:
    data = operands(0, weight, "f16", D=48, H=2, B=2, S=3)
    aligned = run(library, data)
    for ours, theirs in zip(run(library, data, offset=1), aligned, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", CASES)
def test_extremes(library: NativeLibrary, name: str, weight: str) -> None:
    io = "f32" if name == "denormal" else "f16"  # FP16 has no such numbers
    data = operands(7, weight, io, D=24, H=2, B=3, S=20, **CASES[name])
    check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_fresh_units_among_others(library: NativeLibrary, weight: str) -> None:
    data = operands(8, weight, "f32", D=40, H=2, B=4, S=3, m=80.0)
    for kind in "ycnm":
        data[kind][1] = 0.0  # a fresh row
    for kind in "cn":
        data[kind][2, :, ::3] = 0.0  # fresh units, whose m must not count
    check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_denormal_normalizers(library: NativeLibrary, weight: str) -> None:
    data = operands(9, weight, "f32", D=40, H=1, B=2, S=1)
    data["c"] *= np.float32(1e-38) / data["n"]
    data["n"][:] = 1e-38
    data["c"], data["n"] = data["c"] / 64, data["n"] / 64
    data["m"] += 20.0  # what is inserted is small beside it
    result = run(library, data)
    check(result, data)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_large_outputs_of_the_past(library: NativeLibrary, weight: str) -> None:
    # Where |c / n| is large so is y, and so may be the first step's R·y.
    data = operands(10, weight, "f32", D=40, H=1, B=2, S=4)
    data["c"] *= 3e4
    data["y"] *= 3e4
    data["bias"][1] += 8.0
    if weight == "i8":
        data["R_scale"] /= 1e4
    else:
        data["R"] = (data["R"].astype(np.float32) / 1e4).astype(data["R"].dtype)
    check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_small_outputs_and_large_weights(library: NativeLibrary, weight: str) -> None:
    data = operands(11, weight, "f32", D=40, H=1, B=2, S=10)
    data["bias"][3] -= 14.0  # y of about 1e-6
    data["y"] *= 1e-6
    data["R"][:, :, 3] = 0  # it must remain as small
    if weight == "i8":
        data["R_scale"] *= 1e6
    else:
        data["R"] = (data["R"].astype(np.float32) * 1e6).astype(data["R"].dtype)
    check(run(library, data), data)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("B", [1, 4])
def test_the_product_is_as_exact_as_in_single(library: NativeLibrary, weight: str, B: int) -> None:
    # R·y is most of what the gates get; one position, because over several such weights amplify any rounding.
    for D in (40, 128):
        data = operands(D, weight, "f32", D=D, H=2, B=B, S=1, size=0.1)
        if weight == "i8":
            data["R_scale"] *= 16 * D**0.5
        else:
            data["R"] = (data["R"].astype(np.float32) * 16 * D**0.5).astype(data["R"].dtype)
        check(run(library, data), data)


@pytest.mark.slow
@pytest.mark.parametrize("forget", HOLDING)
def test_holds_its_state(library: NativeLibrary, forget: float) -> None:
    data = operands(0, "f16", "f32", D=16, H=1, B=1, S=10_000, size=0.0, m=None)
    data["R"][:], data["bias"][:] = 0, 0
    data["c"][:], data["n"][:], data["m"][:] = 0.5, 1.0, 80.0
    data["x"][:, :, 0], data["x"][:, :, 1] = -1e4, forget
    errors = oracle.slstm_errors(run(library, data), oracle.slstm(*dequantized(data, np.float64)))
    assert max(errors["c"], errors["n"]) <= HELD, errors


@pytest.mark.parametrize("forget_max", [-1.0, 0.0, 15.0])
def test_forget_max(library: NativeLibrary, forget_max: float) -> None:
    data = operands(12, "f16", "f32", D=24, H=2, B=2, S=12, size=20.0)
    check(run(library, data, forget_max=forget_max), data, forget_max)


def test_what_is_no_number_stays_in_its_row_and_head(library: NativeLibrary) -> None:
    data = operands(13, "f16", "f32", D=24, H=2, B=3, S=4)
    clean = run(library, data)
    data["x"][1, 2, 2, 1, 5] = np.nan
    spoilt = run(library, data)
    assert np.isnan(spoilt[0][1, 3, 1]).all()
    for ours, theirs in zip(spoilt, clean, strict=True):
        ours, theirs = np.array(ours), np.array(theirs)
        ours[1, ..., 1, :] = theirs[1, ..., 1, :] = 0
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("weight", WEIGHTS)
def test_long(library: NativeLibrary, weight: str) -> None:
    data = operands(14, weight, "f32", D=16, H=1, B=1, S=4096)
    check(run(library, data), data)


# --- The same, whatever differs ---------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_pieces_make_the_whole(library: NativeLibrary, weight: str) -> None:
    data = operands(15, weight, "f16", D=40, H=2, B=2, S=11)
    ys, *state = run(library, data)
    outputs = []
    for piece in (slice(0, 1), slice(1, 8), slice(8, 11)):
        y, *end = run(library, {**data, "x": np.ascontiguousarray(data["x"][:, piece])})
        data |= dict(zip("ycnm", end, strict=True))
        outputs.append(y)
    np.testing.assert_array_equal(np.concatenate(outputs, axis=1), ys)
    for ours, theirs in zip(end, state, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_any_order_of_threads(library: NativeLibrary, weight: str) -> None:
    data = operands(16, weight, "f16", D=72, H=1, B=3, S=4)
    first = run(library, data)
    for value in range(10):
        emulated.seed(value)
        for ours, theirs in zip(run(library, data), first, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_any_amount_of_shared_memory(library: NativeLibrary, weight: str) -> None:
    data = operands(17, weight, "f16", D=176, H=1, B=2, S=4)
    results = []
    try:
        for kilobytes in (227, 163, 120, 110):
            emulated.device(shared_limit=kilobytes << 10)
            results.append(run(library, data))
    finally:
        emulated.device()
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_too_little_shared_memory_is_an_error(library: NativeLibrary) -> None:
    data = operands(18, "f32", "f32", D=256, H=1, B=1, S=1)
    try:
        emulated.device(shared_limit=16 << 10)
        with pytest.raises(NativeError, match="error 1"):
            run(library, data)
    finally:
        emulated.device()


# --- Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"D": 513}, "head size D is 513, must be between 1 and 512"),
        ({"S": 0}, "length S is 0"),
        ({"B": 0}, "batch B is 0"),
        ({"H": 0}, "heads H is 0"),
    ],
)
def test_sizes_that_no_kernel_takes(library: NativeLibrary, change: dict[str, int], message: str) -> None:
    data = operands(0, "f32", "f32", **{"B": 1, "S": 1, "H": 1, "D": 16, **change})
    with pytest.raises(NativeError, match=message):
        run(library, data)


def test_integers_as_x(library: NativeLibrary) -> None:
    data = operands(0, "f32", "f32", B=1, S=1, H=1, D=16)
    data["x"] = data["x"].astype(np.int8)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(NativeError, match="x and y have type 3, must be f32, f16 or bf16"),
    ):
        run(library, data)


def test_forget_max_is_a_number(library: NativeLibrary) -> None:
    data = operands(0, "f32", "f32", B=1, S=1, H=1, D=16)
    with pytest.raises(NativeError, match="forget_max is no number"):
        run(library, data, forget_max=np.nan)


# --- Sanitizers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_access_out_of_bounds() -> None:
    done = emulated.run_sanitized(Path(__file__).with_name("slstm_cases.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "28 calls\n"
