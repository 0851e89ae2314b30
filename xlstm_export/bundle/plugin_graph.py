"""Rewrites a graph for TensorRT's plugins: without function bodies, and with integer weights.

A function body runs where there is no plugin. Before 10.7 TensorRT prefers the body to a plugin, so bodies
are removed. A body computes in floats, so a quantized R of an sLSTM reaches it through a DequantizeLinear,
which TensorRT evaluates while it builds: the engine would hold R in FP32. The plugin reads integers, a
quarter of the bytes (`plugins/adapters/tensorrt/README.md`). Since 10.1 TensorRT allows an integer constant
as the direct input of a plugin of version 3 (NVIDIA/TensorRT issue 3919), and nowhere else.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph.values import recurrence
from ..ops.operands import SLSTM
from ..sessions.cpu.fused import drop_bodies

WEIGHT, SCALE = SLSTM.index("R"), SLSTM.index("R_scale")


def for_plugins(model: ir.Model) -> None:
    """Rewrite a graph in place; states, outputs and weights stay what they are."""
    drop_bodies(model)
    for node in list(model.graph):
        if recurrence(node) is SLSTM:
            _integers(model.graph, node)


def _integers(graph: ir.Graph, node: ir.Node) -> None:
    """Connect R (H, D, 4, D) as integers and its scale per column, if R comes from a DequantizeLinear."""
    weight = node.inputs[WEIGHT]
    dequantize = weight.producer() if weight is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return
    integer, scale = dequantize.inputs[:2]
    assert integer is not None, "R is no integer"
    assert scale is not None, "R has no scale"
    assert scale.const_value is not None, "the scale of R is computed"
    shape = [int(size) for size in integer.shape or ()]
    axis = dequantize.attributes["axis"].as_int()
    if integer.dtype != ir.DataType.INT8 or "block_size" in dequantize.attributes or axis % 4 != 3:
        return
    heads, dim = shape[0], shape[3]
    columns = np.broadcast_to(scale.const_value.numpy().astype(np.float32), (heads, 4, dim))
    name = f"{integer.name}.columns"
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(columns), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    node.replace_input_with(WEIGHT, integer)
    node.resize_inputs(SCALE + 1)
    node.replace_input_with(SCALE, graph.initializers[name])
    if not dequantize.outputs[0].uses():
        operands = dequantize.inputs
        graph.remove(dequantize, safe=True)
        for value in operands:
            if value is not None and not value.uses():
                del graph.initializers[value.name or ""]
