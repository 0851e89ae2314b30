"""Proof that no value that feeds back is below FP32, from the element types of the finished graph.

A recurrence repeats its own errors. So these must be FP32: gate pre-activations, from the product that
computes them on; every exponential, logarithm, normalizer and norm reduction; the inside of the recurrences;
and all states. Only the matrix memory C may be stored in 16 bits between calls, where a recipe sets that.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..errors import BuildError
from ..graph.element_types import TypedNode, typed_nodes
from ..graph.sites import gate_nodes
from ..graph.values import recurrence
from ..ops import linear_attention
from ..ops.operands import Operand, Operator

FLOAT = ir.DataType.FLOAT
BELOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# exponentials, logarithms, reductions and normalizers: none may read a half value
SENSITIVE = frozenset(
    (
        *("Exp", "Log", "Softplus", "Softmax", "LogSoftmax", "Tanh", "Sqrt", "Pow", "Reciprocal"),
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceSumSquare"),
        *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization"),
        *("LSTM", "GRU", "RNN", linear_attention.NAME),
    )
)


@dataclass(frozen=True)
class Fences:
    """The outcome of `check_fences`.

    Attributes:
        violations: the values that are below FP32 and must not be.
        proven: how many of the values that must be FP32 are.
        integer_gates: gate products that read integers; their results are FP32, their inputs are rounded.
    """

    violations: tuple[str, ...]
    proven: int
    integer_gates: tuple[str, ...]


def check_fences(model: ir.Model, state_dtype: ir.DataType = FLOAT) -> Fences:
    """Check every value of a finished graph, those inside function bodies too.

    Args:
        model: graph with function bodies.
        state_dtype: type the matrix memory C may be stored in.
    """
    gates = gate_nodes(model)
    violations: list[str] = []
    proven = 0
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name.startswith(("past_", "present_")):
            allowed = (FLOAT, state_dtype) if name.endswith("_C") else (FLOAT,)
            proven += 1
            if value.dtype not in allowed:
                violations.append(f"state {name} is {value.dtype}")
    for typed in typed_nodes(model)[0]:
        inside = typed.scope is not model.graph
        for what, dtype in _must_be_float(typed, gates, state_dtype, inside):
            proven += 1
            if dtype in BELOW:
                violations.append(f"{typed.where} ({typed.node.op_type}): {what} is {dtype}")
    integer = tuple(n.outputs[0].name or "" for n in gates if _reads_integers(n))
    return Fences(tuple(violations), proven, integer)


def require_fences(model: ir.Model, state_dtype: ir.DataType = FLOAT) -> Fences:
    """Run `check_fences` and require that it finds no violation.

    Raises:
        BuildError: a value that must be FP32 is not.
    """
    found = check_fences(model, state_dtype)
    if found.violations:
        raise BuildError(
            f"{found.violations[0]} and must be FP32 ({len(found.violations)} such values)",
            "a recurrence repeats its own errors; please report this graph",
        )
    return found


def _must_be_float(
    typed: TypedNode, gates: set[ir.Node], state_dtype: ir.DataType, inside: bool
) -> list[tuple[str, ir.DataType | None]]:
    node = typed.node
    if inside:  # a recurrence: everything but the casts at its ends
        if node.op_type in ("Cast", "CastLike", "Constant", "Shape"):
            return []
        return [(f"input {i}", t) for i, t in enumerate(typed.inputs)] + [
            (f"output {i}", t) for i, t in enumerate(typed.outputs)
        ]
    operator = recurrence(node)
    if operator is not None:
        return _of_recurrence(typed, operator, state_dtype)
    if node in gates or node.op_type in SENSITIVE:
        reads = [] if node.op_type in ("Cast", "DequantizeLinear") else list(enumerate(typed.inputs))
        return [(f"input {i}", t) for i, t in reads] + [
            (f"output {i}", t) for i, t in enumerate(typed.outputs)
        ]
    return []


def _of_recurrence(
    typed: TypedNode, operator: Operator, state_dtype: ir.DataType
) -> list[tuple[str, ir.DataType | None]]:
    """All operands but q, k, v, h and R must be FP32; C may have the type that the recipe sets."""

    def fenced(operand: Operand) -> bool:
        return not operand.narrow and (operand.kind != "state" or state_dtype == FLOAT)

    inputs = zip(operator.inputs, typed.inputs, strict=False)  # a node may lack the optional ones
    outputs = zip(operator.outputs, typed.outputs, strict=True)
    return [(f"input {x.name}", t) for x, t in inputs if fenced(x)] + [
        (f"output {x.name}", t) for x, t in outputs if fenced(x)
    ]


def _reads_integers(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
