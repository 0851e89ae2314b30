"""Faults made by seed, in the graph or the weights of an export: nobody listed the single ones.

A kind is a function of a model in memory (weights included) and a generator; it changes the model in place,
and says what it did, or returns None where the model has nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from bisect_faults import MLSTM, SLSTM, nodes
from onnx import TensorProto, helper, numpy_helper

from xlstm_export.runfolder import MODEL, MODEL_DATA

Mutation = Callable[[onnx.ModelProto, np.random.Generator], str | None]
BORDERS = (1, 2, 63, 64, 65, 127, 128, 129)
OTHER_OPERATORS = {"Add": "Sub", "Mul": "Add", "Sigmoid": "Tanh", "Gelu": "Relu", "Tanh": "Sigmoid"}


def some(rng: np.random.Generator, values: list) -> object | None:  # type: ignore[type-arg]
    return values[int(rng.integers(len(values)))] if values else None


def floats(model: onnx.ModelProto, least: int = 1) -> list[TensorProto]:
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    tensors = [t for t in model.graph.initializer if t.data_type in kinds]
    return [t for t in tensors if np.prod(t.dims) >= least and t.dims]


def put(tensor: TensorProto, values: np.ndarray) -> None:
    dtype = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.astype(dtype)), tensor.name))


def edit(model: onnx.ModelProto, rng: np.random.Generator, change: Callable, least: int = 2) -> str | None:  # type: ignore[type-arg]
    tensor = some(rng, floats(model, least))
    if not isinstance(tensor, TensorProto):
        return None
    before = numpy_helper.to_array(tensor)
    values = before.copy()
    found = change(values)
    put(tensor, values if found is None else found)
    return None if np.array_equal(numpy_helper.to_array(tensor), before) else tensor.name


def element(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    def change(x: np.ndarray) -> None:
        at = tuple(int(rng.integers(n)) for n in x.shape)
        x[at] += float(rng.choice([-1, 1])) * max(0.5, 3 * float(x.std()))

    return edit(model, rng, change)


def sign(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    return edit(model, rng, np.negative, 16)


def scaled(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    factor = float(rng.choice([0.5, 0.99, 1.01, 1.5]))
    return edit(model, rng, lambda x: x * factor, 16)


def row(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """One row or entry of the first axis, such as the embedding of one token."""

    def change(x: np.ndarray) -> None:
        x[int(rng.integers(x.shape[0]))] *= 1.5

    return edit(model, rng, change, 16)


def axis(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    return edit(model, rng, lambda x: np.flip(x, int(rng.integers(x.ndim))), 16)


def exchanged(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """Two weights of one shape have each other's values."""
    first = some(rng, floats(model, 16))
    if not isinstance(first, TensorProto):
        return None
    others = [t for t in floats(model, 16) if t.dims == first.dims and t.raw_data != first.raw_data]
    second = some(rng, others)
    if not isinstance(second, TensorProto):
        return None
    a, b = (numpy_helper.to_array(t).copy() for t in (first, second))
    put(first, b)
    put(second, a)
    return None if np.array_equal(a, b) else f"{first.name}, {second.name}"


def _dequantized(model: onnx.ModelProto, index: int) -> list[TensorProto]:
    names = {n.input[index] for n in nodes(model, "DequantizeLinear") if len(n.input) > index}
    return [t for t in model.graph.initializer if t.name in names]


