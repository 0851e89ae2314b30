"""Transposes: two become one or none."""

from __future__ import annotations

from textgraph import check_exact, model_of, operators, random

from xlstm_export.trace.passes.cancel_transposes import cancel_transposes


def test_pair_that_undoes_itself_goes_away() -> None:
    model = model_of(
        "(float[2, 3, 4] x) => (float[2, 3, 4] y)",
        """
        a = Transpose <perm = [1, 2, 0]> (x)
        b = Transpose <perm = [2, 0, 1]> (a)
        y = Exp(b)
        """,
    )
    assert check_exact(model, cancel_transposes, {"x": random(2, 3, 4)}) == 1
    assert operators(model) == {"Exp": 1}


def test_pair_becomes_one() -> None:
    model = model_of(
        "(float[2, 3, 4] x) => (float[4, 2, 3] y)",
        """
        a = Transpose <perm = [1, 0, 2]> (x)
        y = Transpose <perm = [2, 1, 0]> (a)
        """,
    )
    assert check_exact(model, cancel_transposes, {"x": random(2, 3, 4)}) == 1
    assert operators(model) == {"Transpose": 1}


def test_without_perm_the_axes_are_reversed() -> None:
    model = model_of(
        "(float[2, 3, 4] x) => (float[2, 3, 4] y)", "a = Transpose(x)\n b = Transpose(a)\n y = Exp(b)"
    )
    assert check_exact(model, cancel_transposes, {"x": random(2, 3, 4)}) == 1
    assert operators(model) == {"Exp": 1}


def test_first_that_others_read_stays() -> None:
    model = model_of(
        "(float[2, 3] x) => (float[2, 3] y, float[3, 2] z)",
        """
        a = Transpose <perm = [1, 0]> (x)
        b = Transpose <perm = [1, 0]> (a)
        y = Exp(b)
        z = Exp(a)
        """,
    )
    assert check_exact(model, cancel_transposes, {"x": random(2, 3)}) == 1
    assert operators(model) == {"Transpose": 1, "Exp": 2}


def test_transpose_that_moves_nothing_goes_away() -> None:
    model = model_of("(float[2, 3] x) => (float[2, 3] y)", "a = Transpose <perm = [0, 1]> (x)\n y = Exp(a)")
    assert check_exact(model, cancel_transposes, {"x": random(2, 3)}) == 1
    assert operators(model) == {"Exp": 1}


def test_output_keeps_a_node_of_its_own() -> None:
    model = model_of(
        "(float[2, 3] x) => (float[2, 3] y)",
        "a = Transpose <perm = [1, 0]> (x)\n y = Transpose <perm = [1, 0]> (a)",
    )
    assert check_exact(model, cancel_transposes, {"x": random(2, 3)}) == 1
    assert operators(model) == {"Transpose": 1}
    assert check_exact(model, cancel_transposes, {"x": random(2, 3)}) == 0
