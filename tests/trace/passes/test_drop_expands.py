"""Expand: dropped where it expands nothing."""

from __future__ import annotations

import pytest
from textgraph import check_exact, model_of, operators, random

from xlstm_export.trace.passes.drop_expands import drop_expands

READ = """
    b = Shape <start = 0, end = 1> (x)
    s = Shape <start = 1, end = 2> (x)
"""


def test_expand_to_dimensions_read_from_the_data() -> None:
    model = model_of(
        "(float[B, S, 1] x) => (float[B, S, 1] y)",
        f"{READ} one = Constant <value_ints = [1]> ()\n t = Concat <axis = 0> (b, s, one)\n"
        "a = Expand(x, t)\n y = Exp(a)",
    )
    assert check_exact(model, drop_expands, {"x": random(2, 3, 1)}) == 1
    assert operators(model) == {"Exp": 1}


@pytest.mark.parametrize("target", ["2, 3, 1", "1, 3, 1", "1, 1, 1"])
def test_expand_to_constants(target: str) -> None:
    model = model_of(
        "(float[2, 3, 1] x) => (float[2, 3, 1] y)",
        f"t = Constant <value_ints = [{target}]> ()\n a = Expand(x, t)\n y = Exp(a)",
    )
    assert check_exact(model, drop_expands, {"x": random(2, 3, 1)}) == 1


@pytest.mark.parametrize(
    ("pieces", "shape"),
    [("b, s, four", "B, S, 4"), ("two, b, s, one", "2, B, S, 1"), ("b, n, one", "B, N, 1")],
)
def test_other_expands_are_left_alone(pieces: str, shape: str) -> None:
    model = model_of(
        f"(float[B, S, 1] x, float[B, N, 2] w) => (float[{shape}] y)",
        f"""{READ}
        n = Shape <start = 1, end = 2> (w)
        one = Constant <value_ints = [1]> ()
        two = Constant <value_ints = [2]> ()
        four = Constant <value_ints = [4]> ()
        t = Concat <axis = 0> ({pieces})
        a = Expand(x, t)
        y = Exp(a)
        """,
    )
    x = {"x": random(2, 1, 1), "w": random(2, 3, 2)}
    assert check_exact(model, drop_expands, x) == 0


def test_expand_that_is_an_output_stays() -> None:
    model = model_of("(float[2] x) => (float[2] y)", "t = Constant <value_ints = [2]> ()\n y = Expand(x, t)")
    assert check_exact(model, drop_expands, {"x": random(2)}) == 0
