"""Comparison of two graphs as computations: weights bit by bit, attributes, and what every node reads.

Both graphs are walked backwards from their outputs, in pairs. So neither the names nor the order of nodes
matter, and what differs is named by the graph that is right. Weights are read one pair at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

Kind = Literal["weight", "attribute", "wiring", "interface"]


@dataclass(frozen=True)
class Mismatch:
    """One difference of a graph from the right one, in words.

    Attributes:
        kind: what differs.
        name: the weight, node, or input or output of the graph.
        text: the whole finding as one sentence part.
    """

    kind: Kind
    name: str
    text: str


@dataclass
class Comparison:
    """Result of `compare_graphs`: how much was compared, and all that differs."""

    nodes: int = 0
    weights: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)


def compare_graphs(ours: ir.Model, theirs: ir.Model) -> Comparison:
    """Compare a graph with the right one; the weights of both may be lazy.

    Args:
        ours: the graph to judge.
        theirs: the right one, whose names are reported.
    """
    walk = _Walk(ours, theirs)
    walk.interface(ours.graph, theirs.graph)
    walk.graphs(ours.graph, theirs.graph)
    walk.unreached(ours.graph)
    for name in sorted({*ours.functions, *theirs.functions}, key=str):
        if (name in ours.functions) != (name in theirs.functions):
            walk.report("wiring", name[1], f"function {name[1]} is " + _presence(name in ours.functions))
    for domain in sorted({*ours.opset_imports, *theirs.opset_imports}):
        a, b = (model.opset_imports.get(domain) for model in (ours, theirs))
        if a != b:
            walk.report("interface", domain, f"operator set {domain or 'ai.onnx'} is {a}, should be {b}")
    return walk.found


class _Walk:
    def __init__(self, ours: ir.Model, theirs: ir.Model) -> None:
        self._functions = (ours.functions, theirs.functions)
        self.found = Comparison()
        self._inputs: dict[int, int] = {}  # id of an input of ours → id of the same input of theirs
        self._seen: set[tuple[int, int]] = set()  # pairs of nodes, weights and functions
        self._reached: set[int] = set()
        self._keep: list[object] = []  # what ids refer to must stay alive

    def report(self, kind: Kind, name: str, text: str) -> None:
        self.found.mismatches.append(Mismatch(kind, name, text))

    def interface(self, ours: ir.Graph, theirs: ir.Graph) -> None:
        """Names, types and shapes of inputs and outputs, states included."""
        for what, a, b in (("input", ours.inputs, theirs.inputs), ("output", ours.outputs, theirs.outputs)):
            found, expected = ([_described(value) for value in values] for values in (a, b))
            for x, y in zip(found, expected, strict=False):
                if x != y:
                    self.report("interface", y, f"{what} {x} should be {y}")
            if len(found) != len(expected):
                self.report("interface", what, f"{len(found)} {what}s, should be {len(expected)}")

    def graphs(self, ours: ir.Graph | ir.Function, theirs: ir.Graph | ir.Function) -> None:
        """All that the outputs of two graphs, subgraphs or functions depend on."""
        self._inputs.update((id(a), id(b)) for a, b in zip(ours.inputs, theirs.inputs, strict=False))
        self._keep += [ours, theirs]
        pending: list[tuple[ir.Node, ir.Node]] = []
        for a, b in zip(ours.outputs, theirs.outputs, strict=False):
            self._value(a, b, f"output {b.name}", pending)
        while pending:
            self._nodes(*pending.pop(), pending)

    def unreached(self, graph: ir.Graph) -> None:
        """What the graph holds although no output depends on it."""
        dead = [node for node in graph if id(node) not in self._reached]
        for node in dead:
            self.report("wiring", node.name or "", f"{node.name} takes no part in any output")
        for name, value in graph.initializers.items():
            if id(value) not in self._reached and not any(use.node in dead for use in value.uses()):
                self.report("weight", name, f"{name} takes no part in any output")

    def _nodes(self, a: ir.Node, b: ir.Node, pending: list[tuple[ir.Node, ir.Node]]) -> None:
        if (id(a), id(b)) in self._seen:
            return
        self._seen.add((id(a), id(b)))
        self._reached.add(id(a))
        self.found.nodes += 1
        name = b.name or b.op_type
        if a.op_identifier() != b.op_identifier():
            self.report("wiring", name, f"{name} is a {a.op_type}, should be a {b.op_type}")
            return
        for key in sorted({*a.attributes, *b.attributes}):
            self._attribute(name, a.attributes.get(key), b.attributes.get(key))
        bodies = [functions.get(a.op_identifier()) for functions in self._functions]
        if bodies[0] is not None and bodies[1] is not None and (id(bodies[0]), 0) not in self._seen:
            self._seen.add((id(bodies[0]), 0))
            self.graphs(bodies[0], bodies[1])
        x, y = _given(a.inputs), _given(b.inputs)
        if len(x) != len(y) or len(a.outputs) != len(b.outputs):
            self.report("wiring", name, f"{name} has {len(x)} inputs, should have {len(y)}")
        for index, (p, q) in enumerate(zip(x, y, strict=False)):
            self._value(p, q, f"input {index} of {name}", pending)

    def _value(
        self, a: ir.Value | None, b: ir.Value | None, where: str, pending: list[tuple[ir.Node, ir.Node]]
    ) -> None:
        if a is None or b is None:
            if a is not b:
                self.report("wiring", where, f"{where} is " + _presence(a is not None))
            return
        stored, expected = _stored(a), _stored(b)
        if stored is not None and expected is not None:
            return self._weight(a, b, stored, expected)
        one, other = a.producer(), b.producer()
        if (stored is None) != (expected is None) or (one is None) != (other is None):
            same = False
        elif one is None or other is None:
            same = self._inputs.get(id(a)) == id(b)
        else:
            same = a.index() == b.index()
        if not same:
            self.report("wiring", where, f"{where} is {a.name}, should be {b.name}")
        elif one is not None and other is not None:
            pending.append((one, other))

    def _weight(self, a: ir.Value, b: ir.Value, x: ir.TensorProtocol, y: ir.TensorProtocol) -> None:
        self._reached.add(id(a))
        for value in (a, b):
            if (node := value.producer()) is not None:
                self._reached.add(id(node))
        if (id(a), id(b)) in self._seen:
            return
        self._seen.add((id(a), id(b)))
        self.found.weights += 1
        text = tensor_difference(x, y)
        if text:
            self.report("weight", b.name or "", f"{b.name}{text}")

    def _attribute(self, node: str, a: ir.Attr | None, b: ir.Attr | None) -> None:
        name = next(x.name for x in (b, a) if x is not None)
        if a is None or b is None or a.type != b.type or a.ref_attr_name != b.ref_attr_name:
            x, y = ("absent" if attr is None else _shown(attr) for attr in (a, b))
            text = f"attribute {name} of {node} is {x}, should be {y}"
            return self.report("attribute", node, text)
        if a.is_ref():
            return None
        if a.type == ir.AttributeType.GRAPH:
            return self.graphs(a.as_graph(), b.as_graph())
        if a.type == ir.AttributeType.TENSOR:
            if text := tensor_difference(a.as_tensor(), b.as_tensor()):
                self.report("attribute", node, f"attribute {name} of {node}{text}")
            return None
        if _bits(a) != _bits(b):
            text = f"attribute {name} of {node} is {_shown(a)}, should be {_shown(b)}"
            self.report("attribute", node, text)
        return None


def tensor_difference(ours: ir.TensorProtocol, theirs: ir.TensorProtocol) -> str:
    """How a tensor differs from the right one, to follow its name; empty if all bits are equal."""
    for what, x, y in (("type", ours.dtype.name, theirs.dtype.name), ("shape", *map(_shape, (ours, theirs)))):
        if x != y:
            return f" has {what} {x}, should have {y}"
    a, b = (np.ascontiguousarray(tensor.numpy()) for tensor in (ours, theirs))
    other = a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8)
    if not other.any():
        return ""
    wrong = other.reshape(a.size, -1).any(axis=1)
    at = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), a.shape))
    place = f"[{', '.join(map(str, at))}]" if at else ""
    count = f" ({int(wrong.sum()):,} of {a.size:,} elements differ)" if a.size > 1 else ""
    return f"{place} is {_number(a[at])}, should be {_number(b[at])}{count}"


def _number(x: object) -> str:
    return f"{float(x):.9g}" if np.issubdtype(type(x), np.floating) else str(x)  # type: ignore[arg-type]


def _shape(tensor: ir.TensorProtocol) -> str:
    return str([int(n) for n in tensor.shape.numpy()])


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant."""
    node = value.producer()
    if node is None:
        return value.const_value
    attribute = node.attributes.get("value") if node.op_type == "Constant" else None
    return None if attribute is None or attribute.is_ref() else attribute.as_tensor()


def _given(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """The inputs without those that are left out at the end."""
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    return given


def _described(value: ir.Value) -> str:
    shape = None if value.shape is None else [n if isinstance(n, int) else str(n) for n in value.shape]
    return f"{value.name} ({value.dtype.name if value.dtype else 'untyped'}, {shape})"


def _shown(attribute: ir.Attr) -> str:
    return f"that of {attribute.ref_attr_name}" if attribute.is_ref() else str(attribute.value)


def _bits(attribute: ir.Attr) -> object:
    """The value as a file stores it, in FP32, such that -0.0 and 0.0 differ and NaN equals NaN."""
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return np.asarray(attribute.value, np.float32).tobytes()
    return attribute.value


def _presence(present: bool) -> str:
    return "there, and should not be" if present else "missing"
