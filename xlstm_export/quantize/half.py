"""FP16 and BF16: products in half, and FP32 for everything that feeds back.

Products with stored weights compute in half, and so do the operators between two of them (the gate of a
feed-forward layer, views before q, k, v). Everything else stays FP32: norms, the residual stream,
convolutions with their carried inputs, gate pre-activations and the products that compute them, states, the
recurrences, every exponential and logarithm, the graph's inputs and outputs. FP32 is the default and half
the exception, so no list of FP32 operators is needed. `fences.py` checks the result.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph import lazy
from ..graph.sites import gate_nodes, stored_weight, weight_input
from ..graph.stored_types import DTYPES, converted
from ..graph.values import recurrence

# Operators that may compute in half between two products. Exp and Log are not among them. Sigmoid and Erf
# are: their results are bounded, and kernels evaluate them in FP32.
BETWEEN = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Neg", "Sigmoid", "Erf", "Gelu", "Relu", "Identity"),
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand", "Flatten"),
    )
)
VALUE_INPUTS = {
    "Reshape": 1,
    "Transpose": 1,
    "Squeeze": 1,
    "Unsqueeze": 1,
    "Slice": 1,
    "Split": 1,
    "Expand": 1,
}


def to_half(model: ir.Model, base: str) -> int:
    """Convert all values that may be half to `base` ("fp16" or "bf16"), in place.

    Returns:
        How many products compute in half now.
    """
    target = DTYPES[base]
    labels = _Labels(model)
    casts = _Casts(model.graph, target)
    for node in list(model.graph):
        if node in labels.half:
            _narrow_node(node, labels, casts)
        elif (values := _values(node)) and labels.is_half(node.outputs[0]):
            for index in values:
                node.replace_input_with(
                    index, casts.value(node.inputs[index], labels, half=True, before=node)
                )
            node.outputs[0].type = ir.TensorType(target)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain == "":
            if node.op_type == "QuantizeLinear":
                node.replace_input_with(0, casts.value(node.inputs[0], labels, half=False, before=node))
        else:
            _widen_inputs(node, labels, casts, target)
    _keep_outputs(model, labels, casts)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return sum(node.op_type in ("MatMul", "Gemm") for node in labels.half)


class _Labels:
    """The nodes that compute in half: products, and the operators between them."""

    def __init__(self, model: ir.Model) -> None:
        gates = gate_nodes(model)
        nodes = list(model.graph)
        self.products = {n for n in nodes if n not in gates and _is_half_product(n)}
        self.half = self.products | {
            n for n in nodes if n.op_type in BETWEEN and n.domain == "" and n not in gates
        }
        self.half -= {n for n in self.half if not _is_float(n)}
        self._dequantized = {
            n.outputs[0] for n in nodes if n.op_type == "DequantizeLinear" and _has_half_scale(n)
        }
        while drop := {n for n in self.half - self.products if not self._may_stay(n)}:
            self.half -= drop

    def is_half(self, value: ir.Value) -> bool:
        node = value.producer()
        if value in self._dequantized:
            return True
        if node is not None and (values := _values(node)):
            v = node.inputs[values[-1]]
            return value is node.outputs[0] and v is not None and self.is_half(v)
        return node in self.half

    def _may_stay(self, node: ir.Node) -> bool:
        sources = [v for v in data_inputs(node) if not _is_constant(v)]
        if not sources or not all(self.is_half(v) for v in sources):
            return False
        return any(self._wants_half(use) for out in node.outputs for use in out.uses())

    def _wants_half(self, use: ir.Usage) -> bool:
        node = use.node
        return use.idx in _values(node) or node in self.half


class _Casts:
    """Makes the Casts: one per value and direction, and one copy per constant."""

    def __init__(self, graph: ir.Graph, target: ir.DataType) -> None:
        self._graph, self._target = graph, target
        self._made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def value(
        self, value: ir.Value | None, labels: _Labels, *, half: bool, before: ir.Node
    ) -> ir.Value | None:
        """`value` in half or in FP32."""
        if value is None or (not _is_constant(value) and labels.is_half(value) == half):
            return value
        if _is_constant(value):
            return self._constant(value) if half else value
        if (value, half) not in self._made:
            dtype = self._target if half else ir.DataType.FLOAT
            cast = ir.node("Cast", [value], {"to": dtype})
            out = cast.outputs[0]
            out.name = f"{value.name}.{'half' if half else 'float'}"
            out.shape, out.type = value.shape, ir.TensorType(dtype)
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(next(n for n in self._graph if value in n.inputs), cast)
            else:
                self._graph.insert_after(producer, cast)
            self._made[value, half] = out
        return self._made[value, half]

    def _constant(self, value: ir.Value) -> ir.Value:
        source = ir.convenience.get_const_tensor(value)
        if source is None or source.dtype != ir.DataType.FLOAT:
            return value
        if (value, True) not in self._made:
            name = f"{value.name}.half"
            tensor = converted(source, self._target, name)
            if source.size <= lazy.SMALL:
                tensor = ir.Tensor(tensor.numpy(), dtype=self._target, name=name)
            copy = ir.Value(
                name=name, shape=source.shape, type=ir.TensorType(self._target), const_value=tensor
            )
            self._graph.register_initializer(copy)
            self._made[value, True] = copy
        return self._made[value, True]


def _values(node: ir.Node) -> tuple[int, ...]:
    """Inputs of a recurrence that are half where v is half; its first result then is half too."""
    operator = recurrence(node)
    return operator.values if operator is not None else ()


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs that hold values, not shapes or indices."""
    count = VALUE_INPUTS.get(node.op_type, len(node.inputs))
    return [value for value in node.inputs[:count] if value is not None]


