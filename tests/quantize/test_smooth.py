"""Migration of ranges: the function stays, the outlier goes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from xlstm_export.quantize.smooth import smooth

NORM = """
<ir_version: 10, opset_import: ["": 18]>
g (float[B, S, 32] x) => (float[B, S, 48] y, float[B, S, 16] z)
{
    n = LayerNormalization <axis = -1> (x, scale, bias)
    y = MatMul(n, up)
    z = MatMul(n, gate)
}
"""
PLAIN = """
<ir_version: 10, opset_import: ["": 18]>
g (float[B, S, 32] x) => (float[B, S, 48] y)
{
    t = Tanh(x)
    n = Identity(t)
    y = MatMul(n, up)
}
"""
SHAPES = {"scale": (32,), "bias": (32,), "up": (32, 48), "gate": (32, 16)}


def make(text: str, outlier: float) -> tuple[ir.Model, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays["scale"][5] = outlier
    model = ir.from_onnx_text(
        text, initializers=[ir.tensor(x, name=n) for n, x in arrays.items() if n in text]
    )
    ShapeInferencePass()(model)
    x = rng.standard_normal((2, 7, 32)).astype(np.float32)
    return model, {"x": x}


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, feed)


def channels(outlier: float) -> np.ndarray:
    amax = np.linspace(1.0, 2.0, 32, dtype=np.float32)
    amax[5] = outlier
    return amax


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_function_stays_and_no_node_is_added_behind_a_norm(alpha: float) -> None:
    model, feed = make(NORM, 100.0)
    before = run(model, feed)
    changed = smooth(model, ["up", "gate"], {"n": channels(100.0)}, alpha)
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "MatMul", "MatMul"]
    for a, b in zip(run(model, feed), before, strict=True):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-6
    assert list(changed) == ["n"]


def test_scales_are_those_of_the_paper() -> None:
    """s_j = max|x_j|^α / max|W_j|^(1-α), over all weights that read the activation."""
    model, _ = make(NORM, 100.0)
    weights = [model.graph.initializers[name].const_value.numpy().copy() for name in ("up", "gate")]  # type: ignore[union-attr]
    amax = channels(100.0)
    changed = smooth(model, ["up", "gate"], {"n": amax}, 0.75)
    largest = np.max([np.abs(w).max(1) for w in weights], axis=0)
    expected = amax**0.75 / largest**0.25
    np.testing.assert_allclose(changed["n"], amax / expected, rtol=1e-5)
    after = model.graph.initializers["up"].const_value
    assert after is not None
    np.testing.assert_allclose(after.numpy(), weights[0] * expected[:, None], rtol=1e-5)


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    model, feed = make(NORM, 100.0)
    before = run(model, feed)
    smooth(model, ["up"], {"n": channels(100.0)}, 0.5)  # `gate` reads n too and is not smoothed
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "Mul", "MatMul", "MatMul"]
    for a, b in zip(run(model, feed), before, strict=True):
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-6


@pytest.mark.parametrize(("outlier", "nodes"), [(100.0, 4), (3.0, 3)])
def test_a_multiplication_only_where_a_channel_stands_out(outlier: float, nodes: int) -> None:
    model, feed = make(PLAIN, 1.0)
    before = run(model, feed)
    changed = smooth(model, ["up"], {"n": channels(outlier)}, 0.5)
    assert len(list(model.graph)) == nodes
    assert list(changed) == (["n.smoothed"] if nodes == 4 else [])
    assert np.linalg.norm(run(model, feed)[0] - before[0]) / np.linalg.norm(before[0]) < 1e-6


def test_dead_channels() -> None:
    """A channel that is always zero, or that nothing reads, has no range to move."""
    model, feed = make(NORM, 100.0)
    amax = channels(100.0)
    amax[3] = 0.0
    changed = smooth(model, ["up", "gate"], {"n": amax}, 0.5)
    assert np.isfinite(changed["n"]).all()
    assert all(np.isfinite(y).all() for y in run(model, feed))
