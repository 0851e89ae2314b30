"""Half graphs in FP32: every half value is what NumPy's own half arithmetic gives, overflow included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lowered
import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import oracle
import pytest

from xlstm_export.graph.element_types import typed_nodes
from xlstm_export.graph.stored_types import DTYPES
from xlstm_export.quantize.quantize import apply_recipe
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions.cpu import lower, round_half
from xlstm_export.specs import OP_DOMAIN

NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TEXT = {"fp16": "float16", "bf16": "bfloat16"}
BASES = ["fp16", "bf16"]


def half(array: np.ndarray, base: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(NUMPY[base])


def product(base: str, weight: float, last: float) -> ir.Model:
    """x · W overflows on the way to a result that would fit."""
    number = DTYPES[base].value
    return lowered.model_of(
        "(float[1,4] x) => (float[1,2] y)",
        f"h = Cast <to = {number}> (x)  p = MatMul(h, w)  s = Mul(p, c)  y = Cast <to = 1> (s)",
        w=half(np.full((4, 2), weight), base),
        c=half(last, base),
    )


# --- Range and rounding ---------------------------------------------------------------------------------


def test_overflow_is_not_hidden() -> None:
    """4 · 300 · 300 is beyond FP16. The runtime computes it in FP32, and the last factor hides it."""
    model = product("fp16", 300.0, 1e-4)
    x = {"x": np.full((1, 4), 300.0, np.float32)}
    (hidden,) = lowered.native(model, x)
    np.testing.assert_allclose(hidden, 36.0, rtol=1e-3)
    (found,) = lowered.run(model, x)
    assert np.isposinf(found).all()
    (wide,) = lowered.run(model, x, rounding=False)
    np.testing.assert_allclose(wide, 36.0, rtol=1e-3)


def test_bfloat16_has_the_range_but_not_the_digits() -> None:
    """The runtime has no BF16 product at all."""
    model = product("bf16", 300.0, 1e-4)
    x = {"x": np.full((1, 4), 301.0, np.float32)}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented):
        lowered.native(model, x)
    (found,) = lowered.run(model, x)
    step = NUMPY["bf16"].type
    total = np.float32(4) * np.float32(step(301.0)) * np.float32(step(300.0))
    expected = step(np.float32(step(total)) * np.float32(step(1e-4)))
    np.testing.assert_array_equal(found, np.float32(expected))


@pytest.mark.parametrize("base", BASES)
def test_every_bit_is_rounded(base: str) -> None:
    """All half numbers, all midpoints between two of them, and their neighbours in FP32."""
    model = lowered.model_of(
        "(float[N] x) => (float[N] y)",
        f"a = Neg(x)  h = Cast <to = {DTYPES[base].value}> (a)  y = Cast <to = 1> (h)",
    )
    numbers = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[base]).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    middle = (numbers[1:].astype(np.float64) + numbers[:-1]) / 2
    x = np.concatenate([numbers, middle.astype(np.float32)])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    x = np.concatenate([x, np.float32([65519.996, 65520.0, 1e38, np.inf, -np.inf, np.nan, 1e-45])])
    (found,) = lowered.run(model, {"x": x})
    np.testing.assert_array_equal(found, half(-x, base).astype(np.float32))


@pytest.mark.parametrize("base", BASES)
def test_results_are_rounded_once(base: str) -> None:
    """Elementwise operators: FP32 inside, one rounding behind each."""
    kind, number = TEXT[base], DTYPES[base].value
    model = lowered.model_of(
        "(float[8] x) => (float[8] y)",
        f"h = Cast <to = {number}> (x)  s = Sigmoid(h)  m = Mul(h, s)  t = Add(m, c)  y = Cast <to = 1> (t)",
        c=half(np.linspace(-1, 1, 8), base),
    )
    assert kind in str(NUMPY[base])
    x = np.random.default_rng(0).standard_normal(8).astype(np.float32)
    (found,) = lowered.run(model, {"x": x})
    h = half(x, base).astype(np.float64)
    s = half(1 / (1 + np.exp(-h)), base).astype(np.float64)
    m = half(h * s, base).astype(np.float64)
    expected = half(m + half(np.linspace(-1, 1, 8), base).astype(np.float64), base)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_half_inputs_and_outputs_keep_their_type() -> None:
    model = lowered.model_of(
        "(float16[4] x, float16[4] z) => (float16[4] y, float16[4] w)", "y = Mul(x, z)  w = Neg(y)"
    )
    x = np.array([300, 1.0, 6e-5, -2049], np.float16)
    y, w = lowered.run(model, {"x": x, "z": x})
    assert y.dtype == w.dtype == np.float16
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y, x * x)
    np.testing.assert_array_equal(w, -y)


def test_large_weights_stay_in_half() -> None:
    """They are mapped from the file; only small ones are made FP32 here."""
    w = half(np.random.default_rng(0).standard_normal((300, 300)), "fp16")
    body = "h = Cast <to = 10> (x)  p = MatMul(h, w)  q = Add(p, b)  y = Cast <to = 1> (q)"
    model = lowered.model_of("(float[B,300] x) => (float[B,300] y)", body, w=w, b=w[0])
    round_half.to_float32(model, rounding=True)
    stored = {name: value.dtype for name, value in model.graph.initializers.items() if value.uses()}
    assert stored == {"w": ir.DataType.FLOAT16, "b.float": ir.DataType.FLOAT}


def test_rows_of_a_large_table_are_looked_up_in_half() -> None:
    """Widening the whole table at each call would cost more than all the rest of a step."""
    table = half(np.random.default_rng(0).standard_normal((700, 100)), "fp16")
    body = "e = Gather(table, tokens)  n = Neg(e)  h = MatMul(n, w)  y = Cast <to = 1> (h)"
    model = lowered.model_of("(int64[B,S] tokens) => (float[B,S,4] y)", body, table=table, w=table[:100, :4])
    tokens = np.array([[0, 699, 5]])
    (found,) = lowered.run(model, {"tokens": tokens})
    expected = -table[tokens].astype(np.float64) @ table[:100, :4].astype(np.float64)
    np.testing.assert_allclose(found, half(expected, "fp16").astype(np.float32), rtol=1e-3)
    round_half.to_float32(model, rounding=True)
    assert model.graph[0].op_type == "Gather"
    assert model.graph[0].inputs[0] is model.graph.initializers["table"]


def test_scaled_integers_are_not_rounded_in_front_of_a_product() -> None:
    """Kernels multiply integers; but what else reads the scaled value gets half."""
    rng = np.random.default_rng(0)
    q, s = rng.integers(-127, 128, (16, 8)).astype(np.int8), np.float16(0.1)
    body = """
        dw = DequantizeLinear(q, s)
        h = Cast <to = 10> (x)
        p = MatMul(h, dw)
        y = Cast <to = 1> (p)
        n = Neg(dw)
        z = Cast <to = 1> (n)
    """
    model = lowered.model_of("(float[1,16] x) => (float[1,8] y, float[16,8] z)", body, q=q, s=np.array(s))
    x = rng.standard_normal((1, 16)).astype(np.float16).astype(np.float32)
    y, z = lowered.run(model, {"x": x})
    exact = x.astype(np.float64) @ (q * np.float64(s))
    np.testing.assert_array_equal(y, exact.astype(np.float16))
    np.testing.assert_array_equal(z, -(q * s).astype(np.float16))
    rounded = x.astype(np.float64) @ (q * s).astype(np.float64)
    assert np.any(rounded.astype(np.float16) != y), "the example must tell the two apart"


# --- A whole export -------------------------------------------------------------------------------------


def half_graph(folder: Path, base: str) -> ir.Model:
    """The small export in half, its weights in memory."""
    model = ir.load(folder / "model.onnx")
    apply_recipe(model, preset(base))
    return ir.from_proto(ir.to_proto(ir.external_data.load_to_model(model)))


def half_values(model: ir.Model) -> list[tuple[ir.Node, ir.Value]]:
    _, types = typed_nodes(model)
    results = [(node, value) for node in model.graph for value in node.outputs]
    return [(node, value) for node, value in results if types[value] in round_half.HALF]


def all_values(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every value of the lowered graph by name, where it is rounded with the name it had before."""
    model = ir.from_proto(ir.to_proto(model))
    round_half.to_float32(model, rounding=True)
    known = {value.name for value in model.graph.outputs}
    rounded = {}
    for node in model.graph:
        narrow = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] else None
        if narrow is not None and narrow.op_type == "Cast" and narrow.inputs[0] is not None:
            after = node.outputs[0].name or ""
            is_output = after in known
            before = narrow.inputs[0].name if is_output else after.removesuffix(".rounded")
            rounded[before] = after
        for value in node.outputs:
            if value.name and value.name not in known and value.dtype not in round_half.HALF:
                model.graph.outputs.append(value)
    for value in model.graph.outputs:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    session = lower.open_session(model, Path(), lowered.options())
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(None, inputs), strict=True))
    return {**inputs, **values, **{before: values[after] for before, after in rounded.items()}}


