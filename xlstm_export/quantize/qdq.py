"""Explicit Q/DQ: integers where a recipe sets them, in the patterns that runtimes fuse into their kernels.

Symmetric, zero point 0, one scale per activation, one per output channel of a weight; INT4 has one per block
of rows. The pattern of each choice:

    int8      QuantizeLinear → DequantizeLinear → product ← DequantizeLinear ← INT8 weight
    int8-wo   product ← DequantizeLinear ← INT8 weight (also tables that are looked up, and R of an sLSTM)
    int4-wo   product ← DequantizeLinear in blocks ← INT4 weight

Scales of W8A8 products are FP32: the integer product is exact, and one multiplication gives the result. Where
only the weight is quantized, its scales have the type of the product, because the kernels require it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..errors import InputError
from ..graph import lazy
from ..graph.sites import Site, find_sites, weight_input
from . import integers
from .recipe import Choice, Recipe, block_size

HALF = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
OPSET_HALF_SCALES, OPSET_INT4 = 19, 21
# Range of an activation that was zero in all calibration data: any positive one holds the zeros exactly.
UNSEEN = 1.0


def insert_qdq(model: ir.Model, recipe: Recipe, amax: Mapping[str, float]) -> dict[str, Choice]:
    """Quantize the sites of a graph by a recipe, in place.

    Args:
        model: an exported FP32 graph, weights stored in FP32.
        recipe: the choice per site.
        amax: activation name → largest magnitude its integers must represent; needed for `int8` only.

    Returns:
        Site name → the choice that was applied; a weight that is read in two ways is listed once.

    Raises:
        InputError: an activation has no range.
    """
    graph = model.graph
    sites = find_sites(model)
    choices = recipe.choices(sites)
    by_output = {node.outputs[0].name: node for node in graph}
    inserter = _Inserter(graph, recipe, amax)
    for site in sites:
        choice = recipe.choice(site)  # of this very site: a tied weight has one name and two uses
        if choice == "float":
            continue
        node = by_output[site.output]
        index = weight_input(node)
        assert index is not None
        if choice == "int8":
            node.replace_input_with(1 - index, inserter.activation(node, 1 - index))
        node.replace_input_with(index, inserter.weight(node, site, choice))
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    if inserter.opset > (model.opset_imports.get("") or 0):
        model.opset_imports[""] = inserter.opset
    return choices


class _Inserter:
    def __init__(self, graph: ir.Graph, recipe: Recipe, amax: Mapping[str, float]) -> None:
        self.opset = 18
        self._graph, self._recipe, self._amax = graph, recipe, amax
        self._activations: dict[str, ir.Value] = {}
        self._weights: dict[tuple[str, Any], tuple[ir.Value, ...]] = {}

    def activation(self, node: ir.Node, index: int) -> ir.Value:
        """The value at an input of `node`, through Q and DQ; one pair for all readers."""
        value = node.inputs[index]
        assert value is not None
        assert value.name is not None
        name = value.name
        if name not in self._activations:
            amax = self._amax.get(name)
            if amax is None or not np.isfinite(amax) or amax < 0.0:
                found = "has no range" if amax is None else f"has the range {amax}"
                raise InputError(f"activation {name} {found}", "calibrate the export again")
            amax = amax or UNSEEN
            scale = self._initializer(f"{name}.scale", np.array(amax / integers.INT8, np.float32))
            zero = self._initializer(f"{name}.zero", np.array(0, np.int8))
            quantize = ir.node("QuantizeLinear", [value, scale, zero])
            dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
            self._name(quantize, f"{name}.int8", ir.DataType.INT8, value)
            self._name(dequantize, f"{name}.dequantized", ir.DataType.FLOAT, value)
            self._insert(value, node, (quantize, dequantize))
            self._activations[name] = dequantize.outputs[0]
        return self._activations[name]

    def weight(self, node: ir.Node, site: Site, choice: Choice) -> ir.Value:
        """The site's weight through DQ, in FP32 or in the type its product computes in."""
        narrow = choice != "int8" and site.op_type in ("MatMul", "Gemm") and site.role != "gate"
        half = HALF.get(self._recipe.base) if narrow else None
        axis = _scale_axis(site)
        # A table that is looked up and multiplied by too is stored once, with one set of scales.
        key = (site.weight, (choice == "int4-wo", axis, half))
        if key not in self._weights:
            make = self._int4 if choice == "int4-wo" else self._int8
            self._weights[key] = make(site, axis, half)
        integer, scale, zero = self._weights[key]
        attributes: dict[str, Any] = {"axis": axis}
        if choice == "int4-wo":
            attributes = {"axis": 0, "block_size": block_size(site)}
        dequantize = ir.node("DequantizeLinear", [integer, scale, zero], attributes)
        out = dequantize.outputs[0]
        out.name = f"{site.output}.weight"
        out.shape = integer.shape
        assert scale.dtype is not None
        out.type = ir.TensorType(scale.dtype)
        self._graph.insert_before(node, dequantize)
        return out

    def _int8(self, site: Site, axis: int, half: type | None) -> tuple[ir.Value, ...]:
        source = self._source(site)
        scales = integers.channel_scales(source.numpy(), axis, clip=self._recipe.clip, half=half)
        integer = lazy.lazy(
            lambda: integers.to_int8(source.numpy(), scales, axis),
            ir.DataType.INT8,
            site.shape,
            f"{site.weight}.int8",
        )
        if half is not None:
            self.opset = max(self.opset, OPSET_HALF_SCALES)
        return self._stored(site, "int8", integer, scales.astype(half or np.float32), np.int8)

    def _int4(self, site: Site, axis: int, half: type | None) -> tuple[ir.Value, ...]:
        source = self._source(site)
        size = block_size(site)
        scales = integers.block_scales(source.numpy(), size, clip=self._recipe.clip, half=half)
        integer = lazy.lazy(
            lambda: integers.to_int4(source.numpy(), scales).astype(ml_dtypes.int4),
            ir.DataType.INT4,
            site.shape,
            f"{site.weight}.int4",
        )
        self.opset = OPSET_INT4
        return self._stored(site, "int4", integer, scales.astype(half or np.float32), ml_dtypes.int4)

    def _stored(
        self, site: Site, kind: str, integer: ir.TensorProtocol, scales: np.ndarray, zero: Any
    ) -> tuple[ir.Value, ...]:
        value = ir.Value(
            name=f"{site.weight}.{kind}",
            shape=integer.shape,  # type: ignore[arg-type]
            type=ir.TensorType(integer.dtype),
            const_value=integer,
        )
        self._graph.register_initializer(value)
        return (
            value,
            self._initializer(f"{site.weight}.scale", scales),
            self._initializer(f"{site.weight}.zero", np.zeros(scales.shape, zero)),
        )

    def _source(self, site: Site) -> ir.TensorProtocol:
        source = self._graph.initializers[site.weight].const_value
        assert source is not None
        return source

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _insert(self, value: ir.Value, reader: ir.Node, nodes: tuple[ir.Node, ...]) -> None:
        producer = value.producer()
        if producer is None:
            first = next(node for node in self._graph if value in node.inputs)
            self._graph.insert_before(first, nodes)
        else:
            self._graph.insert_after(producer, nodes)

    @staticmethod
    def _name(node: ir.Node, name: str, dtype: ir.DataType, like: ir.Value) -> None:
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
        node.outputs[0].shape = like.shape


def _scale_axis(site: Site) -> int:
    """R (H, D, 4, D) is read per head; its last axis is an output, so each of those has a scale."""
    return len(site.shape) - 1 if site.role == "recurrent" else site.channel_axis
