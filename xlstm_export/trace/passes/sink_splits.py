"""A Split whose parts all go through the same operator moves behind it, so that it runs once.

Cases:
1. Every part is read by one node only, all of them the same elementwise operator of one operand, or of
   two with the same constant of one element at the same place (a soft cap's Div, Tanh, Mul).
2. Every part is read by one Transpose only, all with the same permutation: the Split's axis moves along.
3. Casts to the same type are case 1.
4. A part that is a graph output, or read twice, or through something else: left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from ...graph.values import only_reader, scalar, typed

ELEMENTWISE = {"Add", "Cast", "Div", "Exp", "Mul", "Neg", "Sigmoid", "Softplus", "Sub", "Tanh"}


def sink_splits(model: ir.Model) -> int:
    """Apply the pass in place; returns how many nodes went away."""
    count = 0
    for split in list(model.graph):
        while split.domain in ("", "ai.onnx") and split.op_type == "Split" and len(split.outputs) > 1:
            readers = _equal_readers(split)
            if readers is None:
                break
            split = _sink(model.graph, split, readers)
            count += len(readers) - 1
    return count


def _equal_readers(split: ir.Node) -> list[ir.Node] | None:
    found = [only_reader(part) for part in split.outputs]
    readers = [node for node in found if node is not None]
    if len(readers) < len(found) or any(node.outputs[0].is_graph_output() for node in readers):
        return None
    signatures = {_signature(node, part) for node, part in zip(readers, split.outputs, strict=True)}
    return readers if len(signatures) == 1 and None not in signatures else None


def _signature(node: ir.Node, part: ir.Value) -> tuple[object, ...] | None:
    """A key that is equal for two nodes that do the same to their part."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
        return None
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    if node.op_type == "Transpose" and "perm" in node.attributes:  # case 2
        return (node.op_type, attributes)
    if node.op_type not in ELEMENTWISE or len(node.inputs) > 2:
        return None
    operands: list[object] = []
    for value in node.inputs:
        number = None if value is part else scalar(value)
        if value is not part and (number is None or not _broadcasts(value, part)):
            return None
        operands.append("part" if value is part else (number, value.dtype if value is not None else None))
    return (node.op_type, attributes, *operands)


def _broadcasts(value: ir.Value | None, part: ir.Value) -> bool:
    """Whether an operand of one element leaves the rank of the part as it is."""
    if value is None or value.shape is None or part.shape is None:
        return value is not None and value.shape is not None and len(value.shape) <= 1
    return len(value.shape) <= len(part.shape)


def _sink(graph: ir.Graph, split: ir.Node, readers: list[ir.Node]) -> ir.Node:
    """Put one of `readers` before the Split and the Split in the place of all; returns the new Split."""
    first, whole = readers[0], split.inputs[0]
    assert whole is not None
    inputs = [whole if value is split.outputs[0] else value for value in first.inputs]
    once = ir.Node(first.domain, first.op_type, inputs, first.attributes.values(), num_outputs=1)
    axis = split.attributes.get_int("axis", 0)
    shape = None if whole.shape is None else list(whole.shape)
    if first.op_type == "Transpose":
        perm = list(first.attributes["perm"].as_ints())
        axis = perm.index(axis % len(perm))
        shape = None if shape is None else [shape[index] for index in perm]
    typed(once.outputs[0], first.outputs[0], shape)
    attributes = {name: a for name, a in split.attributes.items() if name != "axis"}
    attributes["axis"] = ir.AttrInt64("axis", axis)
    behind = ir.Node(
        "",
        "Split",
        [once.outputs[0], *split.inputs[1:]],
        attributes.values(),
        num_outputs=len(readers),
    )
    graph.insert_before(split, [*_constants_before(graph, once, split), once, behind])
    for node, part in zip(readers, behind.outputs, strict=True):
        typed(part, node.outputs[0], node.outputs[0].shape)
        node.outputs[0].replace_all_uses_with(part)
        graph.remove(node, safe=True)
    graph.remove(split, safe=True)
    return behind


def _constants_before(graph: ir.Graph, once: ir.Node, split: ir.Node) -> list[ir.Node]:
    """Copies of Constant nodes that `once` reads, which may stand after the Split."""
    copies: list[ir.Node] = []
    for index, value in enumerate(once.inputs):
        node = value.producer() if value is not None else None
        if node is not None and node.op_type == "Constant":
            copy = ir.Node("", "Constant", [], node.attributes.values(), num_outputs=1)
            typed(copy.outputs[0], node.outputs[0], node.outputs[0].shape)
            once.replace_input_with(index, copy.outputs[0])
            copies.append(copy)
    return copies
