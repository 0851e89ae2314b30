"""Compute an output for the last position only: prefill then pays for the head once, not S times.

Cases:
1. Walking up from the output, every operator that treats positions alike and has one computed input
   (products with weights, norms over the last axis, elementwise functions) is passed over.
2. The chain Reshape → Gemm → Reshape of a tied head is passed over as one step.
3. At the first other operator a Slice of the last position is put in, and the chain reads it instead.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import BuildError

POSITIONWISE = frozenset(
    [
        "MatMul",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "LayerNormalization",
        "Tanh",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Relu",
        "Erf",
        "Exp",
        "Identity",
        "Cast",
    ]
)


def keep_last_position(model: ir.Model, output: str) -> None:
    """Apply the pass in place to the graph output named `output`, shaped (B, S, ...).

    Raises:
        BuildError: the output has no sequence axis.
    """
    graph = model.graph
    result = next(value for value in graph.outputs if value.name == output)
    if result.shape is None or len(result.shape) < 3 or str(result.shape[1]) != "S":
        raise BuildError(f"--last-logits: output {output} has no sequence axis", "leave the option away")
    source, chain = result, []
    while (step := _step_up(source)) is not None:
        source, nodes = step
        chain += nodes
    if not chain:
        return
    start, end, axis = (_constant(v) for v in (-1, np.iinfo(np.int64).max, 1))
    cut = ir.node("Slice", [source, start.outputs[0], end.outputs[0], axis.outputs[0]])
    graph.insert_before(chain[-1], [start, end, axis, cut])
    for node in chain:
        for index, value in enumerate(node.inputs):
            if value is source:
                node.replace_input_with(index, cut.outputs[0])
    result.shape = ir.Shape([result.shape[0], 1, *list(result.shape)[2:]])


def _step_up(value: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """The value one position-wise step above `value` and the nodes between, the topmost last."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Reshape":
        return _tied_head(node)
    computed = [x for x in node.inputs if x is not None and ir.convenience.get_const_tensor(x) is None]
    if node.op_type not in POSITIONWISE or len(computed) != 1 or computed[0].is_graph_input():
        return None
    return computed[0], [node]


def _tied_head(back: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    gemm = back.inputs[0].producer() if back.inputs[0] is not None else None
    flat = gemm.inputs[0].producer() if gemm is not None and gemm.inputs[0] is not None else None
    if gemm is None or gemm.op_type != "Gemm" or flat is None or flat.op_type != "Reshape":
        return None
    x = flat.inputs[0]
    assert x is not None
    # The target shape reads x as well (Shape → Concat), and must read the cut x.
    shapes = [use.node for use in x.uses() if use.node.op_type == "Shape"]
    return x, [back, gemm, *shapes, flat]


def _constant(value: int) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array([value], dtype=np.int64))})
