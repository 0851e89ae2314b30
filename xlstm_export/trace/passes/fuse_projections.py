"""Products that read one value are one product: the weights are joined along the output width.

Cases:
1. MatMul(x, W1), MatMul(x, W2), ... whose 2-D weights of one type are used nowhere else: one MatMul with
   the weights side by side, then one Split.
2. Each is followed by an Add of a 1-D bias, its only reader: the biases are joined too, with one Add before
   the Split. Products with and without bias are not mixed.
3. 3-D weights (one matrix per block of channels) with equal first dimensions: the same, along the last
   axis, where the products have at least 2 columns and at most 128 rows. Within these bounds, and for all
   2-D weights, the result is equal to the bit. Beyond them it is not: ONNX Runtime does not pack such
   weights, sums more rows in pieces whose size depends on the width, and has another kernel for a single
   column.
4. Products that reach the gate inputs `i`, `f` of XlstmMlstm through elementwise and shape operators only
   are fused with each other and never with other products: gates stay FP32 at every precision.
5. Products that are graph outputs, and weights used twice: left alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph import lazy
from ...graph.values import constant, fresh_name, is_weight, only_reader, recurrence, small_array, typed
from ...ops.operands import MLSTM

ELEMENTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Max", "Min", "Mul", "Neg", "Sub", "Tanh"}
SHAPE = {"Expand", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
UNPACKED_ROWS, UNPACKED_COLUMNS = 128, 2  # case 3; MlasGemmBatch of ONNX Runtime 1.20 to 1.32


class Projection(NamedTuple):
    """One product, with its bias where it has one."""

    matmul: ir.Node
    weight: ir.Value
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def result(self) -> ir.Value:
        return (self.add or self.matmul).outputs[0]

    @property
    def width(self) -> int:
        return int(self.weight.const_value.shape[-1])  # type: ignore[union-attr, arg-type]


def fuse_projections(model: ir.Model) -> int:
    """Apply the pass in place; returns how many products went away."""
    groups: dict[tuple[object, ...], list[Projection]] = {}
    for node in model.graph:
        found = _projection(node)
        if found is None:
            continue
        tensor = found.weight.const_value
        assert tensor is not None
        rows = tuple(tensor.shape)[:-1]
        key = (id(node.inputs[0]), found.bias is None, tensor.dtype, rows, _leads_to_gates(found.result))
        groups.setdefault(key, []).append(found)
    count = 0
    for group in groups.values():
        if len(group) > 1:
            _fuse(model.graph, group)
            count += len(group) - 1
    return count


def _projection(node: ir.Node) -> Projection | None:
    if node.domain not in ("", "ai.onnx") or node.op_type != "MatMul" or not is_weight(node.inputs[1]):
        return None
    weight, product = node.inputs[1], node.outputs[0]
    assert weight is not None
    if only_reader(weight) is not node or product.is_graph_output() or not _can_join(weight):
        return None
    add = only_reader(product)
    if add is None or add.op_type != "Add" or add.outputs[0].is_graph_output():
        return Projection(node, weight, None, None)
    bias = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    array = small_array(bias)
    width = weight.const_value.shape[-1]  # type: ignore[union-attr]
    if array is None or array.shape != (width,):
        return Projection(node, weight, None, None)
    return Projection(node, weight, add, bias)


def _can_join(weight: ir.Value) -> bool:
    shape = [int(dim) for dim in weight.const_value.shape]  # type: ignore[union-attr]
    if len(shape) == 3:
        return shape[1] <= UNPACKED_ROWS and shape[2] >= UNPACKED_COLUMNS
    return len(shape) == 2


def _leads_to_gates(value: ir.Value) -> bool:
    for node, index in value.uses():
        if recurrence(node) is MLSTM and index in MLSTM.gates:
            return True
        if node.op_type in ELEMENTWISE | SHAPE and any(_leads_to_gates(out) for out in node.outputs):
            return True
    return False


def _fuse(graph: ir.Graph, group: list[Projection]) -> None:
    first = group[0]
    x, like, shape = first.matmul.inputs[0], first.result, first.result.shape
    lead = None if shape is None else list(shape)[:-1]
    wide = None if lead is None else [*lead, sum(p.width for p in group)]
    nodes = [ir.node("MatMul", [x, _join(graph, [p.weight for p in group])])]
    if first.bias is not None:
        bias = _join(graph, [p.bias for p in group if p.bias is not None])
        nodes.append(ir.node("Add", [typed(nodes[0].outputs[0], like, wide), bias]))
    widths = constant(np.array([p.width for p in group], dtype=np.int64))
    fused = typed(nodes[-1].outputs[0], like, wide)
    split = ir.node("Split", [fused, widths.outputs[0]], {"axis": -1}, num_outputs=len(group))
    graph.insert_before(first.matmul, [*nodes, widths, split])
    for projection, part in zip(group, split.outputs, strict=True):
        typed(part, like, None if lead is None else [*lead, projection.width])
        projection.result.replace_all_uses_with(part)
        if projection.add is not None:
            graph.remove(projection.add, safe=True)
        graph.remove(projection.matmul, safe=True)
        for old in (projection.weight, projection.bias):
            if old is not None and old.is_initializer() and not old.uses():
                del graph.initializers[old.name]  # type: ignore[arg-type]


def _join(graph: ir.Graph, parts: list[ir.Value]) -> ir.Value:
    name = fresh_name(graph, joined_name([part.name or "weight" for part in parts]))
    tensors = [ir.convenience.get_const_tensor(part) for part in parts]
    axis = len(parts[0].shape or ()) - 1
    tensor = lazy.concatenated([t for t in tensors if t is not None], axis, name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def joined_name(names: list[str]) -> str:
    """block.q.weight, block.k.weight → block.q+k.weight."""
    split = [name.split(".") for name in names]
    shortest = min(len(parts) for parts in split)
    head = 0
    while head < shortest and len({parts[head] for parts in split}) == 1:
        head += 1
    tail = 0
    while tail < shortest - head and len({parts[-1 - tail] for parts in split}) == 1:
        tail += 1
    middle = "+".join(".".join(parts[head : len(parts) - tail]) for parts in split)
    return ".".join([*split[0][:head], middle, *split[0][len(split[0]) - tail :]])
