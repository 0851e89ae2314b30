"""Every layer norm over the last axis is one LayerNormalization.

Cases, in FP32:
1. d / sqrt(v + eps) or d · (1 / sqrt(v + eps)), where d = x − mean(x), v = mean(d²), both over the last
   axis, d² a product or a power, and v kept as a dimension of one or viewed as such: LayerNormalization of
   x with a scale of ones.
2. LayerNormalization whose scale is ones, read by one Mul with a constant of the normalized width: the
   constant becomes the scale. The same with Add where there is no bias. A following weight of another
   shape, (H, D) over heads, stays a Mul.
3. Values that other nodes read too, other axes, other element types: left alone.

Results differ by rounding: the sums are computed in another order.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.values import constant, fresh_name, integers, only_reader, producer, scalar, size, small_array


def fuse_layer_norm(model: ir.Model) -> int:
    """Apply the pass in place; returns the number of norms found plus the number of weights merged."""
    count = 0
    for node in list(model.graph):
        count += _fuse_decomposed(model.graph, node)
    for node in list(model.graph):
        count += _take_in_weights(model.graph, node)
    return count


def _fuse_decomposed(graph: ir.Graph, node: ir.Node) -> bool:
    found = _decomposed(node)
    if found is None:
        return False
    x, eps = found
    width = size(x, -1)
    if width is None or x.dtype != ir.DataType.FLOAT:
        return False
    ones = constant(np.ones(width, dtype=np.float32))
    norm = ir.node("LayerNormalization", [x, ones.outputs[0]], {"axis": -1, "epsilon": eps})
    ir.convenience.replace_nodes_and_values(graph, node, [node], [ones, norm], node.outputs, norm.outputs)
    return True


def _decomposed(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and eps, where `node` is the last step of case 1."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Div", "Mul"):
        return None
    for first, second in ((0, 1), (1, 0)) if node.op_type == "Mul" else ((0, 1),):
        x = _centered(node.inputs[first])
        root = node.inputs[second]
        if node.op_type == "Mul":
            inverse = producer(root, "Reciprocal")
            root = inverse.inputs[0] if inverse else None
        eps = _variance_eps(root, x) if x is not None else None
        if x is not None and eps is not None:
            return x, eps
    return None


def _centered(value: ir.Value | None) -> ir.Value | None:
    """x, where `value` is x − mean(x)."""
    sub = producer(value, "Sub")
    mean = producer(sub.inputs[1], "ReduceMean") if sub else None
    if sub is None or mean is None or mean.inputs[0] is not sub.inputs[0]:
        return None
    return sub.inputs[0] if _over_last_axis(mean) and mean.attributes.get_int("keepdims", 1) else None


def _variance_eps(root: ir.Value | None, x: ir.Value) -> float | None:
    """eps, where `root` is sqrt(mean((x − mean(x))²) + eps)."""
    sqrt = producer(root, "Sqrt")
    add = producer(sqrt.inputs[0], "Add") if sqrt else None
    if add is None:
        return None
    for first, second in ((0, 1), (1, 0)):
        eps = scalar(add.inputs[second])
        squared = _mean_input(add.inputs[first], x)
        if eps is not None and squared is not None and _squared(squared) is x:
            return eps
    return None


def _mean_input(value: ir.Value | None, x: ir.Value) -> ir.Value | None:
    """What `value` is the mean of over the last axis, of size one in `value`."""
    view = producer(value, "Reshape")
    mean = producer(view.inputs[0] if view else value, "ReduceMean")
    if mean is None or not _over_last_axis(mean):
        return None
    if view is None:
        return mean.inputs[0] if mean.attributes.get_int("keepdims", 1) else None
    # The variance lost its last dimension and a view adds it again: (0, 0, H, 1) or similar.
    target, rank = integers(view.inputs[1]), len(x.shape) if x.shape is not None else -1
    copies = target is not None and len(target) == rank and target[-1] == 1
    kept = copies and all(want in (0, size(x, i)) for i, want in enumerate(target[:-1]))  # type: ignore[index]
    return mean.inputs[0] if kept else None


def _squared(value: ir.Value) -> ir.Value | None:
    """x, where `value` is (x − mean(x))²."""
    node = producer(value, "Mul", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return _centered(node.inputs[0]) if scalar(node.inputs[1]) == 2 else None
    x = _centered(node.inputs[0])
    return x if x is not None and x is _centered(node.inputs[1]) else None


def _over_last_axis(mean: ir.Node) -> bool:
    x = mean.inputs[0]
    axes = integers(mean.inputs[1]) if len(mean.inputs) > 1 else None
    rank = len(x.shape) if x is not None and x.shape is not None else None
    return axes == [-1] or (rank is not None and axes == [rank - 1])


def _take_in_weights(graph: ir.Graph, norm: ir.Node) -> int:
    if norm.domain not in ("", "ai.onnx") or norm.op_type != "LayerNormalization":
        return 0
    if any(value.uses() or value.is_graph_output() for value in norm.outputs[1:]):
        return 0
    count = 0
    scale = small_array(norm.inputs[1])
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    if bias is None and scale is not None and (scale == 1).all():
        count += _take_in(graph, norm, "Mul", 1)
    if bias is None:
        count += _take_in(graph, norm, "Add", 2)
    return count


def _take_in(graph: ir.Graph, norm: ir.Node, op_type: str, index: int) -> bool:
    result, width = norm.outputs[0], size(norm.inputs[1], 0)
    node = only_reader(result)
    if node is None or node.op_type != op_type or node.outputs[0].is_graph_output():
        return False
    weight = node.inputs[1] if node.inputs[0] is result else node.inputs[0]
    array = small_array(weight)
    if weight is None or array is None or array.shape != (width,) or weight.dtype != result.dtype:
        return False
    norm.resize_inputs(max(len(norm.inputs), index + 1))
    norm.replace_input_with(index, _stored(graph, weight, array))
    node.outputs[0].replace_all_uses_with(result)
    graph.remove(node, safe=True)
    return True


def _stored(graph: ir.Graph, weight: ir.Value, array: np.ndarray) -> ir.Value:
    """`weight` as an initializer: a Constant node may stand after the norm."""
    if weight.is_initializer():
        return weight
    name = fresh_name(graph, weight.name or "norm.weight")
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
