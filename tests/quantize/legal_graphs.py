"""Small legal graphs as exports have them, and how a case of the legality tests makes one illegal.

A graph is ONNX text. Values of the list behind the signature become initializers: ones named `*_scale` are
0.05, `*_zero` are 0, the rest is random, or what `values` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

Changes = tuple[tuple[str, str], ...]
INTEGERS = {TensorProto.INT8: 127, TensorProto.UINT8: 127, TensorProto.INT4: 7, TensorProto.UINT4: 7}

PLAIN = """(float[B, S, 64] x) => (float[B, S, 32] y) <float[64, 32] w> {
    [product] y = MatMul (x, w)
}"""
W8A8 = """(float[B, S, 64] x) => (float[B, S, 32] y)
<float x_scale, int8 x_zero, int8[64, 32] w, float[32] w_scale, int8[32] w_zero> {
    [quantize] q = QuantizeLinear (x, x_scale, x_zero)
    [dequantize] d = DequantizeLinear (q, x_scale, x_zero)
    [weight] dw = DequantizeLinear <axis = 1> (w, w_scale, w_zero)
    [product] y = MatMul (d, dw)
}"""
W8 = """(float[B, S, 64] x) => (float[B, S, 32] y) <int8[64, 32] w, float[32] w_scale, int8[32] w_zero> {
    [weight] dw = DequantizeLinear <axis = 1> (w, w_scale, w_zero)
    [product] y = MatMul (x, dw)
}"""
W8_TRANSPOSED = """(float[B, S, 64] x) => (float[B, S, 32] y) <int8[32, 64] w, float[32] w_scale> {
    [weight] dw = DequantizeLinear <axis = 0> (w, w_scale)
    wt = Transpose <perm = [1, 0]> (dw)
    [product] y = MatMul (x, wt)
}"""
BATCHED = """(float[B, 5, S, 64] x) => (float[B, 5, S, 32] y)
<int8[5, 64, 32] w, float[32] w_scale, int8[32] w_zero> {
    [weight] dw = DequantizeLinear <axis = 2> (w, w_scale, w_zero)
    [product] y = MatMul (x, dw)
}"""
BATCHED_W8A8 = """(float[B, 5, S, 64] x) => (float[B, 5, S, 32] y)
<float x_scale, int8 x_zero, int8[5, 64, 32] w, float[32] w_scale, int8[32] w_zero> {
    [quantize] q = QuantizeLinear (x, x_scale, x_zero)
    [dequantize] d = DequantizeLinear (q, x_scale, x_zero)
    [weight] dw = DequantizeLinear <axis = 2> (w, w_scale, w_zero)
    [product] y = MatMul (d, dw)
}"""
EMBEDDING = """(int64[B, S] tokens) => (float[B, S, 64] y)
<int8[96, 64] w, float[96] w_scale, int8[96] w_zero> {
    [weight] dw = DequantizeLinear <axis = 0> (w, w_scale, w_zero)
    [lookup] y = Gather <axis = 0> (dw, tokens)
}"""
TIED = """(int64[B, S] tokens) => (float[T, 96] y)
<int8[96, 64] w, float[96] w_scale, int8[96] w_zero, int64[2] shape> {
    [weight] dw = DequantizeLinear <axis = 0> (w, w_scale, w_zero)
    e = Gather <axis = 0> (dw, tokens)
    flat = Reshape (e, shape)
    [head] y = Gemm <transB = 1> (flat, dw)
}"""
TIED_TWICE = TIED.replace(
    "[head]", "[second] dw2 = DequantizeLinear <axis = 0> (w, w_scale, w_zero)\n[head]"
).replace("(flat, dw)", "(flat, dw2)")
INT4 = """(float[B, S, 256] x) => (float[B, S, 32] y)
<int4[256, 32] w, float[2, 32] w_scale, int4[2, 32] w_zero> {
    [weight] dw = DequantizeLinear <axis = 0, block_size = 128> (w, w_scale, w_zero)
    [product] y = MatMul (x, dw)
}"""
FENCED = """(float[B, S, 64] x) => (float[B, S, 32] y) <float16[64, 32] w> {
    h = Cast <to = 10> (x)
    [product] p = MatMul (h, w)
    [widen] y = Cast <to = 1> (p)
}"""
W8_HALF = """(float[B, S, 64] x) => (float[B, S, 32] y) <int8[64, 32] w, float16[32] w_scale> {
    h = Cast <to = 10> (x)
    [weight] dw = DequantizeLinear <axis = 1> (w, w_scale)
    [product] p = MatMul (h, dw)
    [widen] y = Cast <to = 1> (p)
}"""
BINARY = """(float[B, S, 64] a, float[B, S, 64] b) => (float[B, S, 64] y) { [node] y = Add (a, b) }"""
UNARY = """(float[B, S, 64] a) => (float[B, S, 64] y) <float[64] g, float[1] c> { [node] y = Relu (a) }"""
REDUCE = """(float[B, S, 64] a, int64[1] k) => (float[B, S, 1] y) <int64[1] axis> {
    [node] y = ReduceMax <keepdims = 1> (a, axis)
}"""
EINSUM = """(float[B, S, 64] a, float[B, S, 64] b) => (float[B, S, S2] y) {
    [node] y = Einsum <equation = "bij,bkj->bik"> (a, b)
}"""
NORM = """(float[B, S, 64] a) => (float[B, S, 64] y, float[B, S, 1] z) <float[64] g, int64[1] last> {
    [node] y = LayerNormalization <axis = -1> (a, g)
    z = ReduceMax (y, last)
}"""
INT4_GROUPS = """(float[B, 16, 128] x) => (float[B, 16, 32] y)
<int4[128, 32] w, float[1, 32] w_scale, float[16] g, float[16] b> {
    [weight] dw = DequantizeLinear <axis = 0, block_size = 128> (w, w_scale)
    p = MatMul (x, dw)
    [node] y = Identity (p)
}"""
SCAN = """(float[4, 64] a, float[S, 4, 64] xs) => (float[4, 64] y, float[S, 4, 64] ys) {
    [loop] y, ys = Scan <num_scan_inputs = 1, body = step (float[4, 64] s, float[4, 64] v)
        => (float[4, 64] s_out, float[4, 64] v_out) {
        [add] t = Add (s, v)
        [end] s_out = Tanh (t)
        v_out = Identity (s_out)
    }> (a, xs)
}"""
CALL = """(float[B, S, 64] a, float[B, S, 64] b) => (float[B, S, 64] y) {
    [call] y = local.Blend (a, b)
}
<domain: "local", opset_import: ["" : OPSET]> Blend (p, q) => (r) {
    half = Constant <value = float {0.5}> ()
    s = Add (p, q)
    [halve] r = Mul (s, half)
}"""
INSIDE = "call/halve"


@dataclass(frozen=True)
class Case:
    """A graph: legal, or made illegal by `change`.

    Attributes:
        name: of the case.
        text: a legal graph.
        rule: the rule it violates; empty for a legal one.
        node: the node that the violation must name.
        change: replacements in `text`; without them it is legal.
        values: of initializers, by name; an illegal value is in `wrong`.
        refused: what tensorrt-rtx 1.7, a later version, says to it (a part); empty where it gives a plan.
        also: further rules that fall with it.
    """

    name: str
    text: str
    rule: str = ""
    node: str = ""
    change: Changes = ()
    values: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, Any] = field(default_factory=dict)
    opset: int = 19
    wrong_opset: int | None = None
    refused: str = ""
    also: tuple[str, ...] = ()

    def legal(self) -> onnx.ModelProto:
        return build(self.text, self.opset, self.values)

    def model(self) -> onnx.ModelProto:
        text = self.text
        for old, new in self.change:
            assert old in text, (self.name, old)
            text = text.replace(old, new)
        return build(text, self.wrong_opset or self.opset, {**self.values, **self.wrong})


def build(text: str, opset: int, values: dict[str, Any]) -> onnx.ModelProto:
    """The model of `text`, its initializers filled in."""
    domains = ', "local": 1, "other": 1' if "local" in text else ""
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]> g '
    model = onnx.parser.parse_model(header + text.replace("OPSET", str(opset)))
    for info in model.graph.value_info:
        kind = info.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        given = values.get(info.name)
        array = _fill(info.name, kind.elem_type, shape) if given is None else np.broadcast_to(given, shape)
        array = array.astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        model.graph.initializer.append(numpy_helper.from_array(array, info.name))
    del model.graph.value_info[:]
    return model


def _fill(name: str, kind: int, shape: list[int]) -> np.ndarray:
    if name.endswith(("_scale", "_zero")):
        return np.full(shape, 0.05 if name.endswith("_scale") else 0)
    rng = np.random.default_rng(len(name) + sum(shape))
    if kind in INTEGERS:
        return rng.integers(0, INTEGERS[kind] + 1, shape)
    return rng.standard_normal(shape)


def in_type(text: str, dtype: str) -> str:
    """The same graph with another floating-point type."""
    return text.replace("float[", f"{dtype}[").replace("float ", f"{dtype} ")


def element(index: int, wrong: float, size: int = 32) -> np.ndarray:
    """Scales of which one is wrong."""
    scales = np.full(size, 0.05)
    scales[index] = wrong
    return scales


SHAPE = {"shape": [-1, 64]}
LEGAL = [
    *(
        Case(f"{name} {dtype} opset {opset}", in_type(text, dtype), opset=opset, values=values)
        for dtype in ("float", "float16", "bfloat16")
        for name, text, values, opset in (
            ("plain", PLAIN, {}, 18),
            ("w8a8", W8A8, {}, 19),
            ("w8", W8, {}, 19),
            ("w8 transposed", W8_TRANSPOSED, {}, 19),
            ("batched", BATCHED, {}, 19),
            ("batched w8a8", BATCHED_W8A8, {}, 19),
            ("embedding", EMBEDDING, {}, 19),
            ("tied", TIED, SHAPE, 19),
            ("tied twice", TIED_TWICE, SHAPE, 19),
            ("int4", INT4, {}, 21),
        )
    ),
    *(Case(f"{name} opset 18", text, opset=18) for name, text in (("w8a8", W8A8), ("w8", W8))),
    Case("fenced", FENCED),
    Case("w8 half", W8_HALF),
    Case("int4 blocks of 64", INT4.replace("128", "64").replace("[2, 32]", "[4, 32]"), opset=21),
    Case("int4 without zero point", INT4.replace(", w_zero)", ")"), opset=21),
    Case("w8a8 without weight zero point", W8A8.replace("w_scale, w_zero)", "w_scale)")),
    Case("w8a8 opset 20", W8A8, opset=20),
]
