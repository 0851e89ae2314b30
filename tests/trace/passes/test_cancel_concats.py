"""Concats of what was split, and Concats that run before a Reshape."""

from __future__ import annotations

import pytest
from textgraph import check_exact, model_of, operators, random

from xlstm_export.trace.passes.cancel_concats import cancel_concats

XZ = {"x": random(2, 3, 4), "z": random(2, 3, 4) + 1}
SPLITS = """
    p, q = Split <axis = -1, num_outputs = 2> (x)
    r, s = Split <axis = 2, num_outputs = 2> (z)
"""


@pytest.mark.parametrize(
    ("parts", "width", "left"),
    [
        ("p, q, r, s", 8, {"Concat": 1, "Exp": 1}),  # the gates of an sLSTM with a convolution
        ("p, q", 4, {"Exp": 1}),
        ("r, p, q", 6, {"Split": 1, "Concat": 1, "Exp": 1}),
        ("p, q, p, q", 8, {"Concat": 1, "Exp": 1}),
        ("q, p", 4, {"Split": 1, "Concat": 1, "Exp": 1}),  # another order
        ("p, r, q", 6, {"Split": 2, "Concat": 1, "Exp": 1}),  # not next to each other
        ("p, p", 4, {"Split": 1, "Concat": 1, "Exp": 1}),
    ],
)
def test_parts_of_a_split(parts: str, width: int, left: dict[str, int]) -> None:
    model = model_of(
        f"(float[B, S, 4] x, float[B, S, 4] z) => (float[B, S, {width}] y)",
        f"{SPLITS} c = Concat <axis = -1> ({parts})\n y = Exp(c)",
    )
    fires = left.get("Concat", 0) == 0 or left.get("Split", 0) < len({p in "pq" for p in parts.split(", ")})
    assert check_exact(model, cancel_concats, XZ) == fires
    assert operators(model) == left


def test_split_on_another_axis_stays() -> None:
    model = model_of(
        "(float[B, 4, 4] x) => (float[B, 2, 8] y)",
        "p, q = Split <axis = 1, num_outputs = 2> (x)\n c = Concat <axis = 2> (p, q)\n y = Exp(c)",
    )
    assert check_exact(model, cancel_concats, {"x": random(2, 4, 4)}) == 0


def test_whole_as_an_output_keeps_the_concat() -> None:
    model = model_of(
        "(float[B, S, 4] x) => (float[B, S, 4] y)",
        "p, q = Split <axis = -1, num_outputs = 2> (x)\n y = Concat <axis = -1> (p, q)",
    )
    assert check_exact(model, cancel_concats, {"x": random(2, 3, 4)}) == 1
    assert operators(model) == {"Concat": 1}


VIEWS = "(float[B, S, 2, 3] x, float[B, S, 4, 3] z, float[B, S, 2, 5] w) => (float[B, S, {}] y)"
VIEW_INPUTS = {"x": random(2, 3, 2, 3), "z": random(2, 3, 4, 3), "w": random(2, 3, 2, 5)}


def views(names: str, targets: str = "[0, 0, -1]", rest: str = "y = Exp(c)") -> str:
    lines = [f"t = Constant <value_ints = {targets}> ()"]
    lines += [f"{name}_v = Reshape({name}, t)" for name in names.split(", ")]
    parts = ", ".join(f"{name}_v" for name in names.split(", "))
    return "\n".join([*lines, f"c = Concat <axis = -1> ({parts})", rest])


def test_flattened_blocks_are_joined_first() -> None:
    model = model_of(VIEWS.format(18), views("x, z"))
    assert check_exact(model, cancel_concats, VIEW_INPUTS) == 1
    assert operators(model) == {"Concat": 1, "Reshape": 1, "Exp": 1}
    (concat,) = (node for node in model.graph if node.op_type == "Concat")
    assert concat.attributes["axis"].as_int() == 2
    assert check_exact(model, cancel_concats, VIEW_INPUTS) == 0


@pytest.mark.parametrize(
    ("names", "rest", "width"),
    [
        ("x, w", "y = Exp(c)", 16),  # blocks of another width
        ("x, z", "t2 = Tanh(x_v)\n y = Concat <axis = -1> (c, t2)", 24),  # x_v is read by others too
    ],
)
def test_other_views_are_left_alone(names: str, rest: str, width: int) -> None:
    model = model_of(VIEWS.format(width), views(names, rest=rest))
    assert check_exact(model, cancel_concats, VIEW_INPUTS) == 0


def test_view_that_splits_instead_is_left_alone() -> None:
    model = model_of(
        "(float[B, S, 6] x) => (float[B, S, 2, 6] y)",
        "t = Constant <value_ints = [0, 0, 2, 3]> ()\n a = Reshape(x, t)\n b = Reshape(x, t)\n"
        "c = Concat <axis = -1> (a, b)\n y = Exp(c)",
    )
    assert check_exact(model, cancel_concats, {"x": random(2, 3, 6)}) == 0
