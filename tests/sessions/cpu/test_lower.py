"""Half and quantized exports in `OrtSession`: one stream however it is cut, states of any type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lowered
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from xlstm_export.calibration.observers import calibrate
from xlstm_export.calibration.sets import CalibrationSet

from xlstm_export import distance as compare
from xlstm_export.errors import InputError
from xlstm_export.graph.files import load_graph
from xlstm_export.load import checkpoint
from xlstm_export.options import Context, ExportOptions
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import OrtSession, load_state, save_state
from xlstm_export.sessions.cpu import lower
from xlstm_export.trace import export as trace

LENGTH = 40
# Relative L2 of steps against prefill: FP32 rounding, which a rounding to half or to a step may now and then
# turn into one of its own.
LIMITS = {"fp16": 1e-3, "bf16": 1e-2, "int8": 2e-2, "int8-wo": 1e-3, "int4-wo": 1e-3}


def tokens(length: int = LENGTH, batch: int = 2) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(0).integers(0, 256, (batch, length))}


@pytest.fixture(scope="module")
def make(small_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """precision, base, state type → run folder; each is made once."""
    root = tmp_path_factory.mktemp("quantized")
    data = CalibrationSet(tokens(128, 2), "tokens")
    scales = calibrate(small_export, data, context=Context(threads=1), out=root, batch=2)

    def make(precision: str, base: str | None = None, state: str = "fp32") -> Path:
        out = root / f"{precision}-{base}-{state}"
        if not out.exists():
            recipe = replace(preset(precision, base), state_dtype=state)
            needed = scales if precision == "int8" else None
            # The judgement of a state stored in half takes half a minute and is tested elsewhere.
            quantize.quantize(small_export, recipe, scales=needed, out=out, judge=lambda *_: [])
        return out

    return make


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return compare.difference(a, b).relative_l2


CASES = [
    ("fp16", None),
    ("bf16", None),
    *[(precision, base) for precision in ("int8", "int8-wo", "int4-wo") for base in ("fp32", "fp16", "bf16")],
]


@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize(("precision", "base"), CASES)
def test_steps_are_the_prefill(
    make: Callable[..., Path], precision: str, base: str | None, rounding: bool
) -> None:
    session = OrtSession(make(precision, base), 2, 1, rounding=rounding)
    whole = session.prefill(tokens())["logits"]
    state = session.state()
    session.reset()
    given = tokens()["tokens"]
    stepped = [session.step({"tokens": given[:, t : t + 1]})["logits"].copy() for t in range(LENGTH)]
    limit = LIMITS[precision] if base != "bf16" else LIMITS["int8"]
    assert difference(np.concatenate(stepped, axis=1), whole) < limit
    assert all(np.isfinite(value).all() for value in state.values())


def test_rounding_is_what_separates_half_from_fp32(make: Callable[..., Path], small_export: Path) -> None:
    """Weights rounded to half are the same with and without; the rest of the error is that of activations."""
    exact = OrtSession(small_export, 2, 1, rounding=True).prefill(tokens())["logits"]
    errors = {
        (base, rounding): difference(
            OrtSession(make(base), 2, 1, rounding=rounding).prefill(tokens())["logits"], exact
        )
        for base in ("fp16", "bf16")
        for rounding in (True, False)
    }
    assert 0 < errors["fp16", False] < errors["fp16", True] < 1e-2
    assert 0 < errors["bf16", False] < errors["bf16", True] < 5e-2
    assert errors["bf16", True] > 4 * errors["fp16", True], "8 bits against 11"


# --- States in half -------------------------------------------------------------------------------------

TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("state", ["fp16", "bf16"])
def test_states_in_half(make: Callable[..., Path], tmp_path: Path, state: str) -> None:
    folder = make("fp16", None, state)
    session = OrtSession(folder, 2, 1, rounding=True)
    session.prefill(tokens())
    session.step(tokens(1))
    kept = session.state()
    assert {name[-1]: x.dtype for name, x in kept.items()}["C"] == TYPES[state]
    assert {x.dtype for name, x in kept.items() if not name.endswith("_C")} == {np.dtype(np.float32)}
    assert kept["past_0_C"].any()
    expected = session.step(tokens(1))["logits"].copy()

    save_state(session, tmp_path / "state.npz")
    session.reset([1])
    assert not session.state()["past_0_C"][1].any()
    session.set_state(kept)
    assert all(np.array_equal(x, kept[name]) for name, x in session.state().items())
    np.testing.assert_array_equal(session.step(tokens(1))["logits"], expected)

    other = OrtSession(folder, 2, 1, rounding=True)
    load_state(other, tmp_path / "state.npz")
    assert {n: x.dtype for n, x in other.state().items()} == {n: x.dtype for n, x in kept.items()}
    np.testing.assert_array_equal(other.step(tokens(1))["logits"], session.step(tokens(1))["logits"])
    with pytest.raises(InputError, match="past_0_C holds complex"):
        session.set_state({**kept, "past_0_C": kept["past_0_C"].astype(np.complex64)})


@pytest.mark.parametrize("state", ["fp16", "bf16"])
def test_carried_state_is_rounded(make: Callable[..., Path], state: str) -> None:
    """The matrix memory of one call is that of the FP32 state, rounded to the type that carries it."""
    wide = OrtSession(make("fp16"), 2, 1, rounding=True)
    narrow = OrtSession(make("fp16", None, state), 2, 1, rounding=True)
    for session in (wide, narrow):
        session.prefill(tokens())
    C = wide.state()["past_0_C"]
    np.testing.assert_array_equal(narrow.state()["past_0_C"], C.astype(TYPES[state]))


# --- What a session is made of --------------------------------------------------------------------------


def test_fp32_graphs_are_not_lowered(small_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "open_session", None)
    assert not lower.needs_lowering(ir.load(small_export / "model.onnx"))
    session = OrtSession(small_export, 1, 1, rounding=True)
    session.prefill(tokens(3, 1))
    session.step(tokens(1, 1))


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(("precision", "base"), CASES)
def test_lowered_graphs_are_fp32_and_valid(
    make: Callable[..., Path], precision: str, base: str | None, batch: int | None
) -> None:
    model = ir.load(make(precision, base) / "model.onnx")
    assert lower.needs_lowering(model)
    lower.lower(model, batch=batch)
    halves = {"Cast"}  # the pairs that round
    for node in model.graph:
        types = {value.dtype for value in node.outputs} & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        assert not types or node.op_type in halves
    assert not any(node.op_type == "DequantizeLinear" for node in model.graph)
    assert any(node.op_type == "Scan" for f in model.functions.values() for node in f) == (batch is None)


def test_large_arrays_travel_outside_the_message() -> None:
    """A message is limited to 2 GB; a derived weight of any type has to run all the same."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (450, 600)).astype(np.int8)
    model = lowered.model_of(
        "(float[1,600] x) => (float[1,450] y)",
        "table = DequantizeLinear <axis = 0> (w, s)  y = Gemm <transB = 1> (x, table)",
        w=w,
        s=np.full(450, 0.01, np.float32),
    )
    lower.lower(model, batch=1)
    source, arrays = lower.detached(model)
    assert sum(array.nbytes for array in arrays.values()) >= w.size
    assert len(source) < w.size / 2
    graph = onnx.ModelProto.FromString(source).graph
    assert {t.name for t in graph.initializer if t.external_data} == set(arrays)


def test_weights_stay_in_their_file(make: Callable[..., Path]) -> None:
    """All but the small ones, which are read and scaled."""
    folder = make("fp16")
    model = ir.load(folder / "model.onnx")
    lower.lower(model)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size > 1 << 16:
            assert isinstance(value.const_value, ir.ExternalTensor)


def test_a_graph_of_a_newer_opset_decodes(make: Callable[..., Path]) -> None:
    """INT4 needs opset 21; the step bodies must follow."""
    folder = make("int4-wo", "fp32")
    assert ir.load(folder / "model.onnx").opset_imports[""] >= 21
    session = OrtSession(folder, 1, 1, rounding=True)
    assert np.isfinite(session.step(tokens(1, 1))["logits"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_that_are_only_stored_in_half_are_left_to_the_runtime(
    small_loaded: checkpoint.Loaded, tmp_path: Path, dtype: str
) -> None:
    """Tables that are looked up included: such an export runs as it is, on its mapped file."""
    folder = trace.export(small_loaded, tmp_path / "out", ExportOptions(dtype=dtype))
    assert not lower.needs_lowering(load_graph(folder / "model.onnx"))
