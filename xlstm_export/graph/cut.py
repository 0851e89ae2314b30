"""Cut an exported graph at the ends of its blocks; the weights stay in their file.

Tracing gives the value at the end of block k of the residual stack the name `hidden_<k>`. So a graph can be
run block by block (`segment`), or with its first blocks only (`first_blocks`), on the exported weight file.
"""

from __future__ import annotations

import re
from collections.abc import Container

import onnx_ir as ir
from onnx_ir.passes import common

from ..errors import UsageError

MARKER = "Boundary"


PREFIX = "hidden_"
HIDDEN = re.compile(rf"{PREFIX}(\d+)$")


def boundaries(model: ir.Model) -> list[ir.Value]:
    """The values at the ends of the blocks, in order; empty where the model has no stack of blocks."""
    found = {}
    for node in model.graph:
        for value in node.outputs:
            match = HIDDEN.fullmatch(value.name or "")
            if match:
                found[int(match[1])] = value
    return [found[index] for index in sorted(found)]


def first_blocks(model: ir.Model, count: int) -> ir.Model:
    """In place: the graph with only its first `count` blocks between embedding and head.

    Raises:
        UsageError: it has no stack of blocks, or fewer.
    """
    ends = _ends(model)
    if not 1 <= count <= len(ends):
        raise UsageError(f"--num-blocks {count}: the graph has {len(ends)} blocks")
    graph = model.graph
    if count < len(ends):
        gone = [v for v in graph.outputs if _part(v) >= count and (v.name or "").startswith("present_")]
        ends[-1].replace_all_uses_with(ends[count - 1])
        _set_outputs(graph, [value for value in graph.outputs if value not in gone])
        _drop_unused(model, {"past_" + (v.name or "").removeprefix("present_") for v in gone})
    return model


def homes(model: ir.Model) -> dict[str, int]:
    """The block that computes each output, by name; the model's own are the head's, the number of blocks."""
    head = len(boundaries(model))
    return {v.name or "": _part(v) if _is_state(v) else head for v in model.graph.outputs}


def segment(model: ir.Model, index: int, outputs: Container[str] | None = None) -> ir.Model:
    """In place: block `index` alone, as a graph from `hidden_<index-1>` and its past states to
    `hidden_<index>` and its present states. Block 0 starts at the model's inputs; the index after the last
    block is the head.

    Args:
        model: the graph.
        index: of the block.
        outputs: names of its outputs beside `hidden_<index>`; by default the states of a block, and the
            model's outputs of the head.

    Raises:
        UsageError: the graph has no stack of blocks.
    """
    ends = _ends(model)
    graph = model.graph
    inside = index < len(ends)
    if outputs is None:
        outputs = {v.name for v in graph.outputs if _part(v) == index and inside == _is_state(v)}
    kept = [v for v in graph.outputs if v.name in outputs]
    if inside:
        kept.insert(0, ends[index])
        ends[index].type = ir.TensorType(ir.DataType.FLOAT)
    if index:
        start = ir.Value(name=ends[index - 1].name, type=ir.TensorType(ir.DataType.FLOAT))
        start.shape = _needed_shape(model, ends[index - 1])
        ends[index - 1].name = f"{start.name}_computed"
        ends[index - 1].replace_all_uses_with(start)
        graph.inputs.insert(0, start)
    _set_outputs(graph, kept)
    _drop_unused(model, {value.name or "" for value in graph.inputs})
    return model


def _needed_shape(model: ir.Model, value: ir.Value) -> ir.Shape | None:
    """The shape of a value where it must be known: ONNX Runtime makes nodes of CausalConvWithState by it."""
    if all(node.op_type != "CausalConvWithState" or node.domain for node in model.graph):
        return None
    if value.shape is None:
        common.ShapeInferencePass()(model)
    return value.shape


def _ends(model: ir.Model) -> list[ir.Value]:
    ends = boundaries(model)
    if not ends:
        raise UsageError(
            "the graph has no stack of blocks to cut at", "only a model with an nn.ModuleList of blocks has"
        )
    return ends


def _is_state(value: ir.Value) -> bool:
    return (value.name or "").startswith("present_")


def _part(value: ir.Value) -> int:
    """The block that computes an output: the one after the last boundary that the output depends on."""
    seen: set[ir.Node] = set()
    todo, last = [value], -1
    while todo:
        current = todo.pop()
        match = HIDDEN.fullmatch(current.name or "")
        if match:
            last = max(last, int(match[1]))
            continue
        node = current.producer()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [x for x in node.inputs if x is not None]
    return last + 1


def _set_outputs(graph: ir.Graph, outputs: list[ir.Value]) -> None:
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def _drop_unused(model: ir.Model, inputs: set[str]) -> None:
    """Remove what no output needs: nodes, weights, and those of `inputs` that no node reads."""
    common.RemoveUnusedNodesPass()(model)
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in inputs and not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
