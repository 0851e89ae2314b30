"""Reshapes with constant targets, at any batch and length: chains become one, and those without effect none.

A zero in a target copies the dimension of the data at its own index.

Cases:
1. Reshape of a Reshape: it reads the first's input, with an equivalent target. A zero stays zero where the
   new input has the same dimension at that index; otherwise it becomes that dimension's number. A −1 becomes
   its number where that is known. The first Reshape stays where other nodes read it too.
2. No equivalent target exists, or it would have two −1: left alone.
3. Reshape to the shape the data has: its readers read the data. Not at a graph output.
4. `allowzero=1` with a zero in the target means an empty dimension: left alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graph.values import constant, integers, producer, same_dim, size


def merge_views(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Reshape nodes changed or went away."""
    count = 0
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type != "Reshape":
            continue
        changed = _read_through(model.graph, node)  # case 1
        if _keeps_shape(node) and not node.outputs[0].is_graph_output():  # case 3
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            changed = True
        count += changed
    return count


def _target(node: ir.Node) -> list[int] | None:
    target = integers(node.inputs[1])
    if target is None or (node.attributes.get_int("allowzero", 0) and 0 in target):  # case 4
        return None
    return target


def _read_through(graph: ir.Graph, node: ir.Node) -> bool:
    first = producer(node.inputs[0], "Reshape")
    target = _target_from(first, node) if first else None
    if first is None or target is None:
        return False
    shape = constant(np.array(target, dtype=np.int64))
    graph.insert_before(node, shape)
    node.replace_input_with(0, first.inputs[0])
    node.replace_input_with(1, shape.outputs[0])
    node.attributes.pop("allowzero", None)
    if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
        graph.remove(first, safe=True)
    return True


def _target_from(first: ir.Node, node: ir.Node) -> list[int] | None:
    """The target for `node` that gives the same result on the input of `first`; None where there is none."""
    target, before = _target(node), _target(first)
    if target is None:
        return None
    merged: list[int] = []
    for index, want in enumerate(target):
        if want == -1:
            known = size(node.outputs[0], index)
            merged.append(-1 if known is None or known == 0 else known)
        elif want > 0:
            merged.append(want)
        elif (known := size(node.inputs[0], index)) is not None:
            merged.append(known)
        elif _copied(first, before, index):
            merged.append(0)
        else:
            return None  # case 2
    return merged if merged.count(-1) <= 1 else None


def _copied(first: ir.Node, target: list[int] | None, index: int) -> bool:
    """Whether `first` leaves the dimension at `index` as it is."""
    if target is not None and index < len(target) and target[index] == 0:
        return True
    before, after = first.inputs[0], first.outputs[0]
    if before is None or before.shape is None or after.shape is None or index >= len(before.shape):
        return False
    return index < len(after.shape) and same_dim(before.shape[index], after.shape[index])


def _keeps_shape(node: ir.Node) -> bool:
    source, target = node.inputs[0], _target(node)
    if source is None or source.shape is None or target is None or len(source.shape) != len(target):
        return False
    kept = [want == 0 or size(source, index) == want for index, want in enumerate(target)]
    # All other dimensions are kept, so -1 can only mean this one.
    return all(kept) or (kept.count(False) == 1 and target[kept.index(False)] == -1)
