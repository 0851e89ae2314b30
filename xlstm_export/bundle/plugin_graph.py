"""The graph as TensorRT's plugins take it: without function bodies, integers as integers.

A body is what runs where there is no plugin. Before 10.7 TensorRT prefers it to one, so it has to go. And a
body computes in floats, so a quantized R of an sLSTM reaches it through a DequantizeLinear, which TensorRT
computes while it builds: the engine would hold R in FP32. The plugin reads integers, a quarter of the bytes
(`plugins/adapters/tensorrt/README.md`). TensorRT allows a constant of integers in front of a plugin of
version 3 since 10.1 (NVIDIA/TensorRT issue 3919), and only right in front of it.
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
    """R (H, D, 4, D) and its scale per column, where it comes out of a DequantizeLinear."""
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
