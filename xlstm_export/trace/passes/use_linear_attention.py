"""XlstmMlstm becomes LinearAttention, for runtimes that have a kernel for that operator.

Cases:
1. Each XlstmMlstm becomes LinearAttention and what it needs around it (`ops/linear_attention.py`), whatever
   its attributes. Its states stay C, n and m, so they can be carried over from one form to the other.
2. CausalConvWithState is that of the same domain. XlstmSlstm keeps its body.
3. ONNX's own operators need opset 27. A model with an operator that means something else there is refused.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from ...errors import BuildError
from ...graph.values import recurrence
from ...ops.linear_attention import Form, mlstm_function
from ...ops.operands import MLSTM
from ...specs import MICROSOFT, STANDARD

OPSET = 27
IR_VERSION = 13  # the one that opset 27 came with
# Operators whose inputs or attributes mean something else in opset 27 than in 18.
CHANGED = frozenset(("DFT", "GroupNormalization"))


def use_linear_attention(model: ir.Model, form: str) -> int:
    """Apply the pass in place; returns how many nodes became LinearAttention.

    Args:
        model: a traced graph without function bodies.
        form: STANDARD for ONNX's operators, MICROSOFT for those of ONNX Runtime.

    Raises:
        BuildError: case 3.
    """
    domain = MICROSOFT if form == MICROSOFT else ""
    if form == STANDARD:
        _raise_opset(model)
    for node in model.graph:
        if node.domain == MICROSOFT:
            node.domain = domain
    model.graph.opset_imports.pop(MICROSOFT, None)
    if domain:
        model.graph.opset_imports[domain] = 1
    nodes = [node for node in model.graph if recurrence(node) is MLSTM]
    for index, node in enumerate(nodes):
        proto = mlstm_function(_form(node, domain, model.graph.opset_imports[""]), f"Mlstm{index}")
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
        node.op_type = function.name
        node.attributes.clear()
    common.InlinePass()(model)
    return len(nodes)


def _raise_opset(model: ir.Model) -> None:
    changed = [node for node in model.graph if node.domain == "" and node.op_type in CHANGED]
    if changed:
        raise BuildError(
            f"{changed[0].op_type} means something else in opset {OPSET}, which LinearAttention needs",
            f"export with --recurrence {MICROSOFT}, which needs no newer opset",
        )
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


def _form(node: ir.Node, domain: str, opset: int) -> Form:
    v = node.inputs[MLSTM.index("v")]
    assert v is not None
    assert v.shape is not None
    heads, value_size = v.shape[2], v.shape[3]
    assert isinstance(heads, int)
    assert isinstance(value_size, int)
    names = [x.name for x in MLSTM.attributes if x.name in node.attributes]
    given = {name: node.attributes[name].as_float() for name in names}
    return Form(domain, opset, heads, value_size, given)
