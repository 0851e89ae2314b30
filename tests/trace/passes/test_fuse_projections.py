"""Products that read one value: one product, equal to the bit, gates apart, weights never read."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from textgraph import check_exact, model_of, operators, random, run

from xlstm_export.graph import lazy
from xlstm_export.ops import bodies as functions
from xlstm_export.trace.passes.fuse_projections import fuse_projections, joined_name

# Rows K and widths N around what ONNX Runtime's kernels work in (16 and 32 columns, 128 and 256 rows).
SIZES = [
    (4, (1, 1)),
    (16, (2, 2)),
    (64, (32, 32, 64, 64)),
    (64, (4, 4)),
    (100, (100, 33, 7)),
    (128, (17, 64)),
    (129, (24, 24, 24, 24)),
    (257, (1, 1)),
    (512, (256, 256)),
    (1000, (64, 64, 128, 128)),
]
LENGTHS = [(2, 1), (1, 1), (2, 7), (2, 64)]


def projections(
    rows: int, widths: tuple[int, ...], *, bias: bool = False, blocks: int = 0
) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """Products of one x with weights of these widths, each followed by a Tanh, and inputs to try."""
    lead, block = ((blocks,), f"{blocks}, ") if blocks else ((), "")
    outputs = ", ".join(f"float[B, {block}S, {width}] y{j}" for j, width in enumerate(widths))
    body, weights = "", {}
    for j, width in enumerate(widths):
        weights[f"p{j}_weight"] = random(*lead, rows, width) + j
        body += f"m{j} = MatMul(x, p{j}_weight)\n"
        if bias:
            weights[f"p{j}_bias"] = random(width) + j
            body += f"a{j} = Add(m{j}, p{j}_bias)\n"
        body += f"y{j} = Tanh({'a' if bias else 'm'}{j})\n"
    model = model_of(f"(float[B, {block}S, {rows}] x) => ({outputs})", body, **weights)
    inputs = [{"x": random(B, *lead, S, rows)} for B, S in LENGTHS]
    return model, inputs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "widths"), SIZES)
def test_same_bits(rows: int, widths: tuple[int, ...], bias: bool) -> None:
    model, inputs = projections(rows, widths, bias=bias)
    assert check_exact(model, fuse_projections, *inputs, fused=True) == len(widths) - 1
    expected = {"MatMul": 1, "Split": 1, "Tanh": len(widths), **({"Add": 1} if bias else {})}
    assert operators(model) == expected
    assert len(model.graph.initializers) == 1 + bias


@pytest.mark.parametrize(("rows", "widths"), [(64, (64, 64)), (4, (4, 4)), (128, (128, 128)), (100, (2, 3))])
def test_same_bits_for_blocks_of_channels(rows: int, widths: tuple[int, ...]) -> None:
    model, inputs = projections(rows, widths, blocks=3)
    assert check_exact(model, fuse_projections, *inputs, fused=True) == len(widths) - 1
    assert operators(model)["MatMul"] == 1


@pytest.mark.parametrize(("rows", "widths"), [(129, (24, 24)), (256, (256, 256)), (16, (1, 1))])
def test_blocks_that_would_round_differently_are_left_alone(rows: int, widths: tuple[int, ...]) -> None:
    model, inputs = projections(rows, widths, blocks=3)
    assert check_exact(model, fuse_projections, *inputs) == 0


def test_the_kernel_still_sums_blocks_by_width() -> None:
    """What case 3 rests on; if this fails, more can be fused."""
    x, weight = random(2, 3, 7, 129), random(3, 129, 96)
    parts = model_of(
        "(float[2, 3, 7, 129] x) => (float[2, 3, 7, 24] y)", "y = MatMul(x, W)", W=weight[..., :24]
    )
    whole = model_of("(float[2, 3, 7, 129] x) => (float[2, 3, 7, 96] y)", "y = MatMul(x, W)", W=weight)
    assert (run(parts, {"x": x})[0] != run(whole, {"x": x})[0][..., :24]).any()


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = MatMul(x, V)\n b = MatMul(x, V)", {"MatMul": 2}),  # one weight twice
        ("a = MatMul(x, V)\n z = Neg(x)\n b = MatMul(z, W)", {"MatMul": 2, "Neg": 1}),  # another value
        ("a = MatMul(x, V)\n c = MatMul(x, W)\n b = Add(c, u)", {"MatMul": 2, "Add": 1}),  # one has a bias
        ("a = MatMul(x, V)\n w = Tanh(W)\n b = MatMul(x, w)", {"MatMul": 2, "Tanh": 1}),  # no weight
        ("a = MatMul(x, V)\n b = MatMul(V, W)", {"MatMul": 2}),
    ],
)
def test_others_are_left_alone(body: str, left: dict[str, int]) -> None:
    weights = {"V": random(4, 4), "W": random(4, 4) + 1, "u": random(4)}
    weights = {name: w for name, w in weights.items() if f"{name})" in body or f"({name}," in body}
    model = model_of("(float[4, 4] x) => (float[4, 4] y)", f"{body}\n y = Sub(a, b)", **weights)
    assert check_exact(model, fuse_projections, {"x": random(4, 4)}) == 0
    assert operators(model) == {**left, "Sub": 1}


def test_products_that_are_outputs_are_left_alone() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 4] y, float[B, 4] z, float[B, 4] a)",
        "y = MatMul(x, V)\n z = MatMul(x, W)\n m = MatMul(x, U)\n a = Add(m, b)",
        U=random(4, 4),
        V=random(4, 4),
        W=random(4, 4),
        b=random(4),
    )
    assert check_exact(model, fuse_projections, {"x": random(2, 4)}) == 0


def test_bias_on_either_side_and_shared() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 3] y)",
        "m = MatMul(x, V)\n n = MatMul(x, W)\n a = Add(b, m)\n c = Add(n, b)\n y = Sub(a, c)",
        V=random(4, 3),
        W=random(4, 3) + 1,
        b=random(3),
    )
    assert check_exact(model, fuse_projections, {"x": random(2, 4)}) == 1
    assert operators(model) == {"MatMul": 1, "Add": 1, "Split": 1, "Sub": 1}


def test_sum_with_something_else_is_no_bias() -> None:
    """A residual, and a bias of one element: the products are fused without them."""
    model = model_of(
        "(float[B, 4] x) => (float[B, 4] y)",
        "m = MatMul(x, V)\n n = MatMul(x, W)\n a = Add(x, m)\n c = Add(n, b)\n y = Sub(a, c)",
        V=random(4, 4),
        W=random(4, 4) + 1,
        b=random(1),
    )
    assert check_exact(model, fuse_projections, {"x": random(2, 4)}) == 1
    assert operators(model) == {"MatMul": 1, "Split": 1, "Add": 2, "Sub": 1}


def mlstm_with_gates() -> ir.Model:
    """q, k, v without and the gates with bias, or all alike; gates go through a soft cap."""
    text = """<ir_version: 10, opset_import: ["" : 18, "xlstm" : 1]>
        g (float[B, S, 8] x, float[B, 2, 4, 4] C, float[B, 2, 4] n, float[B, 2] m) => (float[B, S, 2, 4] h)
        {
            cap = Constant <value = float {15.0}> ()
            heads = Constant <value_ints = [0, 0, 2, 4]> ()
            q_m = MatMul(x, q_weight)
            i_m = MatMul(x, i_weight)
            k_m = MatMul(x, k_weight)
            f_m = MatMul(x, f_weight)
            v_m = MatMul(x, v_weight)
            i_d = Div(i_m, cap)
            i_t = Tanh(i_d)
            i = Mul(i_t, cap)
            f_d = Div(f_m, cap)
            f_t = Tanh(f_d)
            f = Mul(f_t, cap)
            q = Reshape(q_m, heads)
            k = Reshape(k_m, heads)
            v = Reshape(v_m, heads)
            h, C1, n1, m1 = xlstm.XlstmMlstm <scale = 0.5, eps = 1e-6> (q, k, v, i, f, C, n, m)
        }"""
    proto = onnx.parser.parse_model(text)
    for name, width in {"q": 8, "k": 8, "v": 8, "i": 2, "f": 2}.items():
        array = random(8, width)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}_weight"))
    proto.functions.append(functions.mlstm_function())
    return ir.from_proto(proto)


def test_gates_are_fused_among_themselves_only() -> None:
    model = mlstm_with_gates()
    x = {"x": random(2, 7, 8), "C": random(2, 2, 4, 4), "n": random(2, 2, 4), "m": random(2, 2)}
    before = run(model, x, as_written=True)
    assert fuse_projections(model) == 3
    np.testing.assert_array_equal(run(model, x, as_written=True)[0], before[0])
    assert list(model.graph.initializers) == ["q_weight+k_weight+v_weight", "i_weight+f_weight"]


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["b.0.q.weight", "b.0.k.weight", "b.0.v.weight"], "b.0.q+k+v.weight"),
        (["b.0.igate.bias", "b.0.fgate.bias"], "b.0.igate+fgate.bias"),
        (["q", "k"], "q+k"),
        (["a.q.weight", "a.x.y.weight"], "a.q+x.y.weight"),
        (["a.weight", "a.b.weight"], "a.+b.weight"),
        (["w.T", "v.T"], "w+v.T"),
    ],
)
def test_names_tell_the_sources(names: list[str], joined: str) -> None:
    assert joined_name(names) == joined


def test_a_name_that_is_taken_gets_a_number() -> None:
    model, _ = projections(4, (3, 3))
    taken = ir.Value(name="p0_weight+p1_weight", const_value=ir.tensor(random(3), name="taken"))
    model.graph.register_initializer(taken)
    fuse_projections(model)
    assert "p0_weight+p1_weight.2" in model.graph.initializers


def test_weights_are_not_read() -> None:
    """A model may be larger than the memory: values are joined when the file is written."""
    model, inputs = projections(64, (32, 48))
    before = run(model, inputs[0])
    reads = 0
    for value in model.graph.initializers.values():
        array: np.ndarray = value.const_value.numpy()

        def compute(array: np.ndarray = array) -> Any:
            nonlocal reads
            reads += 1
            return array

        value.const_value = lazy.lazy(compute, ir.DataType.FLOAT, array.shape, value.name)
    assert fuse_projections(model) == 1
    assert reads == 0
    for ours, theirs in zip(run(model, inputs[0]), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert reads > 0
