"""Rewrite quantized products for ONNX Runtime's CPU kernels: fast, and with the results of the graph.

Without this, the runtime (1.32) turns an 8-bit product into a kernel whose 16-bit sums saturate on processors
with AVX2 but no VNNI (errors of 12% with ordinary weights), and the product with a dequantized weight into
one that rounds the activations to 8 bits too. Neither is the function of the graph. Cases:

1. Activation and weight INT8 → MatMulIntegerToFloat with the activation as UINT8; where the processor's
   usual kernel saturates, a session option makes the runtime avoid it (`cpu_graph.PRECISE`).
2. INT8 weight alone, few rows → the same kernel on three rows: the digits of the activation to the base 256.
   A weight is read once, in a quarter of the bytes of FP32.
3. INT8 weight alone, many rows → converted to FP32 at each call, scaled behind the product.
4. Weight in blocks of rows, INT4 → MatMulNBits. With few rows its integer kernel, which quantizes activations
   to INT8 per block, again on three rows: the quantized activation, the quantized remainder, and the
   remainder of that. The kernel quantizes the first two without any error and rounds only the third. With
   many rows its FP32 kernel.
5. A table that is looked up → its integers and their scales are looked up.
6. Any other dequantized weight, and all small ones → FP32 in memory, once.

In the cases 1 to 3 and 5, quantized weights are read from where they are stored, except those that a Gemm
reads transposed, and those of several products: the runtime replaces INT8 weights by UINT8 ones of the same
name and a suffix, once for each product, and fails at the second. These are stored as UINT8. The runtime must
not fold constants, or it makes FP32 copies of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ...graph.values import fresh_name, is_weight, producer, static_shape

DOMAIN = "com.microsoft"
FEW = 1 << 18  # elements up to which an FP32 copy is as fast as any integer kernel, and 1 MB at most
# Streams up to which digits (3 rows each) are faster than converting the weight at each step.
DIGITS_UP_TO = 12
# X = x / s + OFFSET is a positive integer below 2²⁴, exact in FP32; its digits are those of x / s plus 128.
OFFSET = 128 * (1 + 256 + 65536)
LARGEST = (1 << 24) - 1 - OFFSET - 256  # of |x / s|, with room for its rounding
TINY = 1e-37  # smallest step: no division by zero
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


def use_integer_kernels(model: ir.Model, *, rows: int | None = None) -> int:
    """Replace the quantized parts of an FP32 graph in place.

    Args:
        model: shapes must be known for case 2.
        rows: number of rows of every product, or None if there are many.

    Returns:
        How many products and look-ups were replaced.
    """
    emitter = _Emitter(model.graph, digits=rows is not None and rows <= DIGITS_UP_TO)
    count = sum([emitter.replace(node) for node in list(model.graph)])
    common.RemoveUnusedNodesPass()(model)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and (weight := _weight(node.outputs[0])) is not None:
            node.outputs[0].replace_all_uses_with(emitter.constant(weight))
    common.RemoveUnusedNodesPass()(model)
    if count:
        model.opset_imports[DOMAIN] = 1
    return count


@dataclass(frozen=True)
class _Weight:
    """An integer initializer behind a DequantizeLinear; scales (N,) along `axis`, or in blocks along it."""

    integers: ir.Value
    scale: np.ndarray
    axis: int
    block: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(dim) for dim in self.integers.shape or ())

    @property
    def tensor(self) -> ir.TensorProtocol:
        assert self.integers.const_value is not None
        return self.integers.const_value

    def scale_of(self, axis: int) -> np.ndarray | None:
        """Scales per channel of `axis`, one for all included."""
        if self.scale.ndim == 0:
            return np.full(self.shape[axis], self.scale, np.float32)
        return self.scale if self.axis == axis and not self.block else None


def _weight(value: ir.Value | None) -> _Weight | None:
    """The symmetric integer weight that `value` is dequantized from."""
    node = producer(value, "DequantizeLinear")
    if node is None or not is_weight(node.inputs[0]):
        return None
    integers, scale = node.inputs[0], _array(node.inputs[1])
    zero = _array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
    if integers is None or scale is None or zero is None or np.any(zero.astype(np.int8)):
        return None
    if integers.const_value is None or integers.const_value.dtype not in (ir.DataType.INT8, ir.DataType.INT4):
        return None
    rank = len(integers.shape or ())
    axis, block = _integer(node, "axis", 1), _integer(node, "block_size", 0)
    return _Weight(integers, scale.astype(np.float32), axis % rank if rank else 0, block)


def _activation(value: ir.Value | None) -> tuple[ir.Value, np.ndarray] | None:
    """The activation that is quantized to INT8 before a product, and its scale."""
    outer = producer(value, "DequantizeLinear")
    inner = producer(outer.inputs[0], "QuantizeLinear") if outer is not None else None
    if outer is None or inner is None or inner.inputs[0] is None:
        return None
    scales = [_array(node.inputs[1]) for node in (outer, inner)]
    zeros = [_array(node.inputs[2]) if len(node.inputs) > 2 else None for node in (outer, inner)]
    if any(zero is None or zero.dtype != np.int8 or zero.size != 1 or zero.any() for zero in zeros):
        return None
    if any(scale is None or scale.size != 1 for scale in scales) or scales[0] != scales[1]:
        return None
    assert scales[0] is not None
    return inner.inputs[0], scales[0].astype(np.float32).reshape(())


class _Emitter:
    """Makes the nodes; nodes that several products share are made once."""

    def __init__(self, graph: ir.Graph, *, digits: bool) -> None:
        self._graph, self._with_digits = graph, digits
        self._shared: dict[tuple[object, ...], ir.Value] = {}
        self._node: ir.Node  # new nodes go in front of it

    def replace(self, node: ir.Node) -> bool:
        """Replace one node if it is a product with, or a look-up in, a quantized weight."""
        index = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type) if node.domain == "" else None
        weight = _weight(node.inputs[index]) if index is not None else None
        if weight is None or len(weight.shape) != 2:
            return False
        self._node = node
        result = self._look_up(node, weight) if node.op_type == "Gather" else self._product(node, weight)
        if result is None:
            return False
        old = node.outputs[0]
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        result.name, result.shape, result.type = old.name, old.shape, old.type
        old.name = None
        self._graph.remove(node, safe=True)
        return True

    def constant(self, weight: _Weight) -> ir.Value:
        """The weight in FP32."""
        key = ("constant", weight.integers, weight.axis, weight.block, weight.scale.tobytes())
        if key not in self._shared:
            values = weight.tensor.numpy().astype(np.float32)
            scale = weight.scale
            if weight.block:
                scale = np.repeat(scale, weight.block, axis=weight.axis)
            elif scale.ndim:
                scale = scale.reshape([-1 if axis == weight.axis else 1 for axis in range(values.ndim)])
            values *= scale
            self._shared[key] = self._initializer(f"{weight.integers.name}.float", values)
        return self._shared[key]

    def _look_up(self, node: ir.Node, weight: _Weight) -> ir.Value | None:
        scale = weight.scale_of(0)
        if scale is None or _integer(node, "axis", 0) != 0:
            return None
        column = self._initializer(f"{weight.integers.name}.rows", scale[:, None])
        rows = self._new("Gather", [weight.integers, node.inputs[1]], {"axis": 0})
        scales = self._new("Gather", [column, node.inputs[1]], {"axis": 0})
        return self._new("Mul", [self._new("Cast", [rows], {"to": FLOAT}), scales])

    def _product(self, node: ir.Node, weight: _Weight) -> ir.Value | None:
        x, transposed = node.inputs[0], bool(_integer(node, "transB", 0))
        plain = all(_float(node, name) == 1.0 for name in ("alpha", "beta")) and not _integer(
            node, "transA", 0
        )
        if x is None or not plain:
            return None
        scale = weight.scale_of(0 if transposed else 1)
        quantized = _activation(x)
        if weight.block and not transposed and _is_blocked(weight):
            result = self._blocked(x, weight)
        elif scale is None or weight.tensor.dtype != ir.DataType.INT8:
            return None
        elif quantized is not None:
            result = self._integer_product(*quantized, self._matrix(weight, transposed), scale)
        elif weight.tensor.size <= FEW:
            return None
        elif self._with_digits and static_shape(x) is not None:
            result = self._digit_product(x, self._matrix(weight, transposed), scale, node.outputs[0])
        else:
            result = self._wide_product(x, weight, transposed, scale)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return result if bias is None else self._new("Add", [result, bias])

    def _matrix(self, weight: _Weight, transposed: bool) -> ir.Value:
        """The integers as K × N; as UINT8, moved by 128, where several products read them."""
        key = ("matrix", weight.integers, transposed)
        if key not in self._shared:
            integers = weight.integers
            several = sum(len(node.outputs[0].uses()) for node, _ in integers.uses()) > 1
            if several or transposed:
                array = weight.tensor.numpy().T if transposed else weight.tensor.numpy()
                array = (array ^ np.int8(-128)).view(np.uint8) if several else array
                name = f"{integers.name}{'.T' * transposed}{'.uint8' * several}"
                integers = self._initializer(name, np.ascontiguousarray(array))
            self._shared[key] = integers
        return self._shared[key]

    def _times(self, x: ir.Value, matrix: ir.Value, of_x: ir.Value, scale: np.ndarray) -> ir.Value:
        """The integer kernel: x UINT8 with zero point 128 and scale `of_x`; a scale per column."""
        columns = self._initializer(f"{matrix.name}.columns", scale)
        # 0 is the default of an INT8 weight, but an optimizer of ONNX Runtime (in 1.25 and 1.27) that makes
        # weights UINT8 on processors without VNNI ends the process where it is not given, and shares none.
        zeros = [self._zero(), self._zero()]
        if matrix.dtype != UINT8:
            zeros[1] = self._shared_array(f"{matrix.name}.zero", np.array(0, np.int8))
        return self._new("MatMulIntegerToFloat", [x, matrix, of_x, columns, *zeros], domain=DOMAIN)

    def _integer_product(
        self, x: ir.Value, step: np.ndarray, matrix: ir.Value, scale: np.ndarray
    ) -> ir.Value:
        key = ("quantized", x, float(step))
        of_x = self._number(step)
        if key not in self._shared:
            # Same steps as INT8 with zero point 0, moved by 128.
            self._shared[key] = self._new("QuantizeLinear", [x, of_x, self._zero()])
        return self._times(self._shared[key], matrix, of_x, scale)

    def _digit_product(self, x: ir.Value, matrix: ir.Value, scale: np.ndarray, old: ir.Value) -> ir.Value:
        digits, weights = self._digits(x)
        parts = self._times(digits, matrix, self._number(np.float32(1.0)), scale)  # (rows, 3, N)
        result = self._new("MatMul", [weights, parts])  # (rows, 1, N)
        result.shape, result.type = ir.Shape([weights.shape[0], 1, len(scale)]), old.type
        shape = static_shape(x)
        assert shape is not None
        return self._reshaped(result, (*shape[:-1], len(scale)))

    def _digits(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Digits (rows, 3, K) of each row of x, and the factor of each digit (rows, 1, 3)."""
        key = ("digits", x)
        if key not in self._shared:
            shape = static_shape(x)
            assert shape is not None
            rows = math.prod(shape[:-1])
            x = self._reshaped(x, (rows, 1, shape[-1]))
            last = self._integers([-1])
            largest = self._new("ReduceMax", [self._new("Abs", [x]), last], {"keepdims": 1})
            step = self._new("Mul", [largest, self._number(np.float32(1 / LARGEST))])
            step = self._new("Max", [step, self._number(np.float32(TINY))])
            step = self._new("Add", [step, self._not_finite(x)])
            number = self._new("Add", [self._new("Div", [x, step]), self._number(np.float32(OFFSET))])
            number = self._new("Round", [number])
            powers = np.array([1, 256, 65536], np.float32)
            shifts = self._shared_array("digits.shifts", (1 / powers).reshape(1, 3, 1))
            shifted = self._new("Mul", [number, shifts])
            # Conversion to UINT8 keeps the lowest 8 bits of an integer, as ONNX requires.
            whole = self._new("Cast", [shifted], {"to": ir.DataType.INT32})
            self._shared[key] = self._new("Cast", [whole], {"to": UINT8})
            worth = self._new("Mul", [step, self._shared_array("digits.worth", powers.reshape(1, 1, 3))])
            worth.shape, worth.type = ir.Shape([rows, 1, 3]), ir.TensorType(FLOAT)
            self._shared["worth", key[1]] = worth
        return self._shared[key], self._shared["worth", key[1]]

    def _wide_product(self, x: ir.Value, weight: _Weight, transposed: bool, scale: np.ndarray) -> ir.Value:
        key = ("wide", weight.integers)
        if key not in self._shared:
            # As for half weights: in front of all others, so that it is run when it is needed.
            cast = ir.node("Cast", [weight.integers], {"to": FLOAT})
            self._graph.insert_before(self._graph[0], cast)
            self._shared[key] = cast.outputs[0]
        columns = self._initializer(f"{weight.integers.name}.columns", scale)
        inputs = [x, self._shared[key]]
        product = self._new("Gemm", inputs, {"transB": 1}) if transposed else self._new("MatMul", inputs)
        return self._new("Mul", [product, columns])

    def _blocked(self, x: ir.Value, weight: _Weight) -> ir.Value:
        key = ("blocked", weight.integers)
        (rows, columns), bits = weight.shape, 4 if weight.tensor.dtype == ir.DataType.INT4 else 8
        if key not in self._shared:
            packed = _packed(weight.tensor.numpy(), weight.block, bits)
            self._shared[key] = self._initializer(f"{weight.integers.name}.packed", packed)
        scales = self._initializer(f"{weight.integers.name}.blocks", np.ascontiguousarray(weight.scale.T))
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": weight.block}
        inputs = [self._shared[key], scales]
        shape = static_shape(x)
        if not self._with_digits or shape is None:
            return self._new("MatMulNBits", [x, *inputs], {**attributes, "accuracy_level": 1}, domain=DOMAIN)
        parts, not_finite = self._block_digits(x, weight.block)
        products = self._new(
            "MatMulNBits", [parts, *inputs], {**attributes, "accuracy_level": 4}, domain=DOMAIN
        )
        result = self._new("ReduceSum", [products, self._integers([1])], {"keepdims": 1})
        result = self._new("Add", [result, not_finite])
        result.shape, result.type = ir.Shape([math.prod(shape[:-1]), 1, columns]), ir.TensorType(FLOAT)
        return self._reshaped(result, (*shape[:-1], columns))

    def _block_digits(self, x: ir.Value, block: int) -> tuple[ir.Value, ir.Value]:
        """Three summands of each row of x (rows, 3, K), and the result of `_not_finite` for x."""
        key, finite = ("block digits", x, block), ("finite", x)
        if key not in self._shared:
            shape = static_shape(x)
            assert shape is not None
            rows, last = math.prod(shape[:-1]), self._integers([-1])
            self._shared[finite] = self._not_finite(self._reshaped(x, (rows, 1, shape[-1])))
            rest, parts = self._reshaped(x, (rows, shape[-1] // block, block)), []
            for _ in range(2):
                largest = self._new("ReduceMax", [self._new("Abs", [rest]), last], {"keepdims": 1})
                step = self._new("Mul", [largest, self._number(np.float32(1 / 127))])
                step = self._new("Max", [step, self._number(np.float32(TINY))])
                whole = self._new("Round", [self._new("Div", [rest, step])])
                parts.append(self._new("Mul", [whole, step]))
                rest = self._new("Sub", [rest, parts[-1]])
            joined = self._new("Concat", [*parts, rest], {"axis": 1})
            self._shared[key] = self._new("Reshape", [joined, self._integers([rows, 3, shape[-1]])])
        return self._shared[key], self._shared[finite]

    def _not_finite(self, x: ir.Value) -> ir.Value:
        """(rows, 1, 1): NaN for rows with NaN or infinity, which maxima and integers may hide; else 0."""
        zeros = self._new("Mul", [x, self._number(np.float32(0.0))])
        return self._new("ReduceSum", [zeros, self._integers([-1])], {"keepdims": 1})

    def _reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        if static_shape(value) == tuple(shape):
            return value
        result = self._new("Reshape", [value, self._integers(shape)])
        result.shape, result.type = ir.Shape(shape), value.type
        return result

    def _zero(self) -> ir.Value:
        return self._shared_array("zero.uint8", np.array(128, np.uint8))

    def _number(self, value: np.ndarray | np.float32) -> ir.Value:
        return self._shared_array(f"number.{float(value)!r}", np.array(value, np.float32))

    def _integers(self, values: Sequence[int]) -> ir.Value:
        return self._shared_array(f"integers.{list(values)}", np.array(values, np.int64))

    def _shared_array(self, name: str, array: np.ndarray) -> ir.Value:
        if (name,) not in self._shared:
            self._shared[name,] = self._initializer(name, array)
        return self._shared[name,]

    def _new(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or {}, domain=domain)
        self._graph.insert_before(self._node, node)
        return node.outputs[0]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        name = fresh_name(self._graph, name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _is_blocked(weight: _Weight) -> bool:
    size = weight.block
    return weight.axis == 0 and size >= 16 and size & (size - 1) == 0 and weight.shape[0] % size == 0


def _packed(integers: np.ndarray, block: int, bits: int) -> np.ndarray:
    """K × N signed integers as the runtime's N × K/block × bytes, unsigned, low half of a byte first."""
    rows, columns = integers.shape
    unsigned = (integers.astype(np.int8) + np.int8(8) if bits == 4 else integers ^ np.int8(-128)).view(
        np.uint8
    )
    blocks = np.ascontiguousarray(unsigned.T).reshape(columns, rows // block, block)
    return blocks if bits == 8 else blocks[..., 0::2] | blocks[..., 1::2] << 4


def _array(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())
