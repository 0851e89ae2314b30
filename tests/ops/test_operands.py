"""The table of operands, and what else writes them in order: bodies, and signatures of the reference."""

from __future__ import annotations

import inspect

import pytest

from xlstm_export import specs
from xlstm_export.errors import UsageError
from xlstm_export.ops import bodies, reference
from xlstm_export.ops.operands import MLSTM, OPERATORS, SLSTM, Operator

NAN = float("nan")
BOTH = pytest.mark.parametrize("operator", [MLSTM, SLSTM], ids=lambda x: x.cell)
BODIES = {MLSTM.name: bodies.mlstm_function, SLSTM.name: bodies.slstm_function}


def test_order_and_states_are_those_of_the_contract() -> None:
    assert [x.name for x in MLSTM.inputs] == ["q", "k", "v", "i", "f", "C0", "n0", "m0"]
    assert [x.name for x in MLSTM.outputs] == ["h", "C", "n", "m"]
    assert MLSTM.states == ((5, 1), (6, 2), (7, 3))
    assert [x.name for x in SLSTM.required] == ["x", "R", "bias", "y0", "c0", "n0", "m0"]
    assert [x.name for x in SLSTM.outputs] == ["y", "y_n", "c_n", "n_n", "m_n"]
    assert SLSTM.states == ((3, 1), (4, 2), (5, 3), (6, 4))
    assert set(OPERATORS) == {"XlstmMlstm", "XlstmSlstm"}


def test_roles() -> None:
    def names(operator: Operator, indices: tuple[int, ...]) -> list[str]:
        return [operator.inputs[index].name for index in indices]

    assert names(MLSTM, MLSTM.gates) == ["i", "f"]
    assert names(SLSTM, SLSTM.gates) == ["x", "bias"]
    assert names(MLSTM, MLSTM.values) == ["q", "k", "v"]
    assert names(SLSTM, SLSTM.values) == []
    assert MLSTM.weight is None
    assert SLSTM.weight == SLSTM.index("R") == 1
    assert SLSTM.index("R_scale") == 7


@BOTH
def test_operands_are_consistent(operator: Operator) -> None:
    assert [operator.index(x.name) for x in operator.inputs] == list(range(len(operator.inputs)))
    assert [operator.output(x.name) for x in operator.outputs] == list(range(len(operator.outputs)))
    # Optional inputs are the last ones, so that a node may leave them out.
    assert operator.required == operator.inputs[: len(operator.required)]
    states = {x.state for x in operator.inputs} - {None}
    assert states == {x.state for x in operator.outputs} - {None}
    assert states <= set(specs.STATE_KINDS)
    for before, after in operator.states:
        past, present = operator.inputs[before], operator.outputs[after]
        assert (past.axes, past.kind, past.state) == (present.axes, present.kind, present.state)
        assert operator.source(present) is past
    # Every axis of a result is one of an input.
    known = {axis for x in operator.required for axis in x.axes}
    assert {axis for x in operator.outputs for axis in x.axes} <= known


@BOTH
def test_an_unknown_operand_is_an_error(operator: Operator) -> None:
    with pytest.raises(KeyError):
        operator.index("h")
    with pytest.raises(KeyError):
        operator.output("q")


def test_result_takes_shape_and_type_from_its_source() -> None:
    assert MLSTM.source(MLSTM.outputs[0]) is MLSTM.inputs[MLSTM.index("v")]
    assert SLSTM.source(SLSTM.outputs[0]) is None  # x has one axis more


def test_shape() -> None:
    sizes = {"B": 2, "S": 3, "H": 5, "D": 7}
    assert SLSTM.inputs[SLSTM.index("x")].shape(sizes) == (2, 3, 4, 5, 7)
    assert SLSTM.inputs[SLSTM.index("R_scale")].shape(sizes) == (5, 4, 7)


@BOTH
@pytest.mark.parametrize("form", ["sequence", "step"])
def test_bodies(operator: Operator, form: bodies.Form) -> None:
    body = BODIES[operator.name](form)
    assert (body.domain, body.name) == (specs.OP_DOMAIN, operator.name)
    assert list(body.input) == [f"{operator.name}_{x.name}" for x in operator.required]
    assert list(body.output) == [x.name for x in operator.outputs]
    held = {a.name: a.f for a in body.attribute_proto if not a.name.startswith("plugin_")}
    assert held == pytest.approx({x.name: x.default for x in operator.attributes if x.declared})
    every = operator.given([x.name for x in operator.attributes])
    body = BODIES[operator.name](form, given=every)
    held = {a.name: a.f for a in body.attribute_proto if not a.name.startswith("plugin_")}
    assert held == pytest.approx({x.name: x.default for x in operator.attributes})


def test_reference_takes_the_operands_in_this_order() -> None:
    for function, operator in ((reference.mlstm, MLSTM), (reference.slstm, SLSTM)):
        parameters = list(inspect.signature(function).parameters.values())
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert positional == [*(x.name for x in operator.required if x.state is None), "state"]
        assert options == [x.name for x in operator.attributes]
        for attribute in operator.attributes:
            default = inspect.signature(function).parameters[attribute.name].default
            assert attribute.required == (default is inspect.Parameter.empty)
            assert attribute.required or default == attribute.default
            assert attribute.flag == isinstance(default, bool)


def test_a_node_has_what_is_required_and_what_is_no_default() -> None:
    plain = {x.name: x.default for x in MLSTM.attributes}
    assert MLSTM.written(plain) == {"scale": 1.0, "eps": 1e-6}
    assert MLSTM.written({**plain, "forget_exp": True}) == {"scale": 1.0, "eps": 1e-6, "forget_exp": 1.0}
    assert SLSTM.written({x.name: x.default for x in SLSTM.attributes}) == {}
    assert MLSTM.given({"scale", "normalize", "plugin_version"}) == {"normalize"}
    # TensorRT finds a plugin by its version; one that knows only the first attributes has the first alone.
    assert MLSTM.plugin_version({"scale", "eps"}) == SLSTM.plugin_version({"forget_max"}) == "1"
    assert MLSTM.plugin_version({"scale", "normalize"}) == SLSTM.plugin_version({"normalizer_min"}) == "2"


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        (MLSTM, "eps", -1.0),
        (MLSTM, "normalize", 2.0),
        (SLSTM, "normalizer_min", 1.5),
        (SLSTM, "forget_max", NAN),
    ],
)
def test_a_value_out_of_range_is_refused(operator: Operator, name: str, value: float) -> None:
    values = {x.name: x.default for x in operator.attributes}
    with pytest.raises(UsageError, match=rf"{name} of {operator.name} is {value:g}, expected"):
        operator.written({**values, name: value})
