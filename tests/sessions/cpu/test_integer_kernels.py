"""Quantized patterns in ONNX Runtime: equal to the float64 product of what the graph says."""

from __future__ import annotations

from pathlib import Path

import lowered
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from xlstm_export.sessions import cpu_graph
from xlstm_export.sessions.cpu import integer_kernels, lower

RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))

K, N = 640, 416  # more than FEW weights


def integers(seed: int, *shape: int, largest: int = 127) -> np.ndarray:
    return np.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(np.int8)


def scales(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.005, 0.02, shape).astype(np.float32)


def activation(seed: int, rows: int, columns: int = K) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 1, columns)).astype(np.float32)


def signature(rows: int | None, columns: int = K, results: int = N) -> str:
    batch = "B" if rows is None else str(rows)
    return f"(float[{batch},S,{columns}] x) => (float[{batch},S,{results}] y)"


def kinds(model: ir.Model, *, batch: int | None) -> list[str]:
    copy = ir.from_proto(ir.to_proto(model))
    lower.lower(copy, batch=batch)
    return [node.op_type for node in copy.graph]


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What the rounding of an FP32 product is measured with: sums of absolute values."""
    return np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64))


# --- Activations and weights ----------------------------------------------------------------------------

W8A8 = """
    q = QuantizeLinear(x, sx, zx)
    dx = DequantizeLinear(q, sx, zx)
    dw = DequantizeLinear <axis = 1> (w, sw, zw)
    y = MatMul(dx, dw)
"""


def w8a8(w: np.ndarray, sw: np.ndarray, sx: float, rows: int | None = None) -> ir.Model:
    return lowered.model_of(
        signature(rows, *w.shape),
        W8A8,
        w=w,
        sw=sw,
        zw=np.zeros(w.shape[1], np.int8),
        sx=np.array(sx, np.float32),
        zx=np.array(0, np.int8),
    )


@pytest.fixture(params=["this processor", "without VNNI"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that are chosen here, and those that are chosen where the usual ones saturate."""
    if request.param == "without VNNI":
        monkeypatch.setattr(cpu_graph, "adds_in_32_bits", lambda: False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 513])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_saturate(rows: int, sign: int) -> None:
    """Largest magnitudes everywhere: 16-bit sums of two products overflow on processors without VNNI."""
    w = np.full((K, N), 127 * sign, np.int8)
    w[::3] *= -1
    x = np.full((1, rows, K), 127.0, np.float32)
    x[..., ::5] = -128.0
    (found,) = lowered.run(w8a8(w, np.ones(N, np.float32), 1.0), {"x": x})
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_integer_product_is_exact(batch: int | None) -> None:
    w, sw, sx = integers(0, K, N), scales(1, N), 0.03
    x = activation(2, batch or 2)
    x[0, 0, :4] = [100.0, -100.0, 0.015, 0.045]  # beyond the range, and ties
    model = w8a8(w, sw, sx, batch)
    assert kinds(model, batch=batch) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    (found,) = lowered.run(model, {"x": x}, batch=batch)
    steps = np.clip(np.rint(x / np.float32(sx)), -128, 127).astype(np.int64)
    expected = (steps @ w.astype(np.int64)) * (sw.astype(np.float64) * np.float64(np.float32(sx)))
    np.testing.assert_allclose(found, expected, rtol=3e-7)


def test_one_quantizer_for_all_readers() -> None:
    body = W8A8 + "dv = DequantizeLinear <axis = 1> (v, sw, zw)  z = MatMul(dx, dv)"
    model = lowered.model_of(
        f"(float[B,S,{K}] x) => (float[B,S,{N}] y, float[B,S,{N}] z)",
        body,
        w=integers(0, K, N),
        v=integers(1, K, N),
        sw=scales(2, N),
        zw=np.zeros(N, np.int8),
        sx=np.array(0.03, np.float32),
        zx=np.array(0, np.int8),
    )
    assert sorted(kinds(model, batch=None)) == [*["MatMulIntegerToFloat"] * 2, "QuantizeLinear"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [None, 1])
