"""Removal of nodes and initializers that are not read, and of Identity.

Cases:
1. A node none of whose outputs is read, and an initializer that is not.
2. An optional output that is not read: its name becomes empty, so that a runtime does not compute it.
3. Identity: its readers read its input. It stays between a graph input and a graph output, and where both
   its ends are graph outputs.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from ...graph.values import count_nodes


def drop_unused(model: ir.Model) -> int:
    """Apply the pass in place; returns how many nodes and their outputs went away."""
    before = _size(model.graph)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return before - _size(model.graph)


def _size(graph: ir.Graph) -> int:
    outputs = [value for node in graph if node.op_type != "Constant" for value in node.outputs]
    return count_nodes(graph) + sum(value.name != "" for value in outputs)
