"""Expand to the shape the data has already: its readers read the data.

Cases:
1. Every dimension of the target is 1, or the size of the data's own dimension, as a constant or read from
   a value of the same symbol. torch expands every variance like this.
2. Any other Expand, and one at a graph output: left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.values import integers, size
from .copy_dims_in_reshape import constant_target


def drop_expands(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Expand nodes went away."""
    count = 0
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type != "Expand":
            continue
        data, result = node.inputs[0], node.outputs[0]
        if data is not None and _own_shape(data, node.inputs[1]) and not result.is_graph_output():
            result.replace_all_uses_with(data)
            model.graph.remove(node, safe=True)
            count += 1
    return count


def _own_shape(data: ir.Value, shape: ir.Value | None) -> bool:
    if shape is None or data.shape is None:
        return False
    target = constant_target(data, shape)
    if target is not None:  # zeros stand for dimensions of the data
        own = [want in (0, 1) or want == size(data, i) for i, want in enumerate(target)]
        return len(own) == len(data.shape) and all(own)
    fixed = integers(shape)
    if fixed is None or len(fixed) != len(data.shape):
        return False
    return all(want == 1 or want == size(data, index) for index, want in enumerate(fixed))
