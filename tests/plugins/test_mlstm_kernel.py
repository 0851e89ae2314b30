"""The CUDA kernels of `XlstmMlstm`, their own source run on a CPU, against the FP64 recurrence.

What a kernel may err: twice what the exact results err when rounded to the types of the call, plus what the
FP32 gates of every implementation cost (`test_ops.single`). Results and scratch memory start as NaN.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import emulated
import ml_dtypes
import numpy as np
import oracle
import pytest
from op_cases import (
    HELD,
    HELD_IN_CHUNKS,
    HOLDING,
    MLSTM_FUNCTIONS,
    MLSTM_INPUTS,
    mlstm_inputs,
    mlstm_limit,
    single,
)
from typing_extensions import Unpack
from xlstm_export.plugins.native import MlstmCall, NativeError, NativeLibrary, mlstm_call

if TYPE_CHECKING:
    from xlstm_export.ops.reference import MlstmGates

SCALE, EPS = 0.3, 1e-6
TYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
CODES = {"f32": 0, "f16": 1, "bf16": 2}
# (Dk, Dv) that leave parts of tiles, of 16-byte units, or of both unused.
ODD = [(16, 24), (24, 16), (40, 64), (17, 33), (96, 40)]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fresh": {"m": None},
    "gates of ±40": {"gates": 40.0},
    "no gates": {"gates": 0.0},
    "m within ±80": {"m": 80.0},
    "zeros": {"size": 0.0},
    "tiny": {"size": 1e-6},  # FP16 denormals
    "denormal": {"size": 1e-20},  # products are FP32 denormals
    "large": {"size": 1e3},
}
# What a GPU tells: bytes of shared memory, processors. The first two have many small segments and strips.
DEVICES = [(99 << 10, 1), (163 << 10, 8), (227 << 10, 132)]


def operands(seed: int, io: str, state: str, **options: Any) -> oracle.Arrays:
    """Random operands that the types of the call hold exactly."""
    data = oracle.mlstm_operands(seed, dtype="float32", **options)
    types = dict.fromkeys("qkv", TYPES[io]) | {"C": TYPES[state]}
    return {name: x.astype(types.get(name, np.float32)) for name, x in data.items()}


def run(
    library: NativeLibrary,
    data: oracle.Arrays,
    *,
    in_place: bool = False,
    offset: int = 0,
    **gates: Unpack[MlstmGates],
) -> tuple[np.ndarray, ...]:
    """h, C, n, m as float64. With an `offset` in elements, no tensor is aligned to 16 bytes."""

    def placed(array: np.ndarray) -> np.ndarray:
        buffer = np.zeros(array.nbytes + (offset + 1) * 16, dtype=np.uint8)
        start = -buffer.ctypes.data % 16 + offset * array.itemsize
        target = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        target[...] = array
        return target

    tensors = {name: placed(data[name]) for name in "qkvif"}
    tensors |= {f"{kind}0": placed(data[kind]) for kind in oracle.MLSTM_STATE}
    tensors["h"] = placed(np.full_like(data["v"], np.nan))
    for kind in oracle.MLSTM_STATE:
        tensors[kind] = tensors[f"{kind}0"] if in_place else placed(np.full_like(data[kind], np.nan))
    size = library.mlstm_workspace(mlstm_call(tensors, scale=SCALE, eps=EPS, **gates))
    # Exactly as large as asked for, so that AddressSanitizer sees what lies behind it.
    scratch = np.full((size + 256) // 4, np.nan, dtype=np.float32)
    start = -scratch.ctypes.data % 256 // 4
    library.mlstm(tensors, scale=SCALE, eps=EPS, workspace=scratch[start : start + size // 4], **gates)
    if not in_place:
        for kind in oracle.MLSTM_STATE:
            np.testing.assert_array_equal(tensors[f"{kind}0"], data[kind])
    return tuple(tensors[name].astype(np.float64) for name in ("h", *oracle.MLSTM_STATE))


def rounded(reference: tuple[np.ndarray, ...], data: oracle.Arrays) -> tuple[np.ndarray, ...]:
    """The exact results in the types of the call."""
    h, C, n, m = reference
    with np.errstate(over="ignore", under="ignore"):
        kept = h.astype(data["v"].dtype), C.astype(data["C"].dtype), n.astype(np.float32), m
    return tuple(x.astype(np.float64) for x in kept)


def judged(result: tuple[np.ndarray, ...], data: oracle.Arrays) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of a result, and of the correctly rounded one."""
    options = {"scale": SCALE, "eps": EPS}
    reference, bounds = oracle.mlstm(*data.values(), **options), oracle.mlstm_scale(*data.values(), **options)
    ideal = oracle.mlstm_errors(rounded(reference, data), reference, bounds)
    return oracle.mlstm_errors(result, reference, bounds), ideal


