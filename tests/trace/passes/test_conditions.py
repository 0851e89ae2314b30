"""The pass manager: it ends, and no pass breaks a graph without an error that names it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from textgraph import model_of, random

from xlstm_export.errors import BuildError
from xlstm_export.trace import passes
from xlstm_export.trace.passes.conditions import defects

SIGNATURE = "(float[B, 4] x) => (float[B, 4] y)"
BODY = "a = Neg (x) b = Exp (a) y = Mul (b, w)"


@pytest.fixture
def model() -> ir.Model:
    return model_of(SIGNATURE, BODY, w=random(4))


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def test_passes_that_undo_each_other_are_an_error(model: ir.Model) -> None:
    rounds = []

    def there_and_back(model: ir.Model) -> int:
        rounds.append(1)
        return 1

    def idle(model: ir.Model) -> int:
        return 0

    with pytest.raises(BuildError, match="there_and_back still find") as caught:
        passes.run_passes(model, (there_and_back, idle))
    assert "idle" not in caught.value.message
    assert len(rounds) == passes.MAX_ROUNDS


def drops_a_node(model: ir.Model) -> int:
    node = node_of(model, "Exp")
    node.outputs[0].replace_all_uses_with(ir.Value(name="nowhere"))
    return 1


def moves_a_node_behind_its_reader(model: ir.Model) -> int:
    node = node_of(model, "Neg")
    model.graph.remove(node)
    model.graph.append(node)
    return 1


def renames_the_output(model: ir.Model) -> int:
    model.graph.outputs[0].name = "z"
    return 1


def changes_the_type_of_the_output(model: ir.Model) -> int:
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    return 1


def loses_an_input(model: ir.Model) -> int:
    model.graph.inputs.pop()
    return 1


def loses_a_weight(model: ir.Model) -> int:
    model.graph.initializers["w"].const_value = None
    return 1


def gives_an_output_of_nothing(model: ir.Model) -> int:
    old = model.graph.outputs[0]
    model.graph.outputs[0] = ir.Value(name="y", type=old.type, shape=old.shape)
    return 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (drops_a_node, "Mul reads nowhere before anything gives it"),
        (moves_a_node_behind_its_reader, "Exp reads a before anything gives it"),
        (renames_the_output, "changed inputs or outputs of the graph: y, z"),
        (changes_the_type_of_the_output, "changed inputs or outputs of the graph: y"),
        (loses_an_input, "changed inputs or outputs of the graph: x"),
        (loses_a_weight, "the weight w has no value"),
        (gives_an_output_of_nothing, "nothing gives the output y"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_pass_that_breaks_the_graph_is_named(broken: passes.Pass, message: str, model: ir.Model) -> None:
    with pytest.raises(BuildError) as caught:
        passes.run_passes(model, (broken,))
    assert f"the graph pass {broken.__name__}" in caught.value.message
    assert message in caught.value.message


def test_the_last_pass_is_checked_too(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "name_boundaries", renames_the_output)
    with pytest.raises(BuildError, match="renames_the_output"):
        passes.run_passes(model)


def test_a_graph_without_shapes_is_refused(model: ir.Model) -> None:
    model.graph.outputs[0].shape = None
    with pytest.raises(BuildError, match="gives y no type or shape"):
        passes.run_passes(model)


def test_a_broken_graph_is_refused(model: ir.Model) -> None:
    moves_a_node_behind_its_reader(model)
    with pytest.raises(BuildError, match="tracing left a broken graph"):
        passes.run_passes(model)


def test_bodies_see_what_is_outside() -> None:
    body = """
        t = Constant <value = bool {1}> ()
        y = If <then_branch = a () => (p) { p = Neg (x) }, else_branch = b () => (q) { q = Exp (x) }> (t)
    """
    model = model_of(SIGNATURE, body)
    assert not list(defects(model.graph))
    branch = node_of(model, "If").attributes["then_branch"].as_graph()
    branch[0].replace_input_with(0, ir.Value(name="nowhere"))
    assert list(defects(model.graph)) == ["Neg reads nowhere before anything gives it"]
