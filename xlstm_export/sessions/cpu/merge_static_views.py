"""Merge chains of views into at most one Reshape each, where every shape is known.

A view is an operator whose output holds the same elements in the same order as its input: Reshape, Squeeze,
Unsqueeze, Flatten, Identity, and a Transpose that moves only dimensions of size 1 (most of them do when
one position of one stream is computed).

Cases:
1. A chain of views that ends in the shape it started with: its consumers read the start.
2. Any other chain: one Reshape from the start to the shape at the end, shared by all chains that need it.
3. A view whose input or output shape is not fully known, or whose output is a graph output: left alone,
   but it reads through the views before it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.values import static_shape

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


def merge_static_views(model: ir.Model) -> int:
    """Apply the pass in place; returns how many nodes went away. Unused nodes are removed with it."""
    graph = model.graph
    before = len(list(graph))
    reshaped: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        if not _is_view(node) or node.outputs[0].is_graph_output():
            continue
        result, shape = node.outputs[0], static_shape(node.outputs[0])
        start = _start(node)
        if shape is None or static_shape(start) is None:
            continue
        if static_shape(start) == shape:
            result.replace_all_uses_with(start)
            continue
        key = (start, shape)
        if key not in reshaped:
            target = ir.node("Constant", [], {"value": ir.tensor(np.array(shape, dtype=np.int64))})
            view = ir.node("Reshape", [start, target.outputs[0]])
            view.outputs[0].shape, view.outputs[0].type = ir.Shape(shape), result.type
            graph.insert_before(node, [target, view])
            reshaped[key] = view.outputs[0]
        result.replace_all_uses_with(reshaped[key])
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return before - len(list(graph))


def _is_view(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type in VIEWS:
        return True
    shape = static_shape(node.inputs[0])
    if node.op_type != "Transpose" or shape is None:
        return False
    perm = node.attributes["perm"].as_ints()
    moved = [axis for axis in perm if shape[axis] != 1]
    return moved == sorted(moved)


def _start(node: ir.Node) -> ir.Value:
    """The value the chain of views that ends in `node` starts from."""
    value = node.inputs[0]
    assert value is not None
    producer = value.producer()
    while producer is not None and _is_view(producer) and static_shape(producer.inputs[0]) is not None:
        value = producer.inputs[0]
        assert value is not None
        producer = value.producer()
    return value
