"""Reshapes at any batch and length: one per view, none where the shape stays."""

from __future__ import annotations

import pytest
from textgraph import check_exact, constant_of, model_of, operators, random

from xlstm_export.trace.passes.merge_views import merge_views

X = [{"x": random(2, 5, 6)}, {"x": random(1, 1, 6)}]


def chain(first: str, second: str, result: str) -> str:
    return f"""
        s = Constant <value_ints = [{first}]> ()
        t = Constant <value_ints = [{second}]> ()
        a = Reshape(x, s)
        b = Reshape(a, t)
        {result} = Exp(b)
        """


@pytest.mark.parametrize(
    ("first", "second", "shape", "target"),
    [
        ("0, 0, 2, 3", "0, 0, 3, 2", "B, S, 3, 2", [0, 0, 3, 2]),
        ("0, 0, 2, 3", "0, 0, 3, -1", "B, S, 3, 2", [0, 0, 3, 2]),  # known: a number
        ("0, -1, 3", "0, -1, 2", "B, N, 2", [0, -1, 2]),  # unknown: still what is left
        ("0, 0, 2, 3", "0, 0, 0, 3, 1", "B, S, 2, 3, 1", [0, 0, 2, 3, 1]),  # the zero is a number there
        ("0, 0, 1, 6", "0, 0, 6, 1", "B, S, 6, 1", [0, 0, 6, 1]),
    ],
)
def test_chain_becomes_one(first: str, second: str, shape: str, target: list[int]) -> None:
    model = model_of(f"(float[B, S, 6] x) => (float[{shape}] y)", chain(first, second, "y"))
    assert check_exact(model, merge_views, *X) == 1
    assert operators(model) == {"Reshape": 1, "Exp": 1}
    assert constant_of(model, "Reshape") == target


def test_chain_back_to_the_start_goes_away() -> None:
    model = model_of("(float[B, S, 6] x) => (float[B, S, 6] y)", chain("0, 0, 2, 3", "0, 0, -1", "y"))
    assert check_exact(model, merge_views, *X) == 1
    assert operators(model) == {"Exp": 1}


@pytest.mark.parametrize("target", ["0, 0, 6", "0, 0, -1", "0, -1, 6", "-1, 0, 6"])
def test_reshape_to_the_same_shape_goes_away(target: str) -> None:
    model = model_of(
        "(float[B, S, 6] x) => (float[B, S, 6] y)",
        f"t = Constant <value_ints = [{target}]> ()\n a = Reshape(x, t)\n y = Exp(a)",
    )
    assert check_exact(model, merge_views, *X) == 1
    assert operators(model) == {"Exp": 1}


def test_middle_that_others_read_stays() -> None:
    """As behind the block-diagonal projections: heads and the flat value both read the Transpose."""
    model = model_of(
        "(float[B, S, 6] x) => (float[B, S, 6] y, float[B, S, 2, 3] z)",
        """
        s = Constant <value_ints = [0, 0, 3, 2]> ()
        flat = Constant <value_ints = [0, 0, 6]> ()
        heads = Constant <value_ints = [0, 0, 2, 3]> ()
        p = Reshape(x, s)
        q = Transpose <perm = [0, 1, 3, 2]> (p)
        a = Reshape(q, flat)
        b = Reshape(a, heads)
        y = Exp(a)
        z = Exp(b)
        """,
    )
    assert check_exact(model, merge_views, *X) == 1, "b reads q, and has the shape of q"
    assert operators(model) == {"Reshape": 2, "Transpose": 1, "Exp": 2}


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        ("-1, 3", "-1, 0", "N, 3"),  # the 0 is a 3, so this one goes
        ("0, -1", "-1, 0, 1", "N, M, 1"),  # the 0 is a product of dimensions of x
        ("-1, 3, 2", "0, -1", "N, 6"),  # likewise
    ],
)
def test_zero_that_x_cannot_say(first: str, second: str, shape: str) -> None:
    model = model_of(f"(float[B, S, 6] x) => (float[{shape}] y)", chain(first, second, "y"))
    merged = check_exact(model, merge_views, *X)
    assert operators(model)["Reshape"] == (1 if shape == "N, 3" else 2)
    assert merged == (1 if shape == "N, 3" else 0)


def test_empty_dimensions_and_outputs_are_left_alone() -> None:
    model = model_of(
        "(float[B, S, 6] x) => (float[B, S, 6] y, float[0, 6] z)",
        """
        t = Constant <value_ints = [0, 0, 6]> ()
        y = Reshape(x, t)
        none = Constant <value_ints = [0, 6]> ()
        start = Constant <value_ints = [0]> ()
        two = Constant <value_ints = [2]> ()
        e = Slice(x, start, start, start)
        a = Reshape <allowzero = 1> (e, none)
        b = Reshape <allowzero = 1> (a, none)
        z = Exp(b)
        """,
    )
    assert check_exact(model, merge_views, *X) == 0
