"""Explain what is wrong with the node of the first value that differs, by comparing the two graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .replay import STAND_INS, error

FP16_MAX = 65504.0
ENOUGH = 3  # most differences that are named


def explain(
    ours: ir.Node,
    theirs: ir.Node | None,
    found: np.ndarray,
    expected: np.ndarray,
    weight: Callable[[str], np.ndarray],
    limit: float,
) -> str:
    """Explanation in words; empty if node and weights are as expected.

    Args:
        ours: node of the candidate.
        theirs: node of the reference; None if quantization has added the candidate's node.
        found, expected: the values that the node gives, and those it should give.
        weight: returns the dequantized value of a stored weight of the candidate, by name.
        limit: relative L2 beyond which a weight counts as wrong; 0 for any difference.
    """
    if theirs is None:
        return _stand_in(ours, expected)
    if ours.op_type != theirs.op_type:
        return f"is a {ours.op_type}, should be a {theirs.op_type}"
    said = [*_attributes(ours, theirs), *_operands(ours, theirs), *_weights(ours, theirs, weight, limit)]
    if not said and np.isfinite(expected).all() and not np.isfinite(found).all():
        said.append(f"gives no finite number where the model's values reach {np.abs(expected).max():.4g}")
    return "; ".join(said[:ENOUGH])


def _stand_in(node: ir.Node, expected: np.ndarray) -> str:
    """Explain an added node: a Q/DQ pair or a Cast around a value of the model."""
    largest = float(np.abs(expected).max())
    if node.op_type == "DequantizeLinear":
        scale = _constant(node.inputs[1])
        if scale is not None and scale.size == 1:
            return f"its range is ±{127 * float(scale):.4g}, the values reach {largest:.4g}"
    if node.op_type == "Cast" and largest > FP16_MAX:
        return f"values reach {largest:.4g}, FP16 ends at {FP16_MAX:.0f}"
    return ""


def _attributes(ours: ir.Node, theirs: ir.Node) -> list[str]:
    said = []
    for name in sorted({*ours.attributes, *theirs.attributes}):
        a, b = (node.attributes[name].value if name in node.attributes else None for node in (ours, theirs))
        if isinstance(a, ir.TensorProtocol) or isinstance(b, ir.TensorProtocol):
            continue
        if a != b:
            x, y = ("absent" if value is None else value for value in (a, b))
            said.append(f"attribute {name} is {x}, should be {y}")
    return said


def _operands(ours: ir.Node, theirs: ir.Node) -> list[str]:
    """Differences of the values that are read, by names of the reference; weights compare by value."""
    a, b = (
        [base_name(v) for v in node.inputs if v is not None and _constant(v) is None]
        for node in (ours, theirs)
    )
    a = [name for name, v in zip(a, _computed(ours), strict=True) if not _is_weight(v)]
    if a == b or (len(a) != len(b) and not a):
        return []
    return [f"reads {', '.join(a)}, should read {', '.join(b)}"]


def _computed(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and _constant(v) is None]


def _weights(ours: ir.Node, theirs: ir.Node, weight: Callable[[str], np.ndarray], limit: float) -> list[str]:
    said = []
    for a, b in zip(ours.inputs, theirs.inputs, strict=False):
        if a is None or b is None:
            continue
        right = _constant(b)
        wrong = _constant(a) if right is not None else None
        if right is None:
            if not (_is_weight(a) and _is_weight(b)):
                continue
            stored, expected = (_stored(v) for v in (a, b))
            for part, other in zip(stored, expected, strict=False):
                said += _difference(part, other, limit)
            continue
        if wrong is None and _is_weight(a):
            off = error(weight(a.name or ""), right)
            if off > limit:
                said.append(f"weight {b.name} is {off:.1%} off (relative L2)")
            continue
        said += _difference(a, b, limit)
    return said


def _difference(ours: ir.Value, theirs: ir.Value, limit: float) -> list[str]:
    a, b = _constant(ours), _constant(theirs)
    if a is None or b is None:
        return []
    if a.shape != b.shape:
        return [f"{theirs.name} has shape {a.shape}, should have {b.shape}"]
    x, y = a.astype(np.float64), b.astype(np.float64)
    other = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not other.any() or error(x, y) <= limit:
        return []
    at = tuple(int(i) for i in np.argwhere(other)[0])
    where = f"[{', '.join(map(str, at))}]" if at else ""
    rest = f" ({int(other.sum())} of {other.size} elements differ)" if other.size > 1 else ""
    return [f"{theirs.name}{where} is {x[at]:.6g}, should be {y[at]:.6g}{rest}"]


def _stored(value: ir.Value) -> list[ir.Value]:
    """Integers, scales and zero points behind a weight."""
    node = value.producer()
    assert node is not None, "a weight that is no constant comes out of a DequantizeLinear"
    return [v for v in node.inputs if v is not None]


def _is_weight(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear" and _constant(node.inputs[0]) is not None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != "Constant":
            return None
        attribute = node.attributes.get("value")
        return None if attribute is None else attribute.as_tensor().numpy()
    return value.const_value.numpy()


def base_name(value: ir.Value) -> str:
    """Name of the value of the FP32 graph that corresponds to a value."""
    name = value.name or ""
    while name.endswith(STAND_INS):
        name = name.rpartition(".")[0]
    return name
