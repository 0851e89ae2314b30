"""Dead nodes, dead outputs, Identity."""

from __future__ import annotations

from textgraph import check_exact, model_of, random

from xlstm_export.trace.passes.drop_unused import drop_unused


def test_dead_nodes_and_weights_go_away() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 4] y)", "a = Exp(x)\n b = Mul(a, W)\n y = Tanh(x)", W=random(4)
    )
    assert check_exact(model, drop_unused, {"x": random(2, 4)}) > 0
    assert [node.op_type for node in model.graph] == ["Tanh"]
    assert not model.graph.initializers
    assert check_exact(model, drop_unused, {"x": random(2, 4)}) == 0


def test_optional_output_that_nobody_reads_is_not_asked_for() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 4] y)",
        "y, mean, inverse = LayerNormalization <axis = -1> (x, W)",
        W=random(4),
    )
    assert check_exact(model, drop_unused, {"x": random(2, 4)}) == 2
    (norm,) = model.graph
    assert len(norm.outputs) == 1


def test_identity_goes_away_but_not_between_input_and_output() -> None:
    model = model_of(
        "(float[B, 4] x) => (float[B, 4] y, float[B, 4] z)", "a = Identity(x)\n y = Exp(a)\n z = Identity(x)"
    )
    check_exact(model, drop_unused, {"x": random(2, 4)})
    assert sorted(node.op_type for node in model.graph) == ["Exp", "Identity"]
