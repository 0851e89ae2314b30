"""Faults for the rate of bisection: beside those of `mutations`, ones that show in some calls only, wrong
adapters and wrong exporters; and which places are right for a fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from mutations import KINDS, Mutation, _cells, _hand_over, _states, some
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from xlstm_export.lift import lift
from xlstm_export.lift.adapter import RecurrentCell
from xlstm_export.trace import export as trace

COMPUTED = ".computed"  # what `_hand_over` appends to a name
RECURRENCES = ("LSTM", "GRU", "RNN")


def _outputs(model: onnx.ModelProto) -> list[str]:
    return [x.name for x in model.graph.output if not x.name.startswith("present_")]


def _behind(model: onnx.ModelProto, name: str, steps: list[tuple[Any, ...]], **weights: np.ndarray) -> str:
    """Compute output `name` from what the graph computes for it, called "it" in the steps."""
    computed = _hand_over(model, name)
    for key, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value, f"fault.{key}"))
    for op, inputs, output, *attributes in steps:
        given = [
            computed if x == "it" else x if x.startswith(("past_", "=")) else f"fault.{x}" for x in inputs
        ]
        given = [x.removeprefix("=") for x in given]
        made = name if output == "it" else f"fault.{output}"
        model.graph.node.append(helper.make_node(op, given, [made], made, **dict(attributes)))
    return name


def state_unread(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A cell starts afresh in every call: shows where a stream is cut."""
    node = some(rng, [*_cells(model), *(n for n in model.graph.node if n.op_type in RECURRENCES)])
    if not isinstance(node, onnx.NodeProto):
        return None
    index = some(rng, [i for i, x in enumerate(node.input) if x.startswith("past_")])
    if not isinstance(index, int):
        return None
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "fault.zero"))
    at = list(model.graph.node).index(node)
    cleared = helper.make_node("Mul", [node.input[index], "fault.zero"], ["fault.state"], "fault.state")
    model.graph.node.insert(at, cleared)
    model.graph.node[at + 1].input[index] = "fault.state"
    return f"{node.name} does not read its state"


def shifted(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """The result of a cell is one position late."""
    node = some(rng, _cells(model))
    if not isinstance(node, onnx.NodeProto):
        return None
    name, at = node.output[0], list(model.graph.node).index(node)
    for reader in model.graph.node:
        reader.input[:] = ["fault.late" if x == name else x for x in reader.input]
    bounds = {"zero": [0], "one": [1], "last": [-1], "axis": [1]}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(x, np.int64), f"fault.{key}") for key, x in bounds.items()
    )
    made = [
        ("Slice", [name, "fault.zero", "fault.one", "fault.axis"], "fault.head", {}),
        ("Slice", [name, "fault.zero", "fault.last", "fault.axis"], "fault.rest", {}),
        ("Concat", ["fault.head", "fault.rest"], "fault.late", {"axis": 1}),
    ]
    for offset, (op, inputs, output, attributes) in enumerate(made):
        model.graph.node.insert(at + 1 + offset, helper.make_node(op, inputs, [output], output, **attributes))
    return name


