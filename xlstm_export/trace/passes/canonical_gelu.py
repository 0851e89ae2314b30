"""The exact GELU in the order that runtimes recognize: x · (1 + erf(x / √2)) · ½.

torch writes x · (½ · (1 + erf(x / √2))), which ONNX Runtime does not fuse into one kernel. Halving is exact,
so both orders give the same bits.

Cases:
1. x · (½ · a), where a = erf(x / √2) + 1 and both products are read once: (x · a) · ½.
2. Anything else: left alone.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ...graph.values import only_reader, producer, scalar, typed


def canonical_gelu(model: ir.Model) -> int:
    """Apply the pass in place; returns how many activations changed."""
    count = 0
    for node in list(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type == "Mul":
            count += any(_reorder(model.graph, node, first) for first in (0, 1))
    return count


def _reorder(graph: ir.Graph, node: ir.Node, first: int) -> bool:
    x, halved = node.inputs[first], producer(node.inputs[1 - first], "Mul")
    if halved is None or [only_reader(halved.outputs[0])] != [node]:
        return False
    half, a = _constant_first(halved)
    if half is None or a is None or scalar(half) != 0.5 or not _is_one_plus_erf(a, x):
        return False
    product = ir.node("Mul", [x, a])
    typed(product.outputs[0], node.outputs[0], node.outputs[0].shape)
    result = ir.node("Mul", [product.outputs[0], half])
    ir.convenience.replace_nodes_and_values(
        graph, node, [node, halved], [product, result], node.outputs, result.outputs
    )
    return True


def _is_one_plus_erf(value: ir.Value, x: ir.Value | None) -> bool:
    add = producer(value, "Add")
    one, rest = _constant_first(add) if add else (None, None)
    erf = producer(rest, "Erf")
    div = producer(erf.inputs[0], "Div") if erf else None
    root = scalar(div.inputs[1]) if div else None
    if div is None or root is None or div.inputs[0] is not x:
        return False
    return scalar(one) == 1 and math.isclose(root, math.sqrt(2), rel_tol=1e-6)


def _constant_first(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The two operands, the constant one of one element first."""
    a, b = node.inputs
    return (a, b) if scalar(a) is not None else (b, a)
