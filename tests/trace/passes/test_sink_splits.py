"""A Split moves behind what all its parts go through."""

from __future__ import annotations

import pytest
from textgraph import check_exact, model_of, operators, random

from xlstm_export.trace.passes.sink_splits import sink_splits

X = {"x": random(2, 3, 6)}
CONSTANTS = """
    cap = Constant <value = float {15.0}> ()
    other = Constant <value = float {14.0}> ()
    cap_1 = Constant <value = float[1] {15.0}> ()
"""
CAP = "{out}_d = Div({x}, {c})\n {out}_t = Tanh({out}_d)\n {out} = Mul({out}_t, {c})\n"


def gates(first: str, second: str) -> str:
    return f"""
        {CONSTANTS}
        p, q = Split <axis = -1, num_outputs = 2> (x)
        {first}
        {second}
        """


def test_soft_cap_runs_once() -> None:
    body = gates(CAP.format(x="p", out="a", c="cap"), CAP.format(x="q", out="b", c="cap")) + "y = Add(a, b)"
    model = model_of("(float[B, S, 6] x) => (float[B, S, 3] y)", body)
    assert check_exact(model, sink_splits, X, fused=True) == 3
    assert operators(model) == {"Div": 1, "Tanh": 1, "Mul": 1, "Split": 1, "Add": 1}


def test_constants_that_stand_later_come_along() -> None:
    """Each gate has its own copy of the number, the second gate's after the first's Split."""
    cap_2 = "cap_2 = Constant <value = float {15.0}> ()\n"
    first, second = CAP.format(x="p", out="a", c="cap_2"), CAP.format(x="q", out="b", c="cap")
    body = gates(cap_2 + first, second) + "y = Add(a, b)"
    model = model_of("(float[B, S, 6] x) => (float[B, S, 3] y)", body)
    assert check_exact(model, sink_splits, X) == 3


@pytest.mark.parametrize(
    ("first", "second", "fired"),
    [
        (CAP.format(x="p", out="a", c="cap"), CAP.format(x="q", out="b", c="other"), 0),
        ("a = Tanh(p)", "b = Sigmoid(q)", 0),
        ("a = Sub(p, cap)", "b = Sub(cap, q)", 0),
        ("a = Mul(p, cap)", "b = Mul(q, cap_1)", 1),  # one element of either rank
        ("a = Mul(p, p)", "b = Mul(q, q)", 0),  # read twice
        ("a = Tanh(p)", "b0 = Tanh(q)\n b = Mul(b0, q)", 0),
        ("a = Softmax <axis = -1> (p)", "b = Softmax <axis = -1> (q)", 0),  # not elementwise
    ],
)
def test_only_equal_operators(first: str, second: str, fired: int) -> None:
    model = model_of("(float[B, S, 6] x) => (float[B, S, 3] y)", gates(first, second) + "y = Add(a, b)")
    assert check_exact(model, sink_splits, X) == fired


@pytest.mark.parametrize(("axis", "moved"), [(-1, 2), (2, 1), (1, 3)])
def test_transpose_takes_the_axis_along(axis: int, moved: int) -> None:
    model = model_of(
        "(float[2, 4, 6, 8] x) => (float y)",
        f"""
        p, q = Split <axis = {axis}, num_outputs = 2> (x)
        a = Transpose <perm = [0, 2, 3, 1]> (p)
        b = Transpose <perm = [0, 2, 3, 1]> (q)
        c = Tanh(a)
        d = Mul(c, b)
        y = ReduceSum <keepdims = 0> (d)
        """,
    )
    assert check_exact(model, sink_splits, {"x": random(2, 4, 6, 8)}) == 1
    (split,) = (node for node in model.graph if node.op_type == "Split")
    assert split.attributes["axis"].as_int() == moved
    assert operators(model)["Transpose"] == 1


def test_unequal_parts_and_three_of_them() -> None:
    model = model_of(
        "(float[B, S, 6] x) => (float y)",
        """
        w = Constant <value_ints = [1, 2, 3]> ()
        p, q, r = Split <axis = -1> (x, w)
        a = Neg(p)
        b = Neg(q)
        c = Neg(r)
        d = Concat <axis = -1> (c, a, b)
        y = ReduceSum <keepdims = 0> (d)
        """,
    )
    assert check_exact(model, sink_splits, X) == 2
    assert operators(model)["Neg"] == 1


@pytest.mark.parametrize(
    "outputs", ["float[B, S, 3] p, float[B, S, 3] b", "float[B, S, 3] a, float[B, S, 3] b"]
)
def test_outputs_are_left_alone(outputs: str) -> None:
    model = model_of(
        f"(float[B, S, 6] x) => ({outputs})",
        "p, q = Split <axis = -1, num_outputs = 2> (x)\n a = Tanh(p)\n b = Tanh(q)",
    )
    assert check_exact(model, sink_splits, X) == 0
