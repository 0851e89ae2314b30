"""Concats that only rejoin the parts of a Split, or that could run before a Reshape.

Cases, all along one axis:
1. All parts of a Split, in order, next to each other in a Concat: the Split's input in their place.
2. A Concat of one value: the value. Not at a graph output.
3. A Concat along the last axis of values that Reshape made of (..., n, d) → (..., n·d), each read by the
   Concat only, d and all dimensions before n equal: Concat along n, then one Reshape.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.values import constant, integers, only_reader, producer, same_dim, size, typed


def cancel_concats(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Concat nodes changed or went away."""
    count = 0
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type != "Concat":
            continue
        changed = _cancel_splits(node)
        if len(node.inputs) == 1 and not node.outputs[0].is_graph_output():  # case 2
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            changed = True
        elif _before_reshape(model.graph, node):
            changed = True
        count += changed
    return count


def _cancel_splits(concat: ir.Node) -> bool:
    inputs, index, changed = list(concat.inputs), 0, False
    axis = _axis(concat)
    while index < len(inputs):
        split = producer(inputs[index], "Split")
        parts = list(split.outputs) if split else []
        run = inputs[index : index + len(parts)]
        if (
            split
            and axis is not None
            and _axis(split) == axis
            and all(a is b for a, b in zip(run, parts, strict=False))
            and len(run) == len(parts)
        ):
            inputs[index : index + len(parts)] = [split.inputs[0]]
            changed = True
        index += 1
    if changed:
        concat.resize_inputs(len(inputs))
        for position, value in enumerate(inputs):
            concat.replace_input_with(position, value)
    return changed


def _axis(node: ir.Node) -> int | None:
    """The axis of a Split or Concat, counted from the front."""
    axis = node.attributes.get_int("axis", 0)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return axis if axis >= 0 else None if shape is None else axis + len(shape)


def _before_reshape(graph: ir.Graph, concat: ir.Node) -> bool:
    sources = [_flattened(value, concat) for value in concat.inputs]
    found = [value for value in sources if value is not None]
    rank = len(found[0].shape or ()) if found else 0
    if len(found) < max(2, len(sources)) or _axis(concat) != rank - 2:
        return False
    first = found[0]
    for value in found[1:]:
        dims = zip(first.shape or (), value.shape or (), strict=False)
        if len(value.shape or ()) != rank or not all(
            same_dim(a, b) for index, (a, b) in enumerate(dims) if index != rank - 2
        ):
            return False
    counts = [size(value, -2) or 0 for value in found]
    width = size(first, -1) or 0
    joined = ir.node("Concat", found, {"axis": rank - 2})
    shape = [*list(first.shape or ())[:-2], sum(counts), width]
    typed(joined.outputs[0], first, shape)
    target = constant(np.array([0] * (rank - 2) + [sum(counts) * width], dtype=np.int64))
    view = ir.node("Reshape", [joined.outputs[0], target.outputs[0]])
    ir.convenience.replace_nodes_and_values(
        graph, concat, [concat], [joined, target, view], concat.outputs, view.outputs
    )
    return True


def _flattened(value: ir.Value | None, reader: ir.Node) -> ir.Value | None:
    """(..., n, d), where `value` is a Reshape of it to (..., n·d)."""
    view = producer(value, "Reshape")
    if view is None or only_reader(view.outputs[0]) is not reader:
        return None
    source, target = view.inputs[0], integers(view.inputs[1])
    if source is None or source.shape is None or target is None or len(target) != len(source.shape) - 1:
        return None
    count, width = size(source, -2), size(source, -1)
    if not count or not width or target[-1] not in (-1, count * width):
        return None
    lead = all(want == 0 or want == size(source, index) for index, want in enumerate(target[:-1]))
    return source if lead else None