def in_float64(node: ir.Node, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One node in float64 from the values the lowered graph computed in front of it."""
    arrays = []
    for value in node.inputs:
        assert value is not None
        constant = ir.convenience.get_const_tensor(value)
        array = values[value.name or ""] if constant is None else constant.numpy()
        arrays.append(array.astype(np.float64) if array.dtype.kind in "fV" else array)
    if node.domain == OP_DOMAIN:
        assert node.op_type == "XlstmMlstm"
        scale, eps = (node.attributes[name].as_float() for name in ("scale", "eps"))
        return list(oracle.mlstm(*arrays, scale=scale, eps=eps))
    if node.op_type == "Cast":
        return arrays
    alone = onnx.helper.make_node(
        node.op_type,
        [f"i{k}" for k in range(len(arrays))],
        [f"o{k}" for k in range(len(node.outputs))],
    )
    alone.attribute.extend(ir.serde.serialize_attribute(a) for a in node.attributes.values())
    evaluator = onnx.reference.ReferenceEvaluator(alone)
    return evaluator.run(None, {f"i{k}": array for k, array in enumerate(arrays)})


def differences(
    base: str, model: ir.Model, values: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Per half value, how many half numbers lie between ours and the float64 result rounded to half."""
    for node, value in half_values(model):
        expected = half(in_float64(node, values)[node.outputs.index(value)], base)
        found = half(values[value.name or ""], base)
        np.testing.assert_array_equal(found.astype(np.float32), values[value.name or ""])  # it is half
        steps = [array.view(np.int16).astype(np.int32) for array in (found, expected)]
        steps = [np.where(s < 0, -(s & 0x7FFF), s) for s in steps]
        yield f"{node.op_type} {value.name}", np.abs(steps[0] - steps[1])


@pytest.mark.parametrize("base", BASES)
def test_whole_graph_against_float64_rounded_to_half(small_export: Path, base: str) -> None:
    """Every half value of an export, from the values in front of it: nearly all to the bit."""
    model = half_graph(small_export, base)
    states = {v.name: v.shape for v in model.graph.inputs if v.name and v.name.startswith("past_")}
    rng = np.random.default_rng(0)
    inputs = {"tokens": rng.integers(0, 256, (2, 9))}
    for name, shape in states.items():
        sizes = [2 if not isinstance(dim, int) else dim for dim in shape or ()]
        inputs[name] = rng.uniform(0.5, 1.5, sizes).astype(np.float32)
    values = all_values(model, inputs)
    found = dict(differences(base, model, values))
    assert sum(name.startswith("MatMul") for name in found) >= 8
    assert any(name.startswith("XlstmMlstm") for name in found)
    worst = max(found, key=lambda name: found[name].max())
    assert found[worst].max() <= 1, worst
    changed = sum(np.count_nonzero(d) for d in found.values()) / sum(d.size for d in found.values())
    assert changed < 2e-3, "roundings of FP32 sums that lie between two half numbers"


def test_a_value_that_is_not_rounded_is_found(small_export: Path) -> None:
    """The comparison above fails for a graph that leaves one rounding away."""
    model = half_graph(small_export, "fp16")
    values = all_values(model, {"tokens": np.zeros((1, 3), np.int64), **fresh(model)})
    name = next(value.name for node, value in half_values(model) if node.op_type == "MatMul")
    values[name or ""] = values[name or ""] * np.float32(1.0 + 2.0**-13)
    with pytest.raises(AssertionError):
        list(differences("fp16", model, values))


def fresh(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        v.name or "": np.zeros([d if isinstance(d, int) else 1 for d in v.shape or ()], np.float32)
        for v in model.graph.inputs
        if (v.name or "").startswith("past_")
    }


def test_stored_in_half_is_not_computed_in_half(small_export: Path) -> None:
    model = ir.load(small_export / "model.onnx")
    assert not round_half.computes_in_half(model)
    narrow = lowered.model_of(
        "(float[1,2] x) => (float[1,2] y)",
        "wide = Cast <to = 1> (w)  y = MatMul(x, wide)",
        w=np.ones((2, 2), np.float16),
    )
    assert not round_half.computes_in_half(narrow)
    assert round_half.computes_in_half(product("fp16", 1.0, 1.0))
    assert round_half.computes_in_half(half_graph(small_export, "bf16"))
