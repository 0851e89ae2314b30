"""What must hold before the first graph pass and after each one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ...errors import BuildError

Port = tuple[str, ir.DataType | None, int | None]  # name, element type, number of dimensions


@dataclass(frozen=True)
class Interface:
    """The interface of a graph: its inputs and outputs. No pass may change it."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def interface_of(graph: ir.Graph) -> Interface:
    """Names, element types and ranks of the inputs and outputs, in order."""
    return Interface(tuple(map(_port, graph.inputs)), tuple(map(_port, graph.outputs)))


def require_traced(model: ir.Model) -> Interface:
    """The precondition: inputs and outputs have types and shapes, and the graph is well-formed.

    Raises:
        BuildError: the precondition does not hold.
    """
    found = interface_of(model.graph)
    for name, dtype, rank in (*found.inputs, *found.outputs):
        if dtype is None or rank is None:
            raise BuildError(f"the traced graph gives {name} no type or shape", "please report this graph")
    _require_well_formed(model, "tracing")
    return found


def require_kept(model: ir.Model, before: Interface, graph_pass: str) -> None:
    """The postcondition of a pass: the same inputs and outputs, and the graph is well-formed.

    Args:
        before: from `require_traced`.
        graph_pass: name of the pass, for the error.

    Raises:
        BuildError: the postcondition does not hold.
    """
    after = interface_of(model.graph)
    # Outputs that the module returns twice become one value. That is no defect of a pass: the export refuses
    # such a module when it compares the names.
    returned_twice = len({*model.graph.outputs}) < len(model.graph.outputs)
    if after != before and not returned_twice:
        old, new = ((*side.inputs, *side.outputs) for side in (before, after))
        changed = sorted({str(port[0]) for port in set(old) ^ set(new)}) or ["their order"]
        raise BuildError(
            f"the graph pass {graph_pass} changed inputs or outputs of the graph: {', '.join(changed)}",
            "please report this graph",
        )
    _require_well_formed(model, f"the graph pass {graph_pass}")


def defects(graph: ir.Graph) -> Iterator[str]:
    """Where a graph is not well-formed: a value is an input, a weight, or the result of an earlier node."""
    yield from _defects(graph, set())


def _require_well_formed(model: ir.Model, culprit: str) -> None:
    defect = next(defects(model.graph), None)
    if defect is not None:
        raise BuildError(f"{culprit} left a broken graph: {defect}", "please report this graph")


def _defects(graph: ir.Graph, outside: set[ir.Value]) -> Iterator[str]:
    known = outside | {*graph.inputs, *graph.initializers.values()}
    for name, weight in graph.initializers.items():
        if weight.const_value is None:
            yield f"the weight {name} has no value"
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                yield f"{node.op_type} reads {_name(value)} before anything gives it"
        for attribute in node.attributes.values():
            for inner in _graphs(attribute):
                yield from _defects(inner, known)
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            yield f"nothing gives the output {_name(value)}"


def _graphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _port(value: ir.Value) -> Port:
    return value.name or "", value.dtype, None if value.shape is None else len(value.shape)


def _name(value: ir.Value) -> str:
    return value.name or "a value without name"