def _is_half_product(node: ir.Node) -> bool:
    """Products and look-ups whose weight is FP32, or dequantized to half already."""
    index = weight_input(node)
    if index is None or recurrence(node) is not None:
        return False
    weight = node.inputs[index]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _has_half_scale(producer)
    stored = stored_weight(weight)
    return stored is not None and (node.op_type != "Gather" or len(stored.shape or ()) == 2)


def _has_half_scale(node: ir.Node) -> bool:
    scale = node.inputs[1]
    return scale is not None and scale.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _is_float(node: ir.Node) -> bool:
    """Whether an operator is on floating-point values, not on shapes (few, and integers)."""
    dtype = node.outputs[0].dtype
    return dtype is None or dtype.is_floating_point()


def _is_constant(value: ir.Value) -> bool:
    return ir.convenience.get_const_tensor(value) is not None or value.is_initializer()


def _narrow_node(node: ir.Node, labels: _Labels, casts: _Casts) -> None:
    count = VALUE_INPUTS.get(node.op_type, len(node.inputs))
    for index, value in enumerate(node.inputs[:count]):
        if value is None or (node.op_type == "Gather" and index == 1):
            continue
        node.replace_input_with(index, casts.value(value, labels, half=True, before=node))
    for out in node.outputs:
        out.type = ir.TensorType(casts._target)


def _widen_inputs(node: ir.Node, labels: _Labels, casts: _Casts, target: ir.DataType) -> None:
    """Make all other nodes read FP32; R of an sLSTM is stored in half, and its operator converts it."""
    operator = recurrence(node)
    weight = operator.weight if operator is not None else None
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if index == weight and _is_constant(value):
            node.replace_input_with(index, casts.value(value, labels, half=True, before=node))
        elif not _is_constant(value):
            node.replace_input_with(index, casts.value(value, labels, half=False, before=node))


def _keep_outputs(model: ir.Model, labels: _Labels, casts: _Casts) -> None:
    """Keep the names of the graph's outputs and their type FP32."""
    for index, value in enumerate(list(model.graph.outputs)):
        if not labels.is_half(value):
            continue
        name = value.name
        value.name = f"{name}.half"
        wide = casts.value(value, labels, half=False, before=list(model.graph)[-1])
        assert wide is not None
        wide.name = name
        model.graph.outputs[index] = wide
