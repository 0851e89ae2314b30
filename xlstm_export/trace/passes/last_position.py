"""Compute an output for the last position only: prefill then runs the head for one position, not for S.

Cases:
1. Going up from the output, the pass skips every operator that treats all positions alike and has one
   computed input (products with weights, norms over later axes, elementwise functions).
2. The chain Reshape → Gemm → Reshape of a tied head is skipped as one step.
3. At the first other operator, and at a value that another node reads too, a Slice of the last position is
   inserted, and the chain reads it instead.
4. Where nothing could be skipped, the output itself is sliced.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...errors import BuildError

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
        timed = result.shape is not None and any(str(dim).endswith("S") for dim in result.shape)
        why = "has its positions elsewhere than in its second axis" if timed else "has no sequence axis"
        raise BuildError(f"--last-logits: output {output} {why}", "leave the option away")
    source: ir.Value = result
    chain: list[ir.Node] = []
    while _read_only_by(source, chain, result) and (step := _step_up(source)) is not None:
        source, nodes = step
        chain += nodes
    start, end, axis = (_constant(v) for v in (-1, np.iinfo(np.int64).max, 1))
    cut = ir.node("Slice", [source, start.outputs[0], end.outputs[0], axis.outputs[0]])
    shape = ir.Shape([result.shape[0], 1, *list(result.shape)[2:]])
    if not chain:
        graph.extend([start, end, axis, cut])
        sliced = cut.outputs[0]
        result.name, sliced.name = f"{output}_all", output
        sliced.shape, sliced.type = shape, result.type
        graph.outputs[list(graph.outputs).index(result)] = sliced
        return
    graph.insert_before(chain[-1], [start, end, axis, cut])
    for node in chain:
        for index, value in enumerate(node.inputs):
            if value is source:
                node.replace_input_with(index, cut.outputs[0])
    result.shape = shape


def _read_only_by(value: ir.Value, chain: list[ir.Node], result: ir.Value) -> bool:
    """Whether only the chain reads `value`, so that it may hold the last position only."""
    return (value is result or not value.is_graph_output()) and all(use.node in chain for use in value.uses())


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
    if node.op_type in ("Softmax", "LayerNormalization"):
        axis = node.attributes.get_int("axis", -1)
        if axis != -1 and (axis if axis >= 0 or value.shape is None else axis + len(value.shape)) < 2:
            return None
    if node.op_type == "MatMul" and node.inputs[0] is not computed[0]:
        return None
    return computed[0], [node]


def _tied_head(back: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    gemm = _producer(back.inputs[0], "Gemm")
    flat = _producer(gemm.inputs[0], "Reshape") if gemm else None
    concat = _producer(back.inputs[1], "Concat")
    lead = _producer(concat.inputs[0], "Shape") if concat else None
    if gemm is None or flat is None or concat is None or lead is None or lead.inputs[0] is not flat.inputs[0]:
        return None
    # The target shape must be computed from the sliced x too, so no other node may read it.
    if any(len(list(node.outputs[0].uses())) > 1 for node in (gemm, flat, concat, lead)):
        return None
    x = flat.inputs[0]
    assert x is not None
    return x, [back, gemm, lead, flat]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _constant(value: int) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array([value], dtype=np.int64))})
