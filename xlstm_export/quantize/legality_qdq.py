"""The rules of `legality_rules.py` for QuantizeLinear, DequantizeLinear and the products that read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..graph.element_types import TypedNode, ancestors, constant
from .legality_rules import INT4_BLOCKS, MIN_GEMM, QUANTIZED, Violation

QDQ = ("QuantizeLinear", "DequantizeLinear")
PRODUCTS = ("MatMul", "Gemm")
_SIGNED = (ir.DataType.INT8, ir.DataType.INT4)
# operators allowed between DQ and a product; an axis can be followed through the first three only
_SAME_AXES = ("Cast", "Identity", "Transpose")
_VIEWS = (*_SAME_AXES, "Reshape", "Squeeze", "Unsqueeze", "Flatten")


def check_quantized_values(typed: TypedNode, *, is_call: bool) -> Iterator[Violation]:
    """Require that integers come from Q or a weight, and are read by DQ."""
    kind = typed.node.op_type
    if kind in QDQ or kind == "Constant" or is_call:
        return
    for value, found in zip(typed.node.inputs, typed.inputs, strict=False):
        if found is not None and found in QUANTIZED and found != ir.DataType.UINT8:
            yield _violation(
                typed,
                "quantized-value",
                f"reads {value.name if value else ''} ({found.name}), which only DQ may",
            )
    for value, found in zip(typed.node.outputs, typed.outputs, strict=False):
        if found is not None and found in _SIGNED and found not in typed.inputs:
            yield _violation(typed, "quantized-value", f"gives {value.name} ({found.name}), which only Q may")


def check_qdq(typed: TypedNode) -> Iterator[Violation]:
    """Check types and scales of one Q or DQ."""
    if len(typed.node.inputs) < 2:
        yield _violation(typed, "scale-constant", "has no scale")
        return
    yield from _types(typed)
    scale = constant(typed.node.inputs[1])
    if scale is None:
        yield _violation(typed, "scale-constant", f"scale {_name(typed.node.inputs[1])} is computed")
        return
    values = _values(scale)
    if values is None:
        yield _violation(
            typed, "scale-value", f"the values of {scale.name} are in a file that is not here: give the path"
        )
    elif not (np.isfinite(values).all() and (values > 0).all()):
        bad = values[~(np.isfinite(values) & (values > 0))]
        yield _violation(
            typed,
            "scale-value",
            f"{bad.size} of {values.size} scales are not above 0 and finite: {bad.flat[0]:g}",
        )
    yield from _granularity(typed, scale)


def check_product(typed: TypedNode) -> Iterator[Violation]:
    """Which operands of a MatMul or Gemm are quantized, and along which axis."""
    operands = [_operand(typed.node, index) for index in (0, 1)]
    quantized = [operand for operand in operands if operand.dq is not None]
    for operand in quantized:
        yield from _weight_axis(typed, operand)
    if len(quantized) == 2:
        for operand in quantized:
            if operand.weight is not None and len(operand.weight.shape) > 1:
                sizes = [int(size) for size in operand.weight.shape[-2:]]
                if min(sizes) < MIN_GEMM:
                    yield _violation(
                        typed, "small-gemm", f"an INT8 product of {sizes[0]} × {sizes[1]} is below {MIN_GEMM}"
                    )
    elif len(quantized) == 1:
        (operand,) = quantized
        if operand.weight is None:
            yield _violation(
                typed, "one-sided", f"{operand.name} is quantized, the other operand is not: no INT8 product"
            )
        elif operand.type == ir.DataType.INT8:
            yield _violation(typed, "weight-only", f"only the weight {operand.weight.name} is quantized")


@dataclass(frozen=True)
class _Operand:
    """One side of a product.

    Attributes:
        dq: the DQ it comes from, if any.
        weight: the constant behind that.
        axis: of the product's operand, along which the scales of `dq` differ; None: one scale.
        sums: axis of the operand that the product sums over.
    """

    name: str
    dq: ir.Node | None
    weight: ir.TensorProtocol | None
    axis: int | None
    sums: int

    @property
    def type(self) -> ir.DataType | None:
        return None if self.weight is None else self.weight.dtype


def _operand(node: ir.Node, index: int) -> _Operand:
    value = node.inputs[index]
    path = list(ancestors(value, _VIEWS))
    if not path or path[-1].op_type != "DequantizeLinear":
        return _Operand(_name(value), None, None, None, 0)
    dq = path[-1]
    weight = _weight(dq)
    rank = len(weight.shape) if weight is not None else 2
    axis = _scale_axis(dq, rank)
    if any(view.op_type not in _SAME_AXES for view in path[:-1]):
        axis = None
    for view in reversed(path[:-1]):
        if view.op_type == "Transpose" and axis is not None:
            perm = view.attributes.get("perm")
            order = list(perm.as_ints()) if perm is not None else list(range(rank))[::-1]
            axis = order.index(axis) if axis in order else axis
    return _Operand(_name(value), dq, weight, axis, _summed_axis(node, index, rank))


def _summed_axis(node: ir.Node, index: int, rank: int) -> int:
    first_is_summed = index == 1
    if node.op_type == "Gemm":
        flag = node.attributes.get(("transA", "transB")[index])
        if flag is not None and flag.as_int():
            first_is_summed = not first_is_summed
    return rank - 2 if first_is_summed else rank - 1


def _weight_axis(typed: TypedNode, operand: _Operand) -> Iterator[Violation]:
    if operand.weight is None or operand.axis is None or operand.dq is None:
        return
    rank = len(operand.weight.shape)
    scale = constant(operand.dq.inputs[1])
    blocked = scale is not None and len(scale.shape) > 1
    channels = 2 * rank - 3 - operand.sums  # the other one of the last two axes
    wanted = operand.sums if blocked else channels
    if operand.axis != wanted:
        what = "blocks run" if blocked else "scales go"
        yield _violation(
            typed,
            "weight-axis",
            f"{what} along axis {operand.axis} of {operand.weight.name} as it is multiplied, not {wanted}",
        )


def _types(typed: TypedNode) -> Iterator[Violation]:
    node, data = typed.node, typed.inputs[0]
    quantizes = node.op_type == "QuantizeLinear"
    integer = typed.outputs[0] if quantizes else data
    if (
        quantizes
        and len([value for value in node.inputs if value is not None]) < 3
        and integer not in _SIGNED
    ):
        yield _violation(typed, "uint8", "has no zero point, which makes its result UINT8")
    elif integer is not None and integer not in _SIGNED:
        yield _violation(typed, "uint8", f"the integers are {integer.name}")
    if quantizes and None not in (data, typed.inputs[1]) and data != typed.inputs[1]:
        found = (typed.inputs[1] or ir.DataType.UNDEFINED).name
        yield _violation(typed, "scale-type", f"the scale is {found}, the data {data.name if data else ''}")
    if not quantizes and "output_dtype" in node.attributes:
        yield _violation(typed, "output-dtype", "has the attribute output_dtype; give the scale that type")
    if integer == ir.DataType.INT4 and _weight(node) is None:
        yield _violation(typed, "int4-constant", f"{_name(node.inputs[0])} is no constant")


def _granularity(typed: TypedNode, scale: ir.TensorProtocol) -> Iterator[Violation]:
    node, weight = typed.node, _weight(typed.node)
    sizes = tuple(int(size) for size in scale.shape)
    if weight is not None and ir.DataType.INT4 in (weight.dtype, typed.outputs[0]):
        yield from _int4(typed, weight, sizes)
        return
    if math.prod(sizes) == 1:
        return
    if weight is None:
        yield _violation(
            typed, "per-tensor", f"{math.prod(sizes)} scales for the activation {_name(node.inputs[0])}"
        )
        return
    dims = tuple(int(dim) for dim in weight.shape)
    if len(sizes) > 1:
        yield _violation(
            typed, "block-scales", f"scales of shape {sizes} for {weight.dtype.name} of shape {dims}"
        )
        return
    if _scale_axis(node, len(dims)) is None:
        yield _violation(typed, "scale-axis", f"has {sizes[0]} scales and no axis")


def _int4(typed: TypedNode, weight: ir.TensorProtocol, scales: tuple[int, ...]) -> Iterator[Violation]:
    dims = tuple(int(dim) for dim in weight.shape)
    if dims and dims[-1] % 2:
        yield _violation(typed, "int4-even", f"the last dimension of {dims} is odd")
    size_given = typed.node.attributes.get("block_size")
    size = size_given.as_int() if size_given is not None else 0
    axis = _scale_axis(typed.node, len(dims))
    problem = ""
    if len(dims) != 2:
        problem = f"has {len(dims)} dimensions"
    elif len(scales) != 2 or axis not in (0, 1):
        problem = f"has scales of shape {scales}, none per block"
    elif size not in INT4_BLOCKS:
        problem = f"has blocks of {size}"
    elif dims[axis] % size:
        problem = f"has {dims[axis]} rows, which blocks of {size} do not divide"
    elif scales != tuple(dim // size if index == axis else dim for index, dim in enumerate(dims)):
        problem = f"has scales of shape {scales} for blocks of {size} along axis {axis}"
    if problem:
        yield _violation(typed, "int4-blocks", f"{weight.name} of shape {dims} {problem}")


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant that a Q or DQ works on; also that of a Q in front of a DQ."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    if node.op_type == "DequantizeLinear" and producer is not None and producer.op_type == "QuantizeLinear":
        value = producer.inputs[0]
    return constant(value)


def _scale_axis(node: ir.Node, rank: int) -> int | None:
    """The `axis` that is written out, counted from the front."""
    scale = constant(node.inputs[1])
    attribute = node.attributes.get("axis")
    if attribute is None or scale is None or math.prod(scale.shape) == 1:
        return None
    axis = attribute.as_int()
    return axis + rank if axis < 0 else axis


def _values(tensor: ir.TensorProtocol) -> np.ndarray | None:
    try:
        return tensor.numpy().astype(np.float64)
    except OSError:
        return None  # external data of a model that was not loaded from its file


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or "an input"


def _violation(typed: TypedNode, rule: str, message: str) -> Violation:
    return Violation(typed.where, typed.node.op_type, rule, message)