def test_a_weight_of_several_products_opens_and_is_exact(batch: int | None, transposed: bool) -> None:
    """A loop over positions applies one weight at each; -128 is in both operands."""
    w, sw, sx = integers(0, K, K), scales(1, K), 0.03
    w[:2, :2] = [[-128, 127], [127, -128]]
    x = activation(2, 1)
    x[0, 0, :2] = [-100.0, 100.0]
    axis, product = (0, "Gemm <transB = 1>") if transposed else (1, "MatMul")
    body = f"""
        q = QuantizeLinear(x, sx, zx)
        dx = DequantizeLinear(q, sx, zx)
        dw = DequantizeLinear <axis = {axis}> (w, sw, zw)
        h = {product}(dx, dw)
        r = QuantizeLinear(h, sx, zx)
        dh = DequantizeLinear(r, sx, zx)
        y = {product}(dh, dw)
    """
    numbers = {"sx": np.array(sx, np.float32), "zx": np.array(0, np.int8), "zw": np.zeros(K, np.int8)}
    model = lowered.model_of(f"(float[1,{K}] x) => (float[1,{K}] y)", body, w=w, sw=sw, **numbers)
    (found,) = lowered.run(model, {"x": x.reshape(1, K)}, batch=batch)
    steps, matrix = x.reshape(1, K), (w.T if transposed else w).astype(np.int64)
    for _ in range(2):
        whole = np.clip(np.rint(steps / np.float32(sx)), -128, 127).astype(np.int64)
        exact = (whole @ matrix) * (sw.astype(np.float64) * np.float64(np.float32(sx)))
        steps = exact.astype(np.float32)
    np.testing.assert_allclose(found, exact, rtol=3e-7)


def test_asymmetric_activations_are_left_to_the_runtime() -> None:
    model = w8a8(integers(0, K, N), scales(1, N), 0.03)
    model.graph.initializers["zx"].const_value = ir.tensor(np.array(3, np.int8))
    x = activation(2, 2)
    (found,) = lowered.run(model, {"x": x})
    steps = np.clip(np.rint(x / np.float32(0.03)) + 3, -128, 127) - 3
    w = integers(0, K, N) * scales(1, N).astype(np.float64)
    expected = (steps * np.float64(np.float32(0.03))) @ w
    assert np.abs(found - expected).max() < 1e-6 * bound(x, w).max()


# --- Weights alone --------------------------------------------------------------------------------------

WEIGHT_ONLY = "dw = DequantizeLinear <axis = 1> (w, sw, zw)  y = MatMul(x, dw)"


def weight_only(w: np.ndarray, sw: np.ndarray, rows: int | None) -> ir.Model:
    zero = np.zeros(w.shape[1], np.int8)
    return lowered.model_of(signature(rows, *w.shape), WEIGHT_ONLY, w=w, sw=sw, zw=zero)


@pytest.mark.parametrize("batch", [None, 1, 3, integer_kernels.DIGITS_UP_TO + 1])
def test_activations_are_not_quantized(batch: int | None) -> None:
    """Rounding of FP32 only: the runtime's own fusion is four orders of magnitude worse."""
    w, sw = integers(0, K, N), scales(1, N)
    x = activation(2, batch or 5)
    x[-1] *= 1e-6  # a row must not cost another its digits
    x[0, 0, 7] *= 60.0
    model = weight_only(w, sw, batch)
    digits = batch is not None and batch <= integer_kernels.DIGITS_UP_TO
    assert ("MatMulIntegerToFloat" in kinds(model, batch=batch)) == digits
    (found,) = lowered.run(model, {"x": x}, batch=batch)
    expected = x.astype(np.float64) @ (w * sw.astype(np.float64))
    # A digit product knows activations to 24 bits of the largest in the row, not of each.
    allowed = 4e-7 * bound(x, w * sw)
    if digits:
        allowed += 2.0**-23 * np.abs(x).max(-1, keepdims=True) * np.linalg.norm(w * sw, axis=0)
    assert np.all(np.abs(found - expected) < allowed)
    if RUNTIME >= (1, 25):  # older ones have no such fusion
        (alone,) = lowered.native(model, {"x": x})
        assert np.max(np.abs(alone - expected) / allowed) > 10


