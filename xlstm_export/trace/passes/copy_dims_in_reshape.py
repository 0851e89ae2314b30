"""Reshape(x, [B, S, constants]) with B, S read by Shape nodes → Reshape(x, [0, 0, constants]).

A zero copies the dimension of the data, so the shape becomes a constant and the Shape → Concat chain
goes away.

Cases:
1. The shape is a Concat of pieces, each a constant or `Shape(start, end)` of a graph input. Every such Shape
   is at the index of the dimension it reads, and the data has the same symbol at that index: zero.
2. A piece that reads a dimension the data does not have at that index: the node is left alone.
3. `allowzero=1` is removed from such a node, so TensorRT 10.3 does not need to support it.
4. Where tracing lost the shape of the result, the pass sets it: later passes need it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def copy_dims_in_reshape(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Reshape nodes changed."""
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        target = constant_target(node.inputs[0], node.inputs[1])
        if target is None:
            continue
        shape = ir.node("Constant", [], {"value": ir.tensor(np.array(target, dtype=np.int64))})
        graph.insert_before(node, shape)
        node.replace_input_with(1, shape.outputs[0])
        node.attributes.pop("allowzero", None)
        _note_shape(node, target)
        count += 1
    return count


def _note_shape(node: ir.Node, target: list[int]) -> None:
    data, result = node.inputs[0], node.outputs[0]
    assert data is not None
    assert data.shape is not None
    before = list(result.shape) if result.shape is not None else [None] * len(target)
    dims = [data.shape[i] if want == 0 else want if want > 0 else before[i] for i, want in enumerate(target)]
    result.shape = ir.Shape(dims)


def constant_target(data: ir.Value, shape: ir.Value) -> list[int] | None:
    """The target [0, 0, constants] that is equivalent to `shape` for `data`; None where there is none."""
    concat = shape.producer()
    if concat is None or concat.op_type != "Concat" or data.shape is None:
        return None
    target: list[int] = []
    for piece in concat.inputs:
        if piece is None:
            return None
        constant = ir.convenience.get_const_tensor(piece)
        if constant is not None:
            values = constant.numpy().ravel().tolist()
            if 0 in values:
                return None
            target += values
            continue
        symbol = _dimension_read(piece)
        index = len(target)
        if symbol is None or index >= len(data.shape) or str(data.shape[index]) != symbol:
            return None
        target.append(0)
    return target


def _dimension_read(piece: ir.Value) -> str | None:
    """The symbol of the single dimension that `piece` = Shape(x, start, start + 1) reads."""
    node = piece.producer()
    if node is None or node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(node.inputs[0].shape))
    dim = node.inputs[0].shape[start]
    # A dimension without a symbol is not known to equal any other.
    known = isinstance(dim, int) or dim.value is not None
    return str(dim) if end == start + 1 and known else None
