"""Helpers of the graph passes: properties of values, and the creation of new values and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from ..ops.operands import OPERATORS, Operator
from ..specs import OP_DOMAIN
from . import lazy

# onnx_ir has no type stubs here: a number or an ir.SymbolicDim.
Dim: TypeAlias = Any


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes `value`, if it is one of these standard operators."""
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in op_types:
        return None
    return node


def recurrence(node: ir.Node) -> Operator | None:
    """Which recurrence operator a node is; None for every other node."""
    return OPERATORS.get(node.op_type) if node.domain == OP_DOMAIN else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The only reader of `value`, where it reads the value once; else None."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is stored in the model and is no input or output of it."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and not value.is_graph_input()
        and not value.is_graph_output()
    )


def small_array(value: ir.Value | None) -> np.ndarray | None:
    """The values of a small constant; None for anything else, large weights included."""
    if value is None or not lazy.is_small(value):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The value of a constant of one element."""
    array = small_array(value)
    return float(array.ravel()[0]) if array is not None and array.size == 1 else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The values of a small integer constant."""
    array = small_array(value)
    return [int(x) for x in array.ravel()] if array is not None and array.dtype.kind == "i" else None


def size(value: ir.Value | None, index: int) -> int | None:
    """The length of one dimension, where it is a number."""
    if value is None or value.shape is None or not -len(value.shape) <= index < len(value.shape):
        return None
    dim = value.shape[index]
    return dim if isinstance(dim, int) else None


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are known to be equal; one without a name is not known to equal any other."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return a.value is not None and a.value == b.value


def constant(array: Sequence[int] | np.ndarray) -> ir.Node:
    """A Constant node; integers become INT64."""
    tensor = ir.tensor(np.asarray(array))
    node = ir.node("Constant", [], {"value": tensor})
    node.outputs[0].shape, node.outputs[0].type = tensor.shape, ir.TensorType(tensor.dtype)
    return node


def typed(value: ir.Value, like: ir.Value, shape: Sequence[Dim] | None) -> ir.Value:
    """`value` with the element type of `like` and with `shape`, which later passes need."""
    value.type = like.type
    value.shape = None if shape is None else ir.Shape(shape)
    return value


def fresh_name(graph: ir.Graph, name: str) -> str:
    """`name`, or `name.2`, `name.3`, ... where an initializer has it already."""
    candidate, number = name, 2
    while candidate in graph.initializers:
        candidate, number = f"{name}.{number}", number + 1
    return candidate


def count_nodes(graph: ir.Graph) -> int:
    """Number of nodes without Constant nodes, whose number differs from pass to pass."""
    return sum(node.op_type != "Constant" for node in graph)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value whose dimensions are all known; None for any other."""
    if value is None or value.shape is None:
        return None
    known = tuple(dim for dim in value.shape if isinstance(dim, int))
    return known if len(known) == len(value.shape) else None