def test_every_product_has_a_zero_point_of_its_own() -> None:
    """ONNX Runtime 1.25 and 1.27 end the process, or refuse the graph, where it is missing or shared."""
    model = weight_only(integers(0, K, N), scales(1, N), 1)
    lower.lower(model, batch=1)
    products = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    assert products
    zeros = [node.inputs[5] for node in products]
    assert all(zero is not None and zero.const_value is not None for zero in zeros)
    signed = [zero for zero in zeros if zero is not None and zero.dtype == ir.DataType.INT8]
    assert len({zero.name for zero in signed}) == len(signed) > 0


def test_every_digit_matters() -> None:
    """Activations that are whole numbers of steps come back to the last bit of a 24-bit integer."""
    w = np.eye(K, N, dtype=np.int8) * np.int8(127)
    x = activation(0, 1)
    x[0, 0, -1] = 5.0
    (found,) = lowered.run(weight_only(w, np.full(N, 1 / 127, np.float32), 1), {"x": x}, batch=1)
    assert np.abs(found - x[..., :N]).max() <= 5.0 * 2.0**-22


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("batch", [None, 3])
def test_overflow_stays_visible(bad: float, batch: int | None) -> None:
    x = activation(0, 3)
    x[1, 0, 300] = bad
    (found,) = lowered.run(weight_only(integers(0, K, N), scales(1, N), batch), {"x": x}, batch=batch)
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_size_of_activations(size: float) -> None:
    x, w, sw = activation(0, 1) * np.float32(size), integers(0, K, N), scales(1, N)
    (found,) = lowered.run(weight_only(w, sw, 1), {"x": x}, batch=1)
    expected = x.astype(np.float64) @ (w * sw.astype(np.float64))
    assert np.all(np.abs(found - expected) <= 4e-7 * bound(x, w * sw))


def test_small_weights_are_fp32_once() -> None:
    w, sw = integers(0, 64, 48), scales(1, 48)
    model = weight_only(w, sw, None)
    assert kinds(model, batch=None) == ["MatMul"]
    x = activation(2, 2, 64)
    (found,) = lowered.run(model, {"x": x})
    np.testing.assert_allclose(found, x @ (w * sw), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [None, 1])
