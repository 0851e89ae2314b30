"""Move the range of an activation into the weights that read it: x·W = (x / s)·(s·W), channel by channel.

If one channel is a hundred times larger than the others, these get only a few of the steps of an INT8 scale.
With s_j = max|x_j|^α / max|W_j|^(1-α) (SmoothQuant, arXiv 2211.10438, eq. 4) the range is shared between
activation and weight. The function stays the same. 1/s is merged into the norm before the product where
nothing else reads that norm; otherwise it becomes a multiplication. Only activations with an outlier channel
are changed: elsewhere the weights would lose more precision than the activations gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..graph import lazy
from ..graph.sites import Site, find_sites, weight_input

OUTLIER = 8.0  # a channel is an outlier from this ratio on: largest channel over the median one


def smooth(
    model: ir.Model, names: Sequence[str], channels: Mapping[str, np.ndarray], alpha: float
) -> dict[str, np.ndarray]:
    """Migrate the ranges of the activations of some sites, in place.

    Args:
        model: FP32 graph.
        names: sites whose activation is going to be quantized.
        channels: activation name → largest magnitude per channel (K,).
        alpha: 0 leaves the activations alone, 1 flattens them.

    Returns:
        activation name as it now is → largest magnitude per channel (K,) after the migration.
    """
    graph = model.graph
    by_output = {node.outputs[0].name: node for node in graph}
    groups: dict[str, list[Site]] = {}
    for site in find_sites(model):
        if site.name in names and site.is_gemm and site.activation in channels:
            groups.setdefault(site.activation, []).append(site)
    changed = {}
    for activation, sites in groups.items():
        readers = [by_output[site.output] for site in sites]
        if any(len(graph.initializers[site.weight].uses()) > 1 for site in sites):
            continue  # a table that something else reads too
        amax = channels[activation].astype(np.float64)
        if amax.max() < OUTLIER * np.median(amax):
            continue
        scales = _scales(amax, [_row_amax(graph, site) for site in sites], alpha)
        value = readers[0].inputs[1 - (weight_input(readers[0]) or 0)]
        assert value is not None
        name = activation
        if not _fold_into_norm(graph, value, readers, scales):
            name = _multiply(graph, value, readers, scales)
        for site in sites:
            _scale_rows(graph, site, scales)
        changed[name] = (amax / scales).astype(np.float32)
    return changed


def _scales(amax: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """s (K,); 1 for channels that are always zero, on either side."""
    largest = np.max(weights, axis=0)
    alive = (amax > 0.0) & (largest > 0.0)
    scales = np.ones_like(amax)
    scales[alive] = amax[alive] ** alpha / largest[alive] ** (1.0 - alpha)
    return scales.astype(np.float32).astype(np.float64)


def _row_amax(graph: ir.Graph, site: Site) -> np.ndarray:
    source = graph.initializers[site.weight].const_value
    assert source is not None
    return np.abs(source.numpy()).max(axis=site.channel_axis).astype(np.float64)


def _scale_rows(graph: ir.Graph, site: Site, scales: np.ndarray) -> None:
    """W_j → s_j·W_j."""
    value = graph.initializers[site.weight]
    source = value.const_value
    assert source is not None
    shape = (-1, 1) if site.channel_axis == 1 else (1, -1)
    factors = scales.astype(np.float32).reshape(shape)
    value.const_value = lazy.lazy(
        lambda: source.numpy() * factors, ir.DataType.FLOAT, site.shape, value.name or ""
    )


def _fold_into_norm(graph: ir.Graph, value: ir.Value, readers: Sequence[ir.Node], scales: np.ndarray) -> bool:
    """Divide the weight of the norm that gives `value`; False where there is none or others read it."""
    node = value.producer()
    if node is None or value.is_graph_output() or {use.node for use in value.uses()} != set(readers):
        return False
    indices = {"LayerNormalization": [1, 2], "Mul": [1, 0]}.get(node.op_type, [])
    parameters = [i for i in indices if i < len(node.inputs) and _is_vector(node.inputs[i], len(scales))]
    if not parameters or (node.op_type == "Mul" and len(parameters) > 1):
        return False
    for index in parameters:
        old = node.inputs[index]
        assert old is not None
        tensor = ir.convenience.get_const_tensor(old)
        assert tensor is not None
        divided = (tensor.numpy().astype(np.float64) / scales).astype(np.float32)
        node.replace_input_with(index, _constant(graph, f"{value.name}.smooth_{index}", divided))
    return True


def _multiply(graph: ir.Graph, value: ir.Value, readers: Sequence[ir.Node], scales: np.ndarray) -> str:
    """A multiplication with 1/s between `value` and its readers."""
    inverse = _constant(graph, f"{value.name}.smooth", (1.0 / scales).astype(np.float32))
    node = ir.node("Mul", [value, inverse])
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{value.name}.smoothed", value.shape, ir.TensorType(ir.DataType.FLOAT)
    for reader in readers:
        for index, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(index, out)
    producer = value.producer()
    if producer is None:
        graph.insert_before(readers[0], node)
    else:
        graph.insert_after(producer, node)
    return out.name or ""


def _is_vector(value: ir.Value | None, size: int) -> bool:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor is not None and tuple(tensor.shape) == (size,)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
