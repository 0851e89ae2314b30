"""Views where every shape is known: at most one Reshape is left of a chain."""

from __future__ import annotations

from textgraph import model_of, operators, random, run, same

from xlstm_export.sessions.cpu.merge_static_views import merge_static_views


def test_chain_that_returns_to_its_shape_goes_away() -> None:
    model = model_of(
        "(float[1, 1, 6] x) => (float[1, 1, 6] y)",
        """
        s = Constant <value_ints = [1, 1, 2, 3]> ()
        a = Reshape(x, s)
        b = Transpose <perm = [0, 2, 1, 3]> (a)
        t = Constant <value_ints = [1, 1, -1]> ()
        c = Reshape(b, t)
        y = Exp(c)
        """,
    )
    x = {"x": random(1, 1, 6)}
    before = run(model, x)
    assert merge_static_views(model) > 0
    assert operators(model) == {"Exp": 1}
    same(run(model, x), before)


def test_chain_becomes_one_shared_reshape() -> None:
    model = model_of(
        "(float[1, 1, 6] x) => (float[2, 3] y, float[2, 3] z)",
        """
        s = Constant <value_ints = [1, 1, 2, 3]> ()
        t = Constant <value_ints = [2, 3]> ()
        zero = Constant <value_ints = [0]> ()
        a = Reshape(x, s)
        b = Squeeze(a, zero)
        c = Reshape(b, t)
        y = Exp(c)
        d = Flatten <axis = 3> (a)
        e = Reshape(d, t)
        z = Tanh(e)
        """,
    )
    x = {"x": random(1, 1, 6)}
    before = run(model, x)
    merge_static_views(model)
    assert operators(model) == {"Reshape": 1, "Exp": 1, "Tanh": 1}
    same(run(model, x), before)


def test_transpose_that_moves_data_is_no_view() -> None:
    model = model_of(
        "(float[1, 2, 3] x) => (float[1, 2, 3] y)",
        """
        a = Transpose <perm = [0, 2, 1]> (x)
        t = Constant <value_ints = [1, 2, 3]> ()
        b = Reshape(a, t)
        y = Exp(b)
        """,
    )
    x = {"x": random(1, 2, 3)}
    before = run(model, x)
    merge_static_views(model)
    assert operators(model) == {"Transpose": 1, "Reshape": 1, "Exp": 1}
    same(run(model, x), before)


def test_views_of_unknown_shape_and_outputs_are_left_alone() -> None:
    model = model_of(
        "(float[B, 6] x, float[1, 6] w) => (float[B, 2, 3] y, float[6] z)",
        """
        s = Constant <value_ints = [0, 2, 3]> ()
        y = Reshape(x, s)
        t = Constant <value_ints = [6]> ()
        z = Reshape(w, t)
        """,
    )
    x = {"x": random(4, 6), "w": random(1, 6)}
    before = run(model, x)
    assert merge_static_views(model) == 0
    same(run(model, x), before)


def test_output_reads_through_the_views_before_it() -> None:
    model = model_of(
        "(float[1, 6] x) => (float[6] y)",
        """
        s = Constant <value_ints = [2, 3]> ()
        a = Reshape(x, s)
        t = Constant <value_ints = [6]> ()
        y = Reshape(a, t)
        """,
    )
    x = {"x": random(1, 6)}
    before = run(model, x)
    merge_static_views(model)
    same(run(model, x), before)
    assert operators(model)["Reshape"] <= 2
