"""Refuses a forward that computes in 16 bits: an export computes in FP32, so it would give other values."""

from __future__ import annotations

import onnx_ir as ir

from ..errors import BuildError

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_COPIES = frozenset(
    (
        "Cast",
        "Identity",
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Expand",
        "Slice",
        "Concat",
        "Constant",
    )
)


def refuse_narrow(model: ir.Model) -> None:
    """Raise BuildError where a traced graph computes values of 16 bits; casts alone compute nothing."""
    for node in model.graph:
        narrow = [value.dtype for value in node.outputs if value.dtype in _NARROW]
        if not narrow or node.op_type in _COPIES:
            continue
        path = _weight_of(node).rpartition(".")[0]
        kind = "bfloat16" if narrow[0] == ir.DataType.BFLOAT16 else "float16"
        raise BuildError(
            f"forward computes in {kind}" + (path and f" in {path}") + f" ({node.op_type})",
            "autocast or a cast to 16 bits: an export computes in FP32 and is quantized afterwards; leave it "
            "to training, torch.autocast(..., enabled=self.training)",
        )


def _weight_of(node: ir.Node, steps: int = 4) -> str:
    """Name of a weight that a node reads, through a few others; "" if there is none."""
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if value is not None and value.is_initializer():
            return value.name or ""
        if producer is not None and steps and (found := _weight_of(producer, steps - 1)):
            return found
    return ""
