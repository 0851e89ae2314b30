"""Transposes that undo each other.

Cases:
1. Transpose of a Transpose: one Transpose of the first's input, by the composed permutation. The first
   stays where others read it too.
2. A Transpose whose permutation moves nothing: its readers read its input. Not at a graph output, which
   needs a node of its own.
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.values import producer


def cancel_transposes(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Transpose nodes changed or went away."""
    count = 0
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type != "Transpose":
            continue
        perm, source = _permutation(node), node.inputs[0]
        if perm is None:
            continue
        first = producer(source, "Transpose")
        before = _permutation(first) if first else None
        if first is not None and before is not None:  # case 1
            perm, source = [before[axis] for axis in perm], first.inputs[0]
            node.replace_input_with(0, source)
            node.attributes["perm"] = ir.AttrInt64s("perm", perm)
            if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
                model.graph.remove(first, safe=True)
            count += 1
        if perm == sorted(perm) and not node.outputs[0].is_graph_output():  # case 2
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            count += first is None
    return count


def _permutation(node: ir.Node) -> list[int] | None:
    if "perm" in node.attributes:
        return list(node.attributes["perm"].as_ints())
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is None else list(reversed(range(len(shape))))
