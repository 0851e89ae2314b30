"""The value at the end of each block is called `hidden_<block>`, so that a graph can be cut there.

Tracing marks it with a node `xlstm::Boundary`, which no other pass moves across. This pass runs last.

Cases:
1. A marked value that is computed in the graph takes the name; readers of the marker read it.
2. A graph input or output, a weight, or a value that has such a name already: an Identity takes the
   marker's place, and its output the name.
3. A marker that is a graph output itself: as above, and an Identity with the output's own name follows.
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.cut import MARKER, PREFIX
from ...graph.values import typed
from ...specs import OP_DOMAIN


def name_boundaries(model: ir.Model) -> int:
    """Apply the pass in place; returns how many markers went away."""
    graph = model.graph
    markers = [node for node in graph if node.domain == OP_DOMAIN and node.op_type == MARKER]
    for marker in markers:
        value, result = marker.inputs[0], marker.outputs[0]
        assert value is not None
        name = f"{PREFIX}{marker.attributes['block'].as_int()}"
        if not _may_be_renamed(value):  # case 2
            value = _identity(graph, marker, value)
        value.name = name
        if result.is_graph_output():  # case 3
            node = ir.node("Identity", [value])
            ir.convenience.replace_nodes_and_values(graph, marker, [marker], [node], [result], node.outputs)
        else:
            result.replace_all_uses_with(value)
            graph.remove(marker, safe=True)
    return len(markers)


def _may_be_renamed(value: ir.Value) -> bool:
    fixed = value.is_graph_input() or value.is_graph_output() or value.is_initializer()
    return not fixed and not (value.name or "").startswith(PREFIX)


def _identity(graph: ir.Graph, marker: ir.Node, value: ir.Value) -> ir.Value:
    node = ir.node("Identity", [value])
    graph.insert_before(marker, node)
    return typed(node.outputs[0], value, value.shape)
