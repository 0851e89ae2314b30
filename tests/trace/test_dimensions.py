"""Names of dimensions: what torch writes of a length, and the advice where no name fits."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir
import pytest

from xlstm_export.errors import BuildError
from xlstm_export.trace.dimensions import name_dimensions


def graph(length: str, *outputs: str | int, batch: str = "s1") -> ir.Model:
    """A graph with an input (batch, length, 5) whose output has the given dimensions."""
    x = ir.Value(name="x", shape=ir.Shape([batch, length, 5]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [x])
    y = node.outputs[0]
    y.name, y.shape = "y", ir.Shape(outputs)
    return ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 18}), ir_version=10)


@pytest.mark.parametrize(
    ("declared", "dim", "expected"),
    [
        ("S", "s27", "S"),
        ("S", "s1", "B"),
        ("S", "2*s27", "2*S"),
        ("S", "3*s1", "3*B"),
        ("S", "Max(1, s27)", "S"),
        ("4*S", "s27", "4*S"),
        ("4*S", "(s27//4)", "S"),
        ("4*S", "(((s27 - 4)//4)) + 1", "S"),
        ("4*S", "(s27//2)", "2*S"),
        ("4*S", "s27 - s27 + 7", 7),
    ],
)
def test_lengths_of_outputs(declared: str, dim: str, expected: str | int) -> None:
    model = graph("s27", dim)
    name_dimensions(model, {"x": ("B", declared, 5)})
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == [str(expected)]
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["B", declared, "5"]


@pytest.mark.parametrize("dim", ["s1*s27", "s27 + 3", "Mod(s27, 4)", "u0", "s27**2", "f(s27)"])
def test_other_lengths_are_refused(dim: str) -> None:
    with pytest.raises(BuildError, match="neither fixed nor that of the input") as error:
        name_dimensions(graph("s27", dim), {"x": ("B", "S", 5)})
    assert "one position per input position" in error.value.hint


@pytest.mark.parametrize(("dim", "steps"), [("(s27//4)", 4), ("((s27 + 1)//2)", 2)])
def test_the_hint_says_what_to_declare(dim: str, steps: int) -> None:
    with pytest.raises(BuildError, match="neither fixed") as error:
        name_dimensions(graph("s27", dim), {"x": ("B", "S", 5)})
    (shown,) = re.findall(r"\{.*\}", error.value.hint)
    advice = ast.literal_eval(shown)
    assert advice == {"x": ("B", f"{steps}*S", 5)}
    model = graph("s27", dim)
    name_dimensions(model, advice)
    assert [str(d) for d in model.graph.outputs[0].shape or ()] == ["S"]
