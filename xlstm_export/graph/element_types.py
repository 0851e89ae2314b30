"""Element types of every value of an ONNX graph, valid or not, from ONNX's operator schemas.

A checker cannot rely on the types that an exporter declared, and must not stop at the first mismatch as
ONNX's inference does: where operands disagree, the type of the first one is used. Function bodies are
walked once per combination of argument types, because a file has no types for the values inside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

Type: TypeAlias = ir.DataType | None
_BY_NAME = {
    f"tensor({name.lower()})": ir.DataType(number) for name, number in onnx.TensorProto.DataType.items()
}


@dataclass(frozen=True)
class TypedNode:
    """A node with the types of its inputs and outputs; None for an unknown type or an input left out.

    Attributes:
        where: its name, after the names of the calls and Scans around it.
        scope: graph or function it is in.
        shared: inputs that must have one type: type variable of the ONNX schema → their indices.
    """

    node: ir.Node
    where: str
    scope: ir.Graph | ir.Function
    inputs: tuple[Type, ...]
    outputs: tuple[Type, ...]
    shared: dict[str, tuple[int, ...]] = field(default_factory=dict)


def typed_nodes(model: ir.Model) -> tuple[list[TypedNode], dict[ir.Value, ir.DataType]]:
    """All nodes, inside functions and subgraphs too, and the types of the values of the main graph."""
    walker = _Walker(model)
    types: dict[ir.Value, ir.DataType] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        found = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
        if found is not None:
            types[value] = found
    walker.graph(model.graph, types, "")
    return walker.nodes, types


class _Walker:
    def __init__(self, model: ir.Model) -> None:
        self.nodes: list[TypedNode] = []
        self._model = model
        self._opset = model.opset_imports.get("", 1)
        self._calls: dict[tuple[Any, ...], tuple[Type, ...]] = {}

    def graph(self, scope: ir.Graph | ir.Function, types: dict[ir.Value, ir.DataType], where: str) -> None:
        """Walk one scope. `types` has the types of its inputs and of outer values; those found are added."""
        if isinstance(scope, ir.Graph):
            for value in scope.initializers.values():
                if value not in types and value.const_value is not None:
                    types[value] = value.const_value.dtype
        for node in scope:
            inputs = tuple(None if value is None else types.get(value) for value in node.inputs)
            typed = self._node(node, scope, inputs, types, where + label(node))
            self.nodes.append(typed)
            types.update((v, t) for v, t in zip(node.outputs, typed.outputs, strict=False) if t is not None)

    def _node(
        self,
        node: ir.Node,
        scope: ir.Graph | ir.Function,
        inputs: tuple[Type, ...],
        types: dict[ir.Value, ir.DataType],
        where: str,
    ) -> TypedNode:
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            return TypedNode(node, where, scope, inputs, self._call(function, inputs, where))
        if node.op_type == "Scan":
            given = self._body(node.attributes["body"].as_graph(), inputs, types, where)
            return TypedNode(node, where, scope, inputs, given)
        if node.op_type == "Loop":
            first = (ir.DataType.INT64, ir.DataType.BOOL)
            given = self._body(node.attributes["body"].as_graph(), first + inputs[2:], types, where)
            return TypedNode(node, where, scope, inputs, given[1:])
        if node.op_type == "If":
            branches = [node.attributes[f"{name}_branch"].as_graph() for name in ("then", "else")]
            given, _ = [self._body(branch, (), types, where) for branch in branches]
            return TypedNode(node, where, scope, inputs, given)
        shared, outputs = self._plain(node, inputs)
        return TypedNode(node, where, scope, inputs, outputs, shared)

    def _call(self, function: ir.Function, inputs: tuple[Type, ...], where: str) -> tuple[Type, ...]:
        key = (function.identifier(), inputs)
        if key not in self._calls:
            self._calls[key] = (None,) * len(function.outputs)  # a function that calls itself ends here
            types = {v: t for v, t in zip(function.inputs, inputs, strict=False) if t is not None}
            self.graph(function, types, f"{where}/")
            self._calls[key] = tuple(types.get(value) for value in function.outputs)
        return self._calls[key]

    def _body(
        self, body: ir.Graph, inputs: tuple[Type, ...], types: dict[ir.Value, ir.DataType], where: str
    ) -> tuple[Type, ...]:
        inner = {**types, **{v: t for v, t in zip(body.inputs, inputs, strict=False) if t is not None}}
        self.graph(body, inner, f"{where}/")
        return tuple(inner.get(value) for value in body.outputs)

    def _plain(
        self, node: ir.Node, inputs: tuple[Type, ...]
    ) -> tuple[dict[str, tuple[int, ...]], tuple[Type, ...]]:
        schema = _schema(node.op_type, self._opset) if node.domain in ("", "ai.onnx") else None
        if schema is None:
            return {}, (None,) * len(node.outputs)
        shared: dict[str, tuple[int, ...]] = {}
        bound: dict[str, ir.DataType] = {}
        for index, found in enumerate(inputs):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if found is not None and formal.is_homogeneous and formal.type_str not in _BY_NAME:
                shared[formal.type_str] = (*shared.get(formal.type_str, ()), index)
                bound.setdefault(formal.type_str, found)
        outputs: list[Type] = []
        for index in range(len(node.outputs)):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            outputs.append(_BY_NAME.get(formal.type_str) or bound.get(formal.type_str))
        outputs[0] = _by_attribute(node, inputs) or outputs[0]
        return shared, tuple(outputs)


def label(node: ir.Node) -> str:
    """Label of a node for messages: its name or, without one, its operator and first output."""
    return node.name or f"{node.op_type} → {node.outputs[0].name}"


def ancestors(value: ir.Value | None, through: tuple[str, ...]) -> Iterator[ir.Node]:
    """The nodes a value comes from, nearest first: back through the first input of operators in `through`."""
    while value is not None and (node := value.producer()) is not None:
        yield node
        if node.op_type not in through:
            return
        value = node.inputs[0]


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node, through a Cast."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type == "Cast":
        return constant(node.inputs[0])
    attribute = node.attributes.get("value") if node.op_type == "Constant" else None
    return attribute.as_tensor() if attribute is not None and not attribute.is_ref() else None


@cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None  # newer than the opset, or no operator of ONNX


def _by_attribute(node: ir.Node, inputs: tuple[Type, ...]) -> Type:
    """The type of a result that an attribute decides."""
    kind = node.op_type
    for name in ("to", "dtype", "output_dtype"):
        attribute = node.attributes.get(name)
        if attribute is not None and not attribute.is_ref() and attribute.as_int():
            return ir.DataType(attribute.as_int())
    if kind in ("Constant", "ConstantOfShape"):
        for name, attribute in node.attributes.items():
            if name == "value":
                return None if attribute.is_ref() else attribute.as_tensor().dtype
            if name.startswith("value_"):
                return ir.DataType.INT64 if name.startswith("value_int") else ir.DataType.FLOAT
        return ir.DataType.FLOAT
    if kind == "QuantizeLinear" and len(inputs) < 3:
        return ir.DataType.UINT8
    if kind == "DequantizeLinear" and len(inputs) > 1:
        return inputs[1]
    return None
