"""Element types of every value of a graph, inside function bodies and Scan bodies too.

ONNX's own inference does not report types inside bodies, and the files carry none for inner values. The rules
are few because exported graphs use few operators; an operator that is not in the table gives the type of its
first input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

BOOLEAN = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor"))
Types = dict[ir.Value, ir.DataType]


@dataclass(frozen=True)
class TypedNode:
    """A node with the types of what it reads and gives.

    Attributes:
        where: path to it: name of the node, behind those of the calls and Scans around it.
        inputs, outputs: None for an input that is left away.
    """

    node: ir.Node
    where: str
    inputs: tuple[ir.DataType | None, ...]
    outputs: tuple[ir.DataType, ...]


def typed_nodes(model: ir.Model) -> Iterator[TypedNode]:
    """Every node of the graph; a call of a function is followed by the nodes of its body."""
    types: Types = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        found = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
        assert found is not None, value.name
        types[value] = found
    yield from _walk(model, model.graph, types, {}, "")


def _walk(
    model: ir.Model,
    graph: ir.Graph | ir.Function,
    types: Types,
    outer: Types,
    where: str,
) -> Iterator[TypedNode]:
    for node in graph:
        name = f"{where}{node.name or node.op_type}"
        inputs = tuple(_type_of(value, types, outer) for value in node.inputs)
        outputs, inner = _outputs(model, node, inputs, {**outer, **types}, name)
        types.update(zip(node.outputs, outputs, strict=False))
        yield TypedNode(node, name, inputs, outputs)
        yield from inner


def _type_of(value: ir.Value | None, types: Types, outer: Types) -> ir.DataType | None:
    if value is None:
        return None
    found = types.get(value) or outer.get(value)
    if found is None and value.const_value is not None:
        found = value.const_value.dtype
    assert found is not None, value.name
    return found


def _outputs(
    model: ir.Model, node: ir.Node, inputs: tuple[ir.DataType | None, ...], scope: Types, name: str
) -> tuple[tuple[ir.DataType, ...], list[TypedNode]]:
    function = model.functions.get(node.op_identifier())
    if function is not None:
        return _call(model, function, inputs, name)
    if node.op_type == "Scan":
        return _scan(model, node, inputs, scope, name)
    return tuple(_plain(node, inputs) for _ in node.outputs), []


def _call(
    model: ir.Model, function: ir.Function, inputs: tuple[ir.DataType | None, ...], name: str
) -> tuple[tuple[ir.DataType, ...], list[TypedNode]]:
    types = {v: t for v, t in zip(function.inputs, inputs, strict=False) if t is not None}
    inner = list(_walk(model, function, types, {}, f"{name}/"))
    return tuple(types[value] for value in function.outputs), inner


def _scan(
    model: ir.Model, node: ir.Node, inputs: tuple[ir.DataType | None, ...], scope: Types, name: str
) -> tuple[tuple[ir.DataType, ...], list[TypedNode]]:
    body = node.attributes["body"].as_graph()
    types: Types = {v: t for v, t in zip(body.inputs, inputs, strict=True) if t is not None}
    inner = list(_walk(model, body, types, scope, f"{name}/"))
    return tuple(types.get(v) or scope[v] for v in body.outputs), inner


def _plain(node: ir.Node, inputs: Mapping[int, ir.DataType] | tuple[ir.DataType | None, ...]) -> ir.DataType:
    kind = node.op_type
    if kind in BOOLEAN:
        return ir.DataType.BOOL
    if kind in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero"):
        return ir.DataType.INT64
    if kind == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if kind in ("Constant", "ConstantOfShape"):
        return _constant(node)
    index = {"CastLike": 1, "Where": 1, "DequantizeLinear": 1, "QuantizeLinear": 2}.get(kind, 0)
    found = inputs[index] if index < len(inputs) else None
    if kind == "QuantizeLinear" and found is None:
        return ir.DataType.UINT8
    assert found is not None, node
    return found


def _constant(node: ir.Node) -> ir.DataType:
    for name, attribute in node.attributes.items():
        if name == "value":
            tensor = attribute.as_tensor()
            return tensor.dtype
        if name in ("value_float", "value_floats"):
            return ir.DataType.FLOAT
        if name in ("value_int", "value_ints"):
            return ir.DataType.INT64
    return ir.DataType.FLOAT
