"""Transpose(weight) of a linear layer is stored transposed instead of being computed at every load.

Cases:
1. An initializer consumed only by Transpose nodes of one permutation: replaced by an initializer named
   `<weight>.T`. The data is permuted while the file is written.
2. A 2-D initializer that other nodes read too (weights tied with an embedding table) and whose transpose
   feeds only MatMuls: each MatMul becomes Reshape → Gemm(transB=1) → Reshape on the one stored copy.
3. Anything else is left alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph import lazy


def fold_weight_transposes(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Transpose nodes went away."""
    graph = model.graph
    count = 0
    for weight in list(graph.initializers.values()):
        uses = list(weight.uses())
        nodes = [use.node for use in uses if use.node.op_type == "Transpose"]
        if not nodes or weight.is_graph_output():
            continue
        perms = {tuple(node.attributes["perm"].as_ints()) for node in nodes}
        if len(nodes) == len(uses) and len(perms) == 1:
            _store_transposed(graph, weight, nodes, perms.pop())
            count += len(nodes)
        elif perms == {(1, 0)} and all(_feeds_matmul_weight(node) for node in nodes):
            for node in nodes:
                _use_gemm(graph, weight, node)
            count += len(nodes)
    return count


def _store_transposed(graph: ir.Graph, weight: ir.Value, nodes: list[ir.Node], perm: tuple[int, ...]) -> None:
    source = weight.const_value
    assert source is not None
    assert weight.name is not None
    name = f"{weight.name}.T"
    view = lazy.transposed(source, perm, name)
    transposed = ir.Value(name=name, shape=view.shape, type=ir.TensorType(source.dtype), const_value=view)
    graph.register_initializer(transposed)
    for node in nodes:
        node.outputs[0].replace_all_uses_with(transposed)
        graph.remove(node, safe=True)
    del graph.initializers[weight.name]


def _feeds_matmul_weight(transpose: ir.Node) -> bool:
    uses = list(transpose.outputs[0].uses())
    return bool(uses) and all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses)


def _use_gemm(graph: ir.Graph, weight: ir.Value, transpose: ir.Node) -> None:
    width_out, width_in = (int(dim) for dim in weight.const_value.shape)  # type: ignore[union-attr]
    for use in list(transpose.outputs[0].uses()):
        matmul = use.node
        x, result = matmul.inputs[0], matmul.outputs[0]
        rank = len(result.shape or ())
        rows = ir.node("Constant", [], {"value": ir.tensor(np.array([-1, width_in]))})
        flat = ir.node("Reshape", [x, rows.outputs[0]])
        gemm = ir.node("Gemm", [flat.outputs[0], weight], {"transB": 1})
        lead = ir.node("Shape", [x], {"start": 0, "end": rank - 1})
        tail = ir.node("Constant", [], {"value": ir.tensor(np.array([width_out]))})
        shape = ir.node("Concat", [lead.outputs[0], tail.outputs[0]], {"axis": 0})
        back = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
        graph.insert_before(matmul, [rows, flat, gemm, lead, tail, shape, back])
        ir.convenience.replace_nodes_and_values(graph, matmul, [matmul], [], [result], [back.outputs[0]])
    graph.remove(transpose, safe=True)