def test_no_fp32_copies_of_large_weights(batch: int | None, tmp_path: Path) -> None:
    model = weight_only(integers(0, K, N), scales(1, N), batch)
    lowered.run(model, {"x": activation(1, 1)}, batch=batch, dump=tmp_path / "m.onnx")
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer
    sizes = {t.name: len(t.raw_data) for t in stored}
    assert max(sizes.values()) == K * N, sizes


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize(("block", "bits"), [(32, 4), (64, 4), (128, 4), (128, 8)])
def test_weights_in_blocks(block: int, bits: int, batch: int | None) -> None:
    if bits == 8 and RUNTIME < (1, 23):
        pytest.skip("this ONNX Runtime has blocks of INT4 only, as no recipe makes others")
    w = integers(0, K, N, largest=7 if bits == 4 else 127)
    w[0, 0] = -8
    sw = scales(1, K // block, N)
    model = lowered.model_of(
        signature(batch),
        f"dw = DequantizeLinear <axis = 0, block_size = {block}> (w, sw)  y = MatMul(x, dw)",
        w=w.astype(ml_dtypes.int4) if bits == 4 else w,
        sw=sw,
    )
    assert kinds(model, batch=batch).count("MatMulNBits") == 1
    x = activation(2, batch or 5)
    x[-1] *= 1e-6
    x[0, 0, :block] *= 60.0
    x[0, 0, block : 2 * block] = 0.0
    (found,) = lowered.run(model, {"x": x}, batch=batch)
    dense = w * np.repeat(sw, block, axis=0).astype(np.float64)
    assert np.all(np.abs(found - x.astype(np.float64) @ dense) < 1e-6 * bound(x, dense))
    x[0, 0, 1] = np.nan
    (found,) = lowered.run(model, {"x": x}, batch=batch)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()


# --- Other readers of weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("quantized", [False, True])
def test_tied_table(batch: int | None, quantized: bool) -> None:
    """Looked up by the one, multiplied by the other, with a bias; stored once."""
    w, sw, bias = integers(0, N, K), scales(1, N), scales(2, N)
    batch_dim = "B" if batch is None else batch
    body = """
        table = DequantizeLinear <axis = 0> (w, sw, zw)
        e = Gather(table, tokens)
        flat = Flatten(e)
        q = QuantizeLinear(flat, sx, zx)
        dq = DequantizeLinear(q, sx, zx)
        head = DequantizeLinear <axis = 0> (w, sw, zw)
        y = Gemm <transB = 1> (ACTIVATION, head, bias)
    """.replace("ACTIVATION", "dq" if quantized else "flat")
    model = lowered.model_of(
        f"(int64[{batch_dim},1] tokens) => (float[{batch_dim},{N}] y)",
        body,
        w=w,
        sw=sw,
        zw=np.zeros(N, np.int8),
        bias=bias,
        sx=np.array(0.02, np.float32),
        zx=np.array(0, np.int8),
    )
    tokens = np.array([[5]])
    (found,) = lowered.run(model, {"tokens": tokens}, batch=batch)
    dense = w * sw[:, None].astype(np.float64)
    x = dense[5]
    if quantized:
        step = np.float32(0.02)
        x = np.clip(np.rint(x.astype(np.float32) / step), -128, 127) * np.float64(step)
    assert np.abs(found - (x @ dense.T + bias)).max() < 4e-7 * bound(x, dense.T).max()


def test_table_alone() -> None:
    w, sw = integers(0, 50, 16), scales(1, 50)
    model = lowered.model_of(
        "(int64[B,S] tokens) => (float[B,S,16] y)",
        "table = DequantizeLinear <axis = 0> (w, sw)  y = Gather(table, tokens)",
        w=w,
        sw=sw,
    )
    assert kinds(model, batch=None) == ["Gather", "Gather", "Cast", "Mul"]
    tokens = np.array([[0, 49, 7], [1, 1, 2]])
    (found,) = lowered.run(model, {"tokens": tokens})
    np.testing.assert_array_equal(found, (w * sw[:, None])[tokens])


def test_block_diagonal_weights() -> None:
    w, sw = integers(0, 3, 8, 6), scales(1, 6)
    model = lowered.model_of(
        "(float[B,3,S,8] x) => (float[B,3,S,6] y)",
        "dw = DequantizeLinear <axis = 2> (w, sw)  y = MatMul(x, dw)",
        w=w,
        sw=sw,
    )
    assert kinds(model, batch=None) == ["MatMul"]
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 8)).astype(np.float32)
    (found,) = lowered.run(model, {"x": x})
    np.testing.assert_allclose(found, x @ (w * sw), rtol=1e-4, atol=1e-5)


def test_asymmetric_weights_are_left_to_the_runtime() -> None:
    w, sw = integers(0, K, N), scales(1, N)
    model = weight_only(w, sw, None)
    model.graph.initializers["zw"].const_value = ir.tensor(np.full(N, 2, np.int8))
    assert kinds(model, batch=None) == ["DequantizeLinear", "MatMul"]
    x, dense = activation(2, 2), (w.astype(np.int16) - 2) * sw.astype(np.float64)
    (found,) = lowered.run(model, {"x": x})
    assert np.all(np.abs(found - x @ dense) < 4e-7 * bound(x, dense))
