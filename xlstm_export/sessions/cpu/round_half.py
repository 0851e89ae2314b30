"""FP16 and BF16 graphs on processors without such kernels: the same graph in FP32, rounded to half.

ONNX Runtime has no CPU kernels for most half operators. It computes them in FP32 and removes the conversions
in between, so that overflow and rounding do not occur. Here a value of half type becomes an FP32 value that
is converted to half and back after the operator that computes it. The runtime keeps such a pair of Casts and
rounds exactly, infinities and subnormal numbers included (except with its session option
`optimization.enable_cast_chain_elimination`).

What is rounded:
1. The result of every operator whose type is half, once, from FP32: sums inside a product are FP32, as they
   are on tensor cores.
2. Not what only moves or selects values that are half already.
3. Not a DequantizeLinear before a product: kernels multiply the integers and scale afterwards, or scale in
   another way. Values that other operators read from it are rounded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ...graph import lazy
from ...graph.element_types import typed_nodes
from ...graph.values import fresh_name
from ...specs import OP_DOMAIN

FLOAT = ir.DataType.FLOAT
HALF = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))
# Their results are among the values they read, or differ from one in the sign only.
_EXACT = frozenset(
    (
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Tile", "Pad"),
        *("Slice", "Split", "Concat", "Gather", "Where", "Neg", "Abs", "Relu", "Min", "Max"),
    )
)
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def computes_in_half(model: ir.Model) -> bool:
    """Whether anything is computed or carried in half.

    Weights that are only stored so do not count, nor rows that are looked up and then widened.
    """
    graph = model.graph
    if any(value.dtype in HALF for value in (*graph.inputs, *graph.outputs)):
        return True
    return any(
        node.attributes["to"].as_int() in HALF
        if node.op_type == "Cast"
        else node.op_type != "Gather" and any(_constant_type(value) in HALF for value in node.inputs)
        for node in graph
    )


def to_float32(model: ir.Model, *, rounding: bool) -> int:
    """Turn every half value of the graph into an FP32 value, in place.

    Inputs and outputs of the graph keep their types. Large weights keep theirs too and are converted where
    they are read.

    Args:
        model: a graph whose function bodies compute in FP32, as those of `ops/bodies.py` do.
        rounding: whether values that were half are rounded to it; else they are plain FP32 values.

    Returns:
        How many values are rounded.
    """
    _, types = typed_nodes(model)
    widening = _Widening(model.graph, types, rounding)
    nodes = list(model.graph)
    widening.sources()
    for node in nodes:
        if node.op_type in ("Cast", "CastLike"):
            widening.conversion(node)
        else:
            widening.operator(node)
    widening.outputs()
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return widening.rounded


class _Widening:
    """A graph whose values become FP32 in the order of its nodes; `types` holds their original types."""

    def __init__(self, graph: ir.Graph, types: dict[ir.Value, ir.DataType], rounding: bool) -> None:
        self.rounded = 0
        self._graph, self._types, self._rounding = graph, types, rounding
        self._unrounded: set[ir.Value] = set()
        self._narrow: set[ir.Node] = set()  # look-ups that stay half

    def sources(self) -> None:
        """Convert constants to FP32 here, but inputs and large weights before their readers.

        Rows of a large table are looked up in half, and only these rows are converted.
        """
        for value in [*self._graph.inputs, *self._graph.initializers.values()]:
            if value.dtype not in HALF or not value.uses():
                continue
            tensor = value.const_value
            scale = any(use.node.op_type in _QUANTIZERS for use in value.uses())
            if tensor is not None and tensor.size > lazy.SMALL:
                self._look_ups(value)
            if not any(use.node not in self._narrow for use in value.uses()):
                continue
            if tensor is not None and (tensor.size <= lazy.SMALL or scale):
                wide = self._initializer(value, tensor)
            else:
                cast = _cast(value, FLOAT, f"{value.name}.float")
                # ONNX Runtime orders nodes by their numbers. A node before all others runs when needed; one
                # close to its reader would run at the start, and all converted weights would stay in memory.
                self._graph.insert_before(self._graph[0], cast)
                wide = cast.outputs[0]
            self._types[wide] = value.dtype
            for use in list(value.uses()):
                if use.node is not wide.producer() and use.node not in self._narrow:
                    use.node.replace_input_with(use.idx, wide)

    def _look_ups(self, table: ir.Value) -> None:
        for use in list(table.uses()):
            if use.node.op_type == "Gather" and use.idx == 0:
                rows = use.node.outputs[0]
                cast = _cast(rows, FLOAT, f"{rows.name}.float")
                self._graph.insert_after(use.node, cast)
                self._types[cast.outputs[0]] = self._types[rows]
                for reader in list(rows.uses()):
                    if reader.node is not cast:
                        reader.node.replace_input_with(reader.idx, cast.outputs[0])
                self._narrow.add(use.node)

    def operator(self, node: ir.Node) -> None:
        """Make the results of a node FP32 and round them."""
        if node in self._narrow:
            return
        if node.op_type in ("Constant", "ConstantOfShape"):
            _widen_constant(node)
        exact = node.domain == "" and node.op_type in (*_EXACT, "Constant", "ConstantOfShape")
        exact = exact and self._unrounded.isdisjoint(node.inputs)
        for value in node.outputs:
            if self._types.get(value) not in HALF:
                continue
            value.type = ir.TensorType(FLOAT)
            if node.op_type == "DequantizeLinear":
                self._unrounded.add(value)
            if not exact:
                self._round(value)

    def conversion(self, node: ir.Node) -> None:
        """Replace a Cast to half by the rounding alone, and remove a Cast from half to FP32."""
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        before, after = self._type_of(source), self._types.get(result)
        if after not in HALF and not (before in HALF and after == FLOAT):
            return
        if before in (*HALF, FLOAT):
            plain = ir.node("Identity", [source])
        else:
            plain = ir.node("Cast", [source], {"to": FLOAT})
        out = plain.outputs[0]
        self._graph.insert_after(node, plain)
        ir.convenience.replace_all_uses_with(result, out, replace_graph_outputs=True)
        out.name, out.shape, out.type = result.name, result.shape, ir.TensorType(FLOAT)
        result.name = None
        self._graph.remove(node, safe=True)
        assert after is not None
        self._types[out] = after
        if after in HALF and (before != after or source in self._unrounded):
            self._round(out)

    def outputs(self) -> None:
        """Keep the names and types of the graph's outputs."""
        for index, value in enumerate(list(self._graph.outputs)):
            dtype, name = self._type_of(value), value.name or ""
            if dtype in HALF:
                value.name = f"{name}.float"
                cast = _cast(value, dtype, name)
                self._graph.append(cast)
                self._graph.outputs[index] = cast.outputs[0]

    def _round(self, value: ir.Value) -> None:
        """Make all nodes read `value` rounded; but products read the result of DequantizeLinear directly."""
        dtype = self._types[value]
        readers = [use for use in value.uses() if not (value in self._unrounded and _is_product(use))]
        if not self._rounding or not readers:
            return
        narrow = _cast(value, dtype, f"{value.name}.half")
        wide = _cast(narrow.outputs[0], FLOAT, f"{value.name}.rounded")
        node = value.producer()
        assert node is not None
        self._graph.insert_after(node, [narrow, wide])
        for use in readers:
            use.node.replace_input_with(use.idx, wide.outputs[0])
        self._types[wide.outputs[0]] = dtype
        self.rounded += 1

    def _type_of(self, value: ir.Value) -> ir.DataType | None:
        return self._types.get(value) or value.dtype or _constant_type(value)

    def _initializer(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        name = fresh_name(self._graph, f"{value.name}.float")
        wide = ir.tensor(tensor.numpy().astype(np.float32), name=name)
        result = ir.Value(name=name, shape=wide.shape, type=ir.TensorType(FLOAT), const_value=wide)
        self._graph.register_initializer(result)
        return result


def _is_product(use: ir.Usage) -> bool:
    if use.node.domain == OP_DOMAIN or use.node.op_type in ("MatMul", "Gemm"):
        return True
    return use.node.op_type == "Gather" and use.idx == 0  # the row that is read is rounded


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype})
    out = node.outputs[0]
    out.name, out.shape, out.type = name, value.shape, ir.TensorType(dtype)
    return node


def _widen_constant(node: ir.Node) -> None:
    attribute = node.attributes.get("value")
    tensor = attribute.as_tensor() if attribute is not None else None
    if tensor is not None and tensor.dtype in HALF:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))


def _constant_type(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.dtype
    return value.dtype if value.is_initializer() else None
