"""The function bodies of the two operators, each in a graph of a single node."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from xlstm_export.ops import bodies as functions
from xlstm_export.ops.operands import MLSTM, SLSTM
from xlstm_export.specs import OP_DOMAIN

BODIES = {
    "mlstm": functions.mlstm_function(),
    "mlstm cast": functions.mlstm_function(cast=True),
    "mlstm step": functions.mlstm_function("step"),
    "mlstm step cast": functions.mlstm_function("step", cast=True),
    "slstm": functions.slstm_function(),
    "slstm clamp": functions.slstm_function(given=frozenset({"forget_max"})),
    "slstm clamp cast": functions.slstm_function(given=frozenset({"forget_max"}), cast=True),
    "slstm step": functions.slstm_function("step"),
    "slstm step clamp": functions.slstm_function("step", given=frozenset({"forget_max"})),
    "slstm step clamp cast": functions.slstm_function("step", given=frozenset({"forget_max"}), cast=True),
}
# Symbolic dimensions as an exported graph has them: the body sees neither B nor S.
SHAPES = {
    "mlstm": {
        "q": ("B", "S", "H", "Dk"),
        "k": ("B", "S", "H", "Dk"),
        "v": ("B", "S", "H", "Dv"),
        "i": ("B", "S", "H"),
        "f": ("B", "S", "H"),
        "C": ("B", "H", "Dk", "Dv"),
        "n": ("B", "H", "Dk"),
        "m": ("B", "H"),
    },
    "slstm": {
        "x": ("B", "S", 4, "H", "D"),
        "R": ("H", "D", 4, "D"),
        "bias": (4, "H", "D"),
        **{kind: ("B", "H", "D") for kind in "ycnm"},
    },
}
OUTPUTS = {"mlstm": ("h", "C_out", "n_out", "m_out"), "slstm": ("ys", "y_out", "c_out", "n_out", "m_out")}


def build(
    body: str, types: tuple[tuple[str, int], ...] = (), attributes: tuple[tuple[str, float], ...] = ()
) -> onnx.ModelProto:
    """A graph of one operator node with its body; `types` names the inputs that are not FP32."""
    return _graph(body.split()[0], BODIES[body], types, dict(attributes))


def build_with(kind: str, form: functions.Form, attributes: dict[str, float]) -> onnx.ModelProto:
    """As `build`, with the body that these attributes need."""
    function, operator = (
        (functions.mlstm_function, MLSTM) if kind == "mlstm" else (functions.slstm_function, SLSTM)
    )
    return _graph(kind, function(form, given=operator.given(attributes)), (), attributes)


def _graph(
    kind: str,
    function: onnx.FunctionProto,
    types: tuple[tuple[str, int], ...],
    attributes: dict[str, float],
) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, dict(types).get(name, TensorProto.FLOAT), shape)
        for name, shape in SHAPES[kind].items()
    ]
    # The first output has the type of v or x, a state the type and shape of its incoming self.
    first, states = ("v", "Cnm") if kind == "mlstm" else ("x", "ycnm")
    shapes = [("B", "S", "H", "Dv" if kind == "mlstm" else "D"), *(SHAPES[kind][s] for s in states)]
    outputs = [
        helper.make_tensor_value_info(name, dict(types).get(source, TensorProto.FLOAT), shape)
        for name, source, shape in zip(OUTPUTS[kind], (first, *states), shapes, strict=True)
    ]
    node = helper.make_node(
        function.name, list(SHAPES[kind]), list(OUTPUTS[kind]), domain=OP_DOMAIN, **attributes
    )
    imports = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(OP_DOMAIN, 1)]
    graph = helper.make_graph([node], "single", inputs, outputs)
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