def quantization_scale(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    tensor = some(rng, _dequantized(model, 1))
    if not isinstance(tensor, TensorProto):
        return None
    put(tensor, numpy_helper.to_array(tensor) * 1.5)
    return tensor.name


def zero_point(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    tensor = some(rng, [t for t in _dequantized(model, 2) if t.data_type == TensorProto.INT8])
    if not isinstance(tensor, TensorProto):
        return None
    put(tensor, numpy_helper.to_array(tensor) + 3)
    return tensor.name


def gate_order(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    node = some(rng, nodes(model, MLSTM))
    if not isinstance(node, onnx.NodeProto):
        return None
    node.input[3], node.input[4] = node.input[4], node.input[3]
    return node.name


def attribute(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    found = [(n, a) for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.FLOAT]
    chosen = some(rng, found)
    if not isinstance(chosen, tuple):
        return None
    chosen[1].f = chosen[1].f * float(rng.choice([0.5, 2.0, 100.0])) + 1e-6
    return f"{chosen[0].name}.{chosen[1].name}"


def _cells(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [*nodes(model, MLSTM), *nodes(model, SLSTM)]


def _states(model: onnx.ModelProto) -> list[tuple[str, str]]:
    names = [x.name for x in model.graph.output if x.name.startswith("present_")]
    return [(name.replace("present_", "past_", 1), name) for name in names]


def _hand_over(model: onnx.ModelProto, name: str) -> str:
    """Give the output `name` to a node that is added behind; returns what the graph computes for it."""
    computed = f"{name}.computed"
    for node in model.graph.node:
        node.output[:] = [computed if x == name else x for x in node.output]
        node.input[:] = [computed if x == name else x for x in node.input]
    return computed


def not_carried(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A state is wired through: its new value is the old one."""
    chosen = some(rng, _states(model))
    if not isinstance(chosen, tuple):
        return None
    past, present = chosen
    _hand_over(model, present)
    model.graph.node.append(helper.make_node("Identity", [past], [present], "fault"))
    return present


def other_state(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A cell reads the state of another one, or its own in another order."""
    shapes = {x.name: str(x.type.tensor_type.shape) for x in model.graph.input}
    node = some(rng, _cells(model))
    if not isinstance(node, onnx.NodeProto):
        return None
    index = some(rng, [i for i, x in enumerate(node.input) if x.startswith("past_")])
    if not isinstance(index, int):
        return None
    now = node.input[index]
    others = [x for x in shapes if x.startswith("past_") and x != now and shapes[x] == shapes[now]]
    other = some(rng, others)
    if not isinstance(other, str):
        return None
    node.input[index] = other
    return f"{node.name} reads {other}"


def clamped(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A stabilizer that stays between two bounds."""
    name = some(rng, [present for _, present in _states(model) if present.endswith("_m")])
    if not isinstance(name, str):
        return None
    return _bounded(model, name, 0.5)


def operator(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    node = some(rng, [n for n in model.graph.node if n.op_type in OTHER_OPERATORS and not n.domain])
    if not isinstance(node, onnx.NodeProto):
        return None
    node.op_type = OTHER_OPERATORS[node.op_type]
    del node.attribute[:]
    return node.name


def negated(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    node = some(rng, _cells(model))
    if not isinstance(node, onnx.NodeProto):
        return None
    at = list(model.graph.node).index(node)
    index = int(rng.integers(3 if node.op_type == MLSTM else 1))
    model.graph.node.insert(at, helper.make_node("Neg", [node.input[index]], ["fault"], "fault"))
    model.graph.node[at + 1].input[index] = "fault"
    return node.name


def slightly_larger(model: onnx.ModelProto, factor: float, output: int = 0) -> str:
    """An output is multiplied by a number that is almost one."""
    name = model.graph.output[output].name
    computed = _hand_over(model, name)
    model.graph.initializer.append(helper.make_tensor("fault.factor", TensorProto.FLOAT, [], [factor]))
    model.graph.node.append(helper.make_node("Mul", [computed, "fault.factor"], [name], "fault"))
    return name


def _at_size(model: onnx.ModelProto, of: int, size: int, factor: float = 1.1) -> str:
    """Make the first output larger where this axis of the first input has this size."""
    name, given = model.graph.output[0].name, model.graph.input[0].name
    computed = _hand_over(model, name)
    constants = [
        helper.make_tensor("fault.axis", TensorProto.INT64, [], [of]),
        helper.make_tensor("fault.size", TensorProto.INT64, [], [size]),
        helper.make_tensor("fault.much", TensorProto.FLOAT, [], [factor]),
        helper.make_tensor("fault.one", TensorProto.FLOAT, [], [1.0]),
    ]
    model.graph.initializer.extend(constants)
    for op, inputs, output in (
        ("Shape", [given], "fault.shape"),
        ("Gather", ["fault.shape", "fault.axis"], "fault.found"),
        ("Equal", ["fault.found", "fault.size"], "fault.hit"),
        ("Where", ["fault.hit", "fault.much", "fault.one"], "fault.factor"),
        ("Mul", [computed, "fault.factor"], name),
    ):
        model.graph.node.append(helper.make_node(op, inputs, [output], output))
    return f"{name} where axis {of} has {size}"


def eps(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """The eps of a norm or a recurrence is another one."""
    found = [
        (n, a)
        for n in model.graph.node
        for a in n.attribute
        if a.name in ("eps", "epsilon") and a.type == onnx.AttributeProto.FLOAT
    ]
    chosen = some(rng, found)
    if not isinstance(chosen, tuple):
        return None
    chosen[1].f = float(rng.choice([0.0, 1e-3, 1e-2]))
    return f"{chosen[0].name}.{chosen[1].name}"


def overflow(model: onnx.ModelProto, name: str, reached: float) -> str:
    """A memory has room for four times what it has `reached`: it is full some thousand positions later."""
    return _bounded(model, name, 4 * reached)


def saturated(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A memory cannot grow beyond what it has after some steps."""
    names = [present for _, present in _states(model) if present.endswith(("_C", "_n", "_c"))]
    name = some(rng, names)
    return _bounded(model, name, float(rng.choice([0.1, 1.0, 4.0]))) if isinstance(name, str) else None


def _bounded(model: onnx.ModelProto, name: str, most: float) -> str:
    computed = _hand_over(model, name)
    bounds = [helper.make_tensor(f"fault.{x}", TensorProto.FLOAT, [], [x]) for x in (-most, most)]
    model.graph.initializer.extend(bounds)
    clip = helper.make_node("Clip", [computed, *(x.name for x in bounds)], [name], "fault")
    model.graph.node.append(clip)
    return f"{name} within {most:g}"


def shifted(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """A state that is handed on has another offset or size."""
    chosen = some(rng, [present for _, present in _states(model)])
    if not isinstance(chosen, str):
        return None
    computed = _hand_over(model, chosen)
    op, value = (("Mul", 1.01), ("Add", 0.1))[int(rng.integers(2))]
    model.graph.initializer.append(helper.make_tensor("fault.by", TensorProto.FLOAT, [], [value]))
    model.graph.node.append(helper.make_node(op, [computed, "fault.by"], [chosen], "fault"))
    return f"{chosen} {op} {value}"


def slstm_gates(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """The pre-activations of an sLSTM (B, S, 4, H, D) come in another order of gates."""
    node = some(rng, nodes(model, SLSTM))
    if not isinstance(node, onnx.NodeProto):
        return None
    order = [0, 1, 2, 3]
    while order == sorted(order):
        order = rng.permutation(4).tolist()
    at = list(model.graph.node).index(node)
    model.graph.initializer.append(helper.make_tensor("fault.order", TensorProto.INT64, [4], order))
    gather = helper.make_node("Gather", [node.input[0], "fault.order"], ["fault"], "fault", axis=2)
    model.graph.node.insert(at, gather)
    model.graph.node[at + 1].input[0] = "fault"
    return f"{node.name} {order}"


def per_row(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """The first output of one row of the batch is larger."""
    name, row = model.graph.output[0].name, int(rng.integers(3))
    computed = _hand_over(model, name)
    for label, value in (
        ("row", [row]),
        ("start", [0]),
        ("end", [2**31]),
        ("axis", [0]),
        ("next", [row + 1]),
    ):
        model.graph.initializer.append(helper.make_tensor(f"fault.{label}", TensorProto.INT64, [1], value))
    model.graph.initializer.append(helper.make_tensor("fault.much", TensorProto.FLOAT, [], [1.1]))
    slices = {"before": ("start", "row"), "of": ("row", "next"), "after": ("next", "end")}
    for label, (start, end) in slices.items():
        inputs = [computed, f"fault.{start}", f"fault.{end}", "fault.axis"]
        model.graph.node.append(helper.make_node("Slice", inputs, [f"fault.{label}"], f"fault.{label}"))
    parts = ["fault.before", "fault.larger", "fault.after"]
    model.graph.node.append(helper.make_node("Mul", ["fault.of", "fault.much"], ["fault.larger"], "fault"))
    model.graph.node.append(helper.make_node("Concat", parts, [name], "fault.join", axis=0))
    return f"{name} of row {row}"


def per_length(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    return _at_size(model, 1, int(rng.choice(BORDERS)))


def per_batch(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    return _at_size(model, 0, int(rng.integers(1, 9)))


def integer(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """One weight that is stored as an integer is another one."""

    def change(x: np.ndarray) -> np.ndarray:
        flat = x.astype(np.int8).ravel()
        at, most = int(rng.integers(flat.size)), 7 if "int4" in x.dtype.name else 127
        flat[at] = -most if flat[at] > 0 else most
        return flat.reshape(x.shape)

    return _integers(model, rng, change)


def integer_row(model: onnx.ModelProto, rng: np.random.Generator) -> str | None:
    """One row of weights that are stored as integers has the other sign."""

    def change(x: np.ndarray) -> np.ndarray:
        values = x.astype(np.int8)
        values[int(rng.integers(x.shape[0]))] *= -1
        return values

    return _integers(model, rng, change)


def _integers(
    model: onnx.ModelProto, rng: np.random.Generator, change: Callable[[np.ndarray], np.ndarray]
) -> str | None:
    kinds = (TensorProto.INT8, TensorProto.INT4)
    tensors = [t for t in model.graph.initializer if t.data_type in kinds and len(t.dims) == 2]
    tensor = some(rng, tensors)
    if not isinstance(tensor, TensorProto):
        return None
    before = numpy_helper.to_array(tensor)
    after = change(before)
    put(tensor, after)
    return None if np.array_equal(before.astype(np.int8), after) else tensor.name


KINDS: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        *(element, sign, scaled, row, axis, exchanged, quantization_scale, zero_point),
        *(gate_order, attribute, not_carried, other_state, clamped, operator, negated),
        *(per_length, per_batch, per_row),
        *(eps, saturated, shifted, slstm_gates),
        *(integer, integer_row),
    )
}


def write(model: onnx.ModelProto, folder: Path) -> None:
    """Write a model in memory, weights included, in place of the graph of a folder."""
    (folder / MODEL_DATA).unlink(missing_ok=True)  # onnx would append to it
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(
        copy, folder / MODEL, save_as_external_data=True, location=MODEL_DATA, size_threshold=1024
    )


def mutated(source: onnx.ModelProto, seed: int) -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """One fault of each kind that the model has something for: kind, what was changed, the model."""
    for index, (kind, mutation) in enumerate(KINDS.items()):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        where = mutation(model, np.random.default_rng([seed, index]))
        if where is not None:
            yield kind, where, model