def check(result: tuple[np.ndarray, ...], data: oracle.Arrays) -> None:
    errors, ideal = judged(result, data)
    for what, error in errors.items():
        limit = 2 * ideal[what] + single(data, "ifm")
        assert error <= limit, f"{what}: {error:.2e}, may be {limit:.2e}; correctly rounded {ideal[what]:.2e}"


def positions(data: oracle.Arrays, part: slice) -> oracle.Arrays:
    return {name: x[:, part] if name in "qkvif" else x for name, x in data.items()}


def in_pieces(library: NativeLibrary, data: oracle.Arrays, cuts: list[int]) -> tuple[np.ndarray, ...]:
    """`run` piece by piece, the state carried in the types of the call."""
    outputs, state = [], {name: data[name] for name in oracle.MLSTM_STATE}
    for start, end in zip([0, *cuts], [*cuts, data["q"].shape[1]], strict=True):
        h, *new = run(library, {**positions(data, slice(start, end)), **state})
        state = {name: x.astype(data[name].dtype) for name, x in zip(oracle.MLSTM_STATE, new, strict=True)}
        outputs.append(h)
    return np.concatenate(outputs, axis=1), *(x.astype(np.float64) for x in state.values())


@pytest.fixture(scope="session")
def library() -> NativeLibrary:
    return emulated.library()


@pytest.fixture(params=DEVICES, ids=lambda device: f"{device[0] >> 10} KB x {device[1]}")
def device(library: NativeLibrary, request: pytest.FixtureRequest) -> Iterator[None]:
    """One after another of the machines that a launch may find."""
    shared_limit, processors = request.param
    emulated.device(shared_limit=shared_limit, processors=processors)
    yield
    emulated.device()


# --- One position -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", TYPES)
@pytest.mark.parametrize("io", TYPES)
def test_step(library: NativeLibrary, io: str, state: str) -> None:
    for seed, (Dk, Dv) in enumerate(ODD):
        data = operands(seed, io, state, B=1 + seed % 3, S=1, H=1 + seed % 4, Dk=Dk, Dv=Dv)
        check(run(library, data, in_place=seed % 2 == 0), data)
        check(run(library, data, offset=1), data)


@pytest.mark.parametrize("io", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_step_extremes(library: NativeLibrary, name: str, io: str) -> None:
    data = operands(7, io, "f32", B=2, S=1, H=2, Dk=24, Dv=40, **CASES[name])
    check(run(library, data), data)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("Dk", "Dv"), [(128, 160), (256, 512), (384, 384), (512, 96)])