def per_row(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """One row of an output or state is 10% larger."""
    name = some(rng, [*_outputs(model), *(present for _, present in _states(model))])
    shapes = {x.name: len(x.type.tensor_type.shape.dim) for x in model.graph.output}
    if not isinstance(name, str):
        return None
    shape = np.array([-1, *[1] * (shapes[name] - 1)], np.int64)
    steps: list[tuple[Any, ...]] = [
        ("Shape", ["it"], "shape"),
        ("Gather", ["shape", "zero"], "rows"),
        ("Range", ["zero", "rows", "one"], "each"),
        ("Equal", ["each", "row"], "hit"),
        ("Where", ["hit", "much", "single"], "factor"),
        ("Reshape", ["factor", "form"], "factors"),
        ("Mul", ["it", "factors"], "it"),
    ]
    row, zero, one = (np.int64(x) for x in (rng.integers(0, 3), 0, 1))
    much, single = np.float32(1.1), np.float32(1)
    return _behind(
        model,
        name,
        steps,
        form=shape,
        row=np.asarray(row),
        zero=np.asarray(zero),
        one=np.asarray(one),
        much=np.asarray(much),
        single=np.asarray(single),
    )


def saturates(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A memory that stops growing: shows after many positions, or never."""
    name = some(rng, [present for _, present in _states(model) if present[-2:] in ("_C", "_n", "_c", "_h")])
    if not isinstance(name, str):
        return None
    most = float(rng.choice([0.5, 1.0, 3.0, 10.0]))
    steps = [("Clip", ["it", "low", "high"], "it")]
    return _behind(model, name, steps, low=np.asarray(np.float32(-most)), high=np.asarray(np.float32(most)))


def rounded_state(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A state goes through half on its way to the next call."""
    name = some(rng, [present for _, present in _states(model)])
    if not isinstance(name, str):
        return None
    steps = [
        ("Cast", ["it"], "half", ("to", TensorProto.FLOAT16)),
        ("Cast", ["half"], "it", ("to", TensorProto.FLOAT)),
    ]
    return _behind(model, name, steps)


def constant_part(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """An inner value is 1% larger: an extra node in the middle of the graph."""
    names = [n.output[0] for n in model.graph.node if n.op_type in ("MatMul", "Add", "LayerNormalization")]
    name = some(rng, [x for x in names if x not in {y.name for y in model.graph.output}])
    if not isinstance(name, str):
        return None
    for reader in model.graph.node:
        reader.input[:] = ["fault.larger" if x == name else x for x in reader.input]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "fault.factor"))
    at = next(i for i, n in enumerate(model.graph.node) if name in n.output)
    larger = helper.make_node("Mul", [name, "fault.factor"], ["fault.larger"], "fault.larger")
    model.graph.node.insert(at + 1, larger)
    return name


def channel_axis(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """Scales per channel run along the other axis of a square matrix."""
    dims = {t.name: list(t.dims) for t in model.graph.initializer}
    found = [
        n
        for n in model.graph.node
        if n.op_type == "DequantizeLinear"
        and len(dims.get(n.input[1], [])) == 1
        and len(set(dims.get(n.input[0], [0, 1]))) == 1
    ]
    node = some(rng, found)
    if not isinstance(node, onnx.NodeProto):
        return None
    axis = next((a for a in node.attribute if a.name == "axis"), None)
    if axis is None:
        axis = node.attribute.add(name="axis", type=onnx.AttributeProto.INT, i=1)
    axis.i = 1 - axis.i % 2
    return node.name


def gate_blocks(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A standard recurrence reads its gates in another order."""
    node = some(rng, [n for n in model.graph.node if n.op_type in RECURRENCES])
    if not isinstance(node, onnx.NodeProto):
        return None
    name = node.input[int(rng.integers(1, 3))]
    tensor = next((t for t in model.graph.initializer if t.name == name), None)
    if tensor is None:
        return None
    values = numpy_helper.to_array(tensor)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
    split = np.split(values, gates, axis=1)
    turned = np.concatenate([split[-1], *split[:-1]], axis=1) if gates > 1 else -values
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), name))
    return name


EXTRA: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        *(state_unread, shifted, per_row, saturates, rounded_state, constant_part, channel_axis, gate_blocks),
    )
}
ALL = {**KINDS, **EXTRA}


def planted(source: onnx.ModelProto, kind: str, seed: int) -> onnx.ModelProto | None:
    """A copy of the model with one fault; None where it has nothing for that kind."""
    model = onnx.ModelProto()
    model.CopyFrom(source)
    rng = np.random.default_rng([seed, *kind.encode()])
    return None if ALL[kind](model, rng) is None else model


# --- Which places are right ------------------------------------------------------------------------------


def right_places(right: onnx.ModelProto, wrong: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """Names of the nodes, and of the values, at which the fault itself is.

    These are nodes that were added or changed, and those that read a changed weight, or an added node, at
    once or behind its DequantizeLinear.
    """
    stored = [{t.name: t.SerializeToString() for t in m.graph.initializer} for m in (right, wrong)]
    changed = {name for name, data in stored[1].items() if stored[0].get(name) != data}
    before = {n.name: _plain(n) for n in right.graph.node}
    added = {n.name for n in wrong.graph.node if n.name not in before}
    named = added | {n.name for n in wrong.graph.node if before.get(n.name) != _plain(n)}
    changed |= {x for n in wrong.graph.node if n.name in added for x in n.output}
    for node in wrong.graph.node:
        if changed & {*node.input}:
            named.add(node.name)
            if node.op_type == "DequantizeLinear":
                changed |= {*node.output}
    values = {x for n in wrong.graph.node if n.name in named for x in n.output}
    return named, values


def _plain(node: onnx.NodeProto) -> bytes:
    """A node without what `_hand_over` does to names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [x.removesuffix(COMPUTED) for x in copy.input]
    copy.output[:] = [x.removesuffix(COMPUTED) for x in copy.output]
    return copy.SerializeToString()


# --- Wrong adapters, wrong exporters ---------------------------------------------------------------------


@dataclass(frozen=True)
class WrongAdapter:
    """A fault in the adapter of the cell at `path`: its result is scaled, or a state is not kept."""

    path: str
    state: str = ""

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Lifting in the block has the fault."""
        adapt, keep = lift._adapt, RecurrentCell.keep

        def wrong_adapt(path: str, cell: Any, adapter: Any) -> Any:
            made = adapt(path, cell, adapter)
            if path == self.path and not self.state:
                forward = made.forward
                made.forward = lambda *args, **given: _larger(forward(*args, **given))
            return made

        def wrong_keep(cell: Any, kind: str, value: Tensor) -> None:
            if cell.path == self.path and kind == self.state:
                value = value * 0.9
            keep(cell, kind, value)

        lift._adapt, RecurrentCell.keep = wrong_adapt, wrong_keep  # type: ignore[method-assign]
        try:
            yield
        finally:
            lift._adapt, RecurrentCell.keep = adapt, keep  # type: ignore[method-assign]


def _larger(result: Any) -> Any:
    return (result[0] * 1.05, *result[1:]) if isinstance(result, tuple) else result * 1.05


@contextlib.contextmanager
def wrong_exporter(kind: str, seed: int, right: Callable[[], ir.Model] | None = None) -> Iterator[list[str]]:
    """Tracing in the block makes a graph with a fault; yields the nodes where it is, once it was traced."""
    real, named = trace.trace, list[str]()

    def wrong(*args: Any, **options: Any) -> Any:
        model, io = real(*args, **options)
        source = ir.to_proto(model)
        found = planted(source, kind, seed)
        if found is None:
            return model, io
        named[:] = sorted(right_places(source, found)[0])
        made = ir.from_proto(found)
        made.meta.update(model.meta)
        return made, io

    trace.trace = wrong
    try:
        yield named
    finally:
        trace.trace = real
