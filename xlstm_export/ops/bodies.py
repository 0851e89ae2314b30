"""The two recurrence operators as ONNX function bodies of standard operators (opset 18).

With these bodies a file runs in ONNX Runtime, and in TensorRT without plugins. TensorRT 10.3's parser
limits the operators of a body: Scan but no If on the sequence length, no CumSum (it becomes a loop), no
ReduceLogSumExp (it overflows), no Trilu. So a sum over the positions of a chunk is a product with a
constant triangular matrix.

Each operator has two bodies. The sequence body takes any S and is what an exported file carries. The
step body takes S = 1 only, and has no Scan and no shape arithmetic; a session that decodes may use it
instead. Both are written in the ONNX text format and compute the functions of `reference.py` in FP32. Casts
from and to other element types are left out where everything is FP32.

The texts are in `mlstm_body.py` and `slstm_body.py`. Change a body together with `reference.py`; tests
compare each with the FP64 recurrence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Literal

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass

from ..specs import OP_DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION
from . import mlstm_body as mlstm
from . import slstm_body as slstm
from .operands import MLSTM, SLSTM, Operator

OPSET = 18

Form = Literal["sequence", "step"]


@cache
def mlstm_function(
    form: Form = "sequence",
    *,
    given: frozenset[str] = frozenset(),
    cast: bool = False,
    rows: bool = False,
) -> onnx.FunctionProto:
    """FunctionProto of `XlstmMlstm`; see `reference.mlstm` for what it computes, `operands.py` for shapes.

    Args:
        form: which body.
        given: attributes that any call has; without them the body computes what their default values mean.
        cast: whether q, k, v or the state may be of another type than FP32.
        rows: whether calls differ in their batch, see `attach`.
    """
    body = mlstm.step(given) if form == "step" else mlstm.sequence(given)
    return _function(MLSTM, _any_batch(body) if rows else body, given, cast)


@cache
def slstm_function(
    form: Form = "sequence",
    *,
    given: frozenset[str] = frozenset(),
    cast: bool = False,
    rows: bool = False,
) -> onnx.FunctionProto:
    """FunctionProto of `XlstmSlstm`; see `reference.slstm` for what it computes, `operands.py` for shapes.

    Args:
        form: which body.
        given: attributes that any call has; without them the body saves operators per position.
        cast: whether x, R or the state may be of another type than FP32.
        rows: whether calls differ in their batch, see `attach`.
    """
    body = slstm.step(given) if form == "step" else slstm.sequence(given)
    return _function(SLSTM, _any_batch(body) if rows else body, given, cast)


def functions_of(
    nodes: Iterable[ir.Node], form: Form = "sequence", *, cast: bool = False, rows: bool = False
) -> list[onnx.FunctionProto]:
    """The bodies that recurrence operators of a graph need; other nodes count for nothing."""
    calls = [node for node in nodes if node.domain == OP_DOMAIN]
    bodies = []
    for operator, function in ((MLSTM, mlstm_function), (SLSTM, slstm_function)):
        names = [set(node.attributes) for node in calls if node.op_type == operator.name]
        if names:
            bodies.append(function(form, given=operator.given(set().union(*names)), cast=cast, rows=rows))
    return bodies


def attach(model: ir.Model, *, cast: bool = False, rows: bool = False) -> None:
    """Give each recurrence operator of a graph its sequence body, at the opset of the graph.

    Args:
        model: changed in place.
        cast: whether q, k, v, R or C may be of another type than FP32.
        rows: whether a cell has another batch than the graph's inputs, because something is folded into it.
            Bodies that the graph has for this already are replaced by such ones.
    """
    rows = rows or any(map(_takes_any_batch, model.functions.values()))
    for proto in functions_of(model.graph, cast=cast, rows=rows):
        function = ir.serde.deserialize_function(proto)
        # Nothing a body uses has changed its meaning since OPSET, only the types it may have.
        function.opset_imports[""] = model.opset_imports.get("") or OPSET
        model.functions[function.identifier()] = function
    model.graph.opset_imports[OP_DOMAIN] = 1


def _any_batch(body: str) -> str:
    """A body whose loops do not name their batch: to ONNX Runtime equal names in a graph are equal sizes."""
    return body.replace("float[B, ", "float[?, ")


def _takes_any_batch(function: ir.Function) -> bool:
    bodies = [
        a.as_graph()
        for node in function
        for a in node.attributes.values()
        if a.type == ir.AttributeType.GRAPH
    ]
    shapes = [value.shape for body in bodies for value in body.inputs if value.shape]
    return any(not isinstance(shape[0], int) and shape[0].value is None for shape in shapes)


def _function(operator: Operator, body: str, given: frozenset[str], cast: bool) -> onnx.FunctionProto:
    if not cast:
        body = re.sub(r"Cast <to = 1> \((\w+)\)", r"Identity(\1)", body)
        body = re.sub(r"CastLike\((\w+), \w+\)", r"Identity(\1)", body)
    inputs, outputs = (", ".join(x.name for x in side) for side in (operator.required, operator.outputs))
    function = onnx.parser.parse_function(
        f'<domain: "{OP_DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{operator.name} ({inputs}) => ({outputs})\n{{\n{body}\n}}"
    )
    function = _finish_body(function)
    # Attached here and not in the text, which cannot express an infinite default.
    attributes: dict[str, float | str] = {
        "plugin_version": PLUGIN_VERSION,
        "plugin_namespace": PLUGIN_NAMESPACE,
    }
    attributes |= {x.name: x.default for x in operator.attributes if x.declared or x.name in given}
    for key, value in sorted(attributes.items()):
        function.attribute_proto.append(onnx.helper.make_attribute(key, value))
    return function


def _finish_body(proto: onnx.FunctionProto) -> onnx.FunctionProto:
    # No Scan body may have one value as two of its outputs: ONNX Runtime 1.32 then confuses the others.
    function = ir.serde.deserialize_function(proto)
    # Where a value of the graph has the name of a parameter, TensorRT's parser before 10.8 reads that value
    # instead; and many models have an input x.
    for value in function.inputs:
        value.name = f"{function.name}_{value.name}"
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10, functions=[function])
    IdentityEliminationPass()(model)
    return ir.serde.serialize_function(function)