def test_step_of_large_heads(library: NativeLibrary, Dk: int, Dv: int) -> None:
    for state in ("f32", "bf16"):
        data = operands(Dk, "bf16", state, B=1, S=1, H=2, Dk=Dk, Dv=Dv)
        whole = run(library, data)
        check(whole, data)
        # In place, n and m may not be written before every strip has read them.
        for ours, theirs in zip(run(library, data, in_place=True), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# --- Sequences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", TYPES)
@pytest.mark.parametrize("io", TYPES)
@pytest.mark.parametrize("S", [2, 63, 64, 65, 200])
def test_sequence(library: NativeLibrary, S: int, io: str, state: str) -> None:
    Dk, Dv = ODD[(S + len(io) + 2 * len(state)) % len(ODD)]
    data = operands(S, io, state, B=1 + S % 2, S=S, H=1 + S % 3, Dk=Dk, Dv=Dv)
    check(run(library, data, in_place=S % 2 == 0), data)


@pytest.mark.parametrize("io", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_sequence_extremes(library: NativeLibrary, name: str, io: str) -> None:
    data = operands(9, io, "f32", B=1, S=150, H=2, Dk=24, Dv=40, **CASES[name])
    check(run(library, data), data)


@pytest.mark.parametrize(
    ("Dk", "Dv", "io"), [(128, 256, "bf16"), (160, 96, "f16"), (64, 384, "f32"), (512, 40, "bf16")]
)
def test_sequence_of_large_heads(library: NativeLibrary, Dk: int, Dv: int, io: str) -> None:
    data = operands(Dk, io, "f32", B=1, S=130, H=1, Dk=Dk, Dv=Dv)
    check(run(library, data), data)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("io", ["f16", "bf16"])
def test_sequence_in_segments(library: NativeLibrary, io: str) -> None:
    """On a small GPU the state goes from segment to segment through scratch memory."""
    data = operands(5, io, "f32", B=2, S=530, H=4, Dk=16, Dv=72, gates=1.0)
    check(run(library, data, in_place=True), data)


@pytest.mark.parametrize("io", TYPES)
def test_unaligned_tensors(library: NativeLibrary, io: str) -> None:
    data = operands(3, io, "f16", B=1, S=70, H=2, Dk=32, Dv=48)
    for ours, theirs in zip(run(library, data, offset=1), run(library, data), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("io", TYPES)
def test_sequence_is_its_pieces(library: NativeLibrary, io: str) -> None:
    """Steps, ragged pieces and the whole agree, with the raw state carried from one to the next."""
    data = operands(6, io, "f32", B=1, S=67, H=2, Dk=24, Dv=16, gates=3.0)
    for cuts in (list(range(1, 67)), [1, 64, 65], [20]):
        check(in_pieces(library, data, cuts), data)


@pytest.mark.parametrize("name", ["plain", "gates of ±40", "m within ±80"])
def test_stabilizer_is_the_recurrence_s_own(library: NativeLibrary, name: str) -> None:
    data = operands(4, "f32", "f32", B=1, S=150, H=3, Dk=16, Dv=16, **CASES[name])
    m = oracle.mlstm(*data.values(), scale=SCALE, eps=EPS)[3]
    np.testing.assert_allclose(run(library, data)[3], m, rtol=4 * 2**-23, atol=1e-6)


@pytest.mark.parametrize("S", [1, 70])
def test_rows_are_independent(library: NativeLibrary, S: int) -> None:
    """What the other rows and heads hold, even NaN, does not reach a head."""
    data = operands(8, "bf16", "f32", B=2, S=S, H=3, Dk=24, Dv=40)
    spoilt = {name: array.copy() for name, array in data.items()}
    for name, array in spoilt.items():
        heads = np.moveaxis(array, 2, 1) if name in "qkvif" else array
        keep = heads[1, 2].copy()
        heads[:] = np.nan
        heads[1, 2] = keep
    (h, *state), (h_2, *state_2) = run(library, data), run(library, spoilt)
    np.testing.assert_array_equal(h[1, :, 2], h_2[1, :, 2])
    for ours, theirs in zip(state, state_2, strict=True):
        np.testing.assert_array_equal(ours[1, 2], theirs[1, 2])


@pytest.mark.parametrize("io", ["f32", "bf16"])
@pytest.mark.parametrize("m", [-80.0, 80.0])
def test_no_nan_where_the_recurrence_has_none(library: NativeLibrary, m: float, io: str) -> None:
    """A state of one extreme stabilizer, met by gates of the other extreme."""
    for gate in (-1e4, -40.0, 40.0, 1e4):
        data = operands(2, io, "f32", B=1, S=70, H=1, Dk=16, Dv=16, size=1e3)
        data["m"][:] = m
        data["i"][:], data["f"][:] = gate, -gate
        assert all(np.isfinite(x).all() for x in run(library, data)), f"gate {gate}"
        assert all(np.isfinite(x).all() for x in run(library, positions(data, slice(1)))), (
            f"step, gate {gate}"
        )


@pytest.mark.parametrize("function", MLSTM_FUNCTIONS)
def test_functions(library: NativeLibrary, function: str) -> None:
    gates = MLSTM_FUNCTIONS[function]
    options = {"scale": SCALE, "eps": EPS, **gates}
    for name in MLSTM_INPUTS:
        for S in (1, 70):
            data = mlstm_inputs(name, S, gates)
            exact, bounds = (f(*data.values(), **options) for f in (oracle.mlstm, oracle.mlstm_scale))
            errors = oracle.mlstm_errors(run(library, data, in_place=S == 1, **gates), exact, bounds)
            assert max(errors.values()) <= mlstm_limit(data, gates), (name, S, errors)


def test_gates_that_are_shut(library: NativeLibrary) -> None:
    """Pre-activations of minus infinity: nothing is inserted, or nothing kept."""
    data = operands(2, "f32", "f32", B=1, S=100, H=1, Dk=16, Dv=16)
    data["i"][:, ::3] = -np.inf
    data["f"][:, 1::6] = -np.inf  # never where nothing is inserted either: 0 = exp(-inf) has no logarithm
    options = {"scale": SCALE, "eps": EPS}
    with np.errstate(divide="ignore"):
        reference = oracle.mlstm(*data.values(), **options)
        bounds = oracle.mlstm_scale(*data.values(), **options)
    errors = oracle.mlstm_errors(run(library, data), reference, bounds)
    assert max(errors.values()) <= 64 * 2**-24, errors


def test_threads_in_any_order(library: NativeLibrary) -> None:
    """No result depends on the order in which threads run: no barrier is missing."""
    for S, io in ((1, "f16"), (150, "f32"), (150, "f16"), (150, "bf16")):
        data = operands(1, io, "f32", B=1, S=S, H=2, Dk=72, Dv=136)
        results = []
        for seed in range(3):
            emulated.seed(seed)
            results.append(run(library, data, in_place=True))
        for other in results[1:]:
            for ours, theirs in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(ours, theirs)


# --- Long streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", HOLDING[:1])
def test_state_holds_for_thousands_of_positions(library: NativeLibrary, forget: float) -> None:
    """See `test_ops.HOLDING`: the rounding of m must not add up."""
    data = operands(0, "f32", "f32", B=1, S=3000, H=1, Dk=2, Dv=2, m=None)
    data["C"][:], data["n"][:], data["m"][:] = 1.0, 1.0, 80.0
    data["i"][:], data["f"][:] = -1e4, forget
    errors, _ = judged(run(library, data), data)
    assert max(errors["C"], errors["n"]) <= HELD_IN_CHUNKS, errors


@pytest.mark.slow
@pytest.mark.parametrize("gates", [2.0, 40.0])
def test_64k_positions(library: NativeLibrary, gates: float) -> None:
    data = operands(5, "bf16", "f32", B=1, S=65_536, H=1, Dk=3, Dv=2, gates=gates, m=None)
    check(run(library, data), data)


@pytest.mark.slow
@pytest.mark.parametrize("forget", HOLDING)
def test_step_holds_its_state_for_ten_thousand_positions(library: NativeLibrary, forget: float) -> None:
    data = operands(0, "f32", "f32", B=1, S=1, H=1, Dk=2, Dv=2, m=None)
    data["C"][:], data["n"][:], data["m"][:] = 1.0, 1.0, 80.0
    data["i"][:], data["f"][:] = -1e4, forget
    whole = {name: np.repeat(x, 10_000, axis=1) if name in "qkvif" else x for name, x in data.items()}
    errors, _ = judged(in_pieces(library, whole, list(range(1, 10_000))), whole)
    assert max(errors["C"], errors["n"]) <= HELD, errors


# --- The interface ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch B is 0"),
        ({"length": -1}, "length S is -1"),
        ({"heads": 5000}, "heads H is 5000"),
        ({"batch": 1 << 20, "heads": 4}, r"B \* H is 4194304"),
        ({"dk": 513}, "key size Dk is 513, must be 1 to 512"),
        ({"dv": 0}, "value size Dv is 0, must be 1 to 512"),
        ({"io": 3}, "q, k, v and h have type 3"),
        ({"state": -1}, "C has type -1"),
    ],
)
def test_refusals(library: NativeLibrary, change: dict[str, int], message: str) -> None:
    fields = {"batch": 1, "length": 1, "heads": 1, "dk": 16, "dv": 16, "io": 0, "state": 0, **change}
    with pytest.raises(NativeError, match=message):
        library._run("mlstm", MlstmCall(**fields), None, None)


@pytest.mark.parametrize(("kb", "io", "fits"), [(99, "f32", False), (163, "f32", True), (99, "bf16", True)])
def test_a_gpu_with_too_little_shared_memory(
    library: NativeLibrary, request: pytest.FixtureRequest, kb: int, io: str, fits: bool
) -> None:
    """Refused when an engine is built, not when it runs. A step needs little, on any GPU."""
    request.addfinalizer(emulated.device)
    emulated.device(shared_limit=kb << 10)
    for length in (1, 2):
        data = operands(0, io, "f32", B=1, S=length, H=1, Dk=256, Dv=64)
        if length == 1 or fits:
            check(run(library, data), data)
            continue
        with pytest.raises(
            NativeError, match=r"FP32 needs \d+ KB of shared memory .* has 99 KB; compute q, k"
        ):
            run(library, data)


def test_step_needs_no_scratch_memory(library: NativeLibrary) -> None:
    shape = {"batch": 1, "heads": 2, "dk": 16, "dv": 16, "io": CODES["bf16"], "state": CODES["f32"]}
    assert library.mlstm_workspace(MlstmCall(length=1, **shape)) == 0
    assert library.mlstm_workspace(MlstmCall(length=2, **shape)) > 0


def test_scratch_memory_is_bounded(library: NativeLibrary) -> None:
    """The states of a long sequence's chunks do not all lie in memory at once."""
    emulated.device(processors=132)
    shape = {"batch": 1, "heads": 8, "dk": 256, "dv": 512, "io": CODES["bf16"], "state": CODES["f32"]}
    size = library.mlstm_workspace(MlstmCall(length=1 << 17, **shape))
    emulated.device()
    assert size < (128 << 20), size


def other_power_mode(library: NativeLibrary, *, sanitize: bool = False) -> None:
    """Scratch memory of one processor, run with two: a Jetson changes them after an engine was built."""
    data = operands(3, "bf16", "f32", B=1, S=400, H=4, Dk=16, Dv=16)
    tensors = {name: data[name].copy() for name in (*"qkvif", *oracle.MLSTM_STATE)}
    tensors |= {f"{kind}0": data[kind] for kind in oracle.MLSTM_STATE} | {
        "h": np.full_like(data["v"], np.nan)
    }
    call = mlstm_call(tensors, scale=SCALE, eps=EPS)
    sizes = []
    for processors in (1, 2):
        emulated.device(processors=processors, sanitize=sanitize)
        sizes.append(library.mlstm_workspace(call))
    assert sizes[0] < sizes[1]
    call.processors = 1
    assert library.mlstm_workspace(call) == sizes[0]
    scratch = np.full((sizes[0] + 256) // 4, np.nan, dtype=np.float32)
    start = -scratch.ctypes.data % 256 // 4
    library._run("mlstm", call, scratch[start : start + sizes[0] // 4], None)
    check(tuple(tensors[name].astype(np.float64) for name in ("h", *oracle.MLSTM_STATE)), data)


def test_scratch_memory_of_another_power_mode(library: NativeLibrary, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(emulated.device)
    other_power_mode(library)


@pytest.mark.slow
def test_without_errors_of_memory_or_undefined_behaviour() -> None:
    result: subprocess.CompletedProcess[str] = emulated.run_sanitized(Path(__file__))
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split() == ["checked", "13"]


def sanitized_cases() -> None:
    """What the test above runs in a process of its own."""
    sanitized = emulated.library(sanitize=True)
    count = 0
    for io in TYPES:
        for S, Dk, Dv, offset in ((1, 40, 72, 0), (1, 17, 33, 1), (130, 40, 136, 0), (70, 17, 33, 1)):
            emulated.device(shared_limit=163 << 10, sanitize=True)
            data = operands(S, io, io, B=1, S=S, H=2, Dk=Dk, Dv=Dv)
            check(run(sanitized, data, offset=offset, in_place=count % 2 == 0), data)
            count += 1
    other_power_mode(sanitized, sanitize=True)
    print("checked", count + 1)


if __name__ == "__main__":
    sys.exit(sanitized_cases())
