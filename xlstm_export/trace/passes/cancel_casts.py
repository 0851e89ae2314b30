"""Casts that change nothing.

Cases:
1. Cast to the type the value has already: its readers read its input. Not at a graph output.
2. Cast of a Cast whose type holds every value of the type before it (float16 → float32 → float16): one Cast
   of the first's input; where the types are equal, case 1 removes that too.
3. To a narrower type and back (float32 → float16 → float32), which rounds: left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.values import producer

_T = ir.DataType
HOLDS_ALL = {
    _T.FLOAT16: {_T.FLOAT, _T.DOUBLE},
    _T.BFLOAT16: {_T.FLOAT, _T.DOUBLE},
    _T.FLOAT: {_T.DOUBLE},
    _T.INT32: {_T.INT64, _T.DOUBLE},
    _T.BOOL: {_T.INT32, _T.INT64, _T.FLOAT16, _T.BFLOAT16, _T.FLOAT, _T.DOUBLE},
}


def cancel_casts(model: ir.Model) -> int:
    """Apply the pass in place; returns how many Cast nodes changed or went away."""
    count = 0
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type != "Cast":
            continue
        source, changed = node.inputs[0], False
        first = producer(source, "Cast")
        if first is not None and source is not None and _holds_all(first.inputs[0], source):  # case 2
            source, changed = first.inputs[0], True
            node.replace_input_with(0, source)
            if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
                model.graph.remove(first, safe=True)
        assert source is not None
        if source.dtype == node.attributes["to"].as_int() and not node.outputs[0].is_graph_output():  # case 1
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            changed = True
        count += changed
    return count


def _holds_all(before: ir.Value | None, after: ir.Value) -> bool:
    return (
        before is not None
        and before.dtype is not None
        and (before.dtype == after.dtype or after.dtype in HOLDS_ALL.get(before.dtype, ()))
    )
