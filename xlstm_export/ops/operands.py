"""The operands and attributes of the two recurrence operators.

Operands: names, order, shapes, types, and which of them are states. This table is the only place in Python
where operands have positions: function bodies, graph rewrites, the audit of cell gates and the calls of
native libraries use it. The C++ adapters (`plugins/adapters`) declare the same operands and attributes; tests
compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, cast

from ..errors import UsageError
from ..specs import PLUGIN_VERSION, PLUGIN_VERSION_WITH_FUNCTIONS

# All operands of one kind have one element type. "f32": always FP32. "io": inputs and outputs of each
# position. "state": a state that may be stored in 16 bits. "weight": a matrix, int8 where its scale is given.
Kind = Literal["f32", "io", "state", "weight"]


@dataclass(frozen=True)
class Operand:
    """An input or output of a recurrence operator.

    Attributes:
        name: as in the function bodies and in `common/call.h`.
        axes: its dimensions; a number is a fixed size. B batch, S sequence, H heads, D units of a head,
            Dk and Dv sizes of a key and a value.
        kind: which element types it may have.
        state: the kind of state it holds (`specs.STATE_KINDS`); None where it holds none.
        gate: whether it is a pre-activation that gates are computed from, or a part of one.
        narrow: whether a 16-bit model may have it in 16 bits; all else is FP32 in every precision, but for a
            state of kind "state", on which the recipe decides.
        optional: whether a node may lack it. Such an operand comes last.
    """

    name: str
    axes: tuple[str | int, ...]
    kind: Kind = "f32"
    state: str | None = None
    gate: bool = False
    narrow: bool = False
    optional: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the named axes."""
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)


@dataclass(frozen=True)
class Attribute:
    """An attribute of a recurrence operator. All are FP32 in a file; a flag is 0 or 1.

    Attributes:
        name: as in the signatures of `ops/reference.py`, in the function bodies and in `common/call.h`.
        default: what a node without it means. Such a node, and its body, are the same bytes in every version.
        low, high: the smallest and the largest value.
        flag: whether it has two values, and is a bool in Python.
        required: whether an exported node has it even where it has the default value.
        declared: whether every body declares it; others are in a body where a node of the graph has them.
    """

    name: str
    default: float
    low: float = 0.0
    high: float = math.inf
    flag: bool = False
    required: bool = False
    declared: bool = False


@dataclass(frozen=True)
class Operator:
    """One of the two recurrence operators.

    Attributes:
        name: ONNX op_type, in the domain `specs.OP_DOMAIN`.
        cell: the kind of cell, as in `specs.BlockSpec`.
        inputs, outputs: in their order.
        attributes: what selects the function, in the order of the reference's keywords.
    """

    name: str
    cell: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...]

    def index(self, name: str) -> int:
        """Position of an input.

        Raises:
            KeyError: it has no such input.
        """
        return self._inputs[name]

    def output(self, name: str) -> int:
        """Position of an output.

        Raises:
            KeyError: it has no such output.
        """
        return self._outputs[name]

    @cached_property
    def required(self) -> tuple[Operand, ...]:
        """The inputs that every node has."""
        return tuple(x for x in self.inputs if not x.optional)

    @cached_property
    def states(self) -> tuple[tuple[int, int], ...]:
        """Per state: position of the input that holds it before, of the output that holds it after."""
        after = {x.state: index for index, x in enumerate(self.outputs) if x.state is not None}
        return tuple((index, after[x.state]) for index, x in enumerate(self.inputs) if x.state is not None)

    @cached_property
    def gates(self) -> tuple[int, ...]:
        """Positions of the inputs that gates are computed from."""
        return tuple(index for index, x in enumerate(self.inputs) if x.gate)

    @cached_property
    def values(self) -> tuple[int, ...]:
        """Positions of the inputs that a 16-bit model has in 16 bits; the result then has their type."""
        return tuple(index for index, x in enumerate(self.inputs) if x.kind == "io" and x.narrow)

    @cached_property
    def weight(self) -> int | None:
        """Position of the input that is a weight matrix."""
        return next((index for index, x in enumerate(self.inputs) if x.kind == "weight"), None)

    def written(self, values: Mapping[str, object]) -> dict[str, float]:
        """The attributes that a node with these values has: what it must have, and what is no default.

        Raises:
            UsageError: a value is out of its range.
        """
        written = {}
        for attribute in self.attributes:
            value = float(cast(float, values[attribute.name]))
            known = value in (0.0, 1.0) if attribute.flag else attribute.low <= value <= attribute.high
            if not known:
                span = "0 or 1" if attribute.flag else f"{attribute.low:g} to {attribute.high:g}"
                raise UsageError(f"{attribute.name} of {self.name} is {value:g}, expected {span}")
            if attribute.required or value != attribute.default:
                written[attribute.name] = value
        return written

    def plugin_version(self, names: Collection[str]) -> str:
        """The version of TensorRT's plugin that a node with these attributes needs."""
        newer = any(x.name in names for x in self.attributes if not x.declared)
        return PLUGIN_VERSION_WITH_FUNCTIONS if newer else PLUGIN_VERSION

    def given(self, names: Collection[str]) -> frozenset[str]:
        """Those of the names that are attributes which a body only has where a node has them."""
        return frozenset(x.name for x in self.attributes if not x.required and x.name in names)

    def source(self, output: Operand) -> Operand | None:
        """The input whose shape and type an output has; None where no input has both."""
        if output.state is not None:
            return next(x for x in self.inputs if x.state == output.state)
        return next((x for x in self.inputs if (x.axes, x.kind) == (output.axes, output.kind)), None)

    @cached_property
    def _inputs(self) -> Mapping[str, int]:
        return {x.name: index for index, x in enumerate(self.inputs)}

    @cached_property
    def _outputs(self) -> Mapping[str, int]:
        return {x.name: index for index, x in enumerate(self.outputs)}


_KEYS, _VALUES, _GATES = ("B", "S", "H", "Dk"), ("B", "S", "H", "Dv"), ("B", "S", "H")
_MATRIX, _VECTOR, _SCALAR = ("B", "H", "Dk", "Dv"), ("B", "H", "Dk"), ("B", "H")
_UNITS = ("B", "H", "D")

MLSTM = Operator(
    name="XlstmMlstm",
    cell="mlstm",
    inputs=(
        Operand("q", _KEYS, "io", narrow=True),
        Operand("k", _KEYS, "io", narrow=True),
        Operand("v", _VALUES, "io", narrow=True),
        Operand("i", _GATES, gate=True),
        Operand("f", _GATES, gate=True),
        Operand("C0", _MATRIX, "state", state="C"),
        Operand("n0", _VECTOR, state="n"),
        Operand("m0", _SCALAR, state="m"),
    ),
    outputs=(
        Operand("h", _VALUES, "io", narrow=True),
        Operand("C", _MATRIX, "state", state="C"),
        Operand("n", _VECTOR, state="n"),
        Operand("m", _SCALAR, state="m"),
    ),
    attributes=(
        # A body cannot compute Dk^-0.5, the scale of the contract, so every exported node has it.
        Attribute("scale", 1.0, low=-math.inf, required=True, declared=True),
        Attribute("eps", 1e-6, required=True, declared=True),
        Attribute("forget_exp", 0.0, flag=True),
        Attribute("input_sigmoid", 0.0, flag=True),
        Attribute("normalize", 1.0, flag=True),
    ),
)

SLSTM = Operator(
    name="XlstmSlstm",
    cell="slstm",
    inputs=(
        Operand("x", ("B", "S", 4, "H", "D"), "io", gate=True),
        Operand("R", ("H", "D", 4, "D"), "weight", narrow=True),
        Operand("bias", (4, "H", "D"), gate=True),
        Operand("y0", _UNITS, state="y"),
        Operand("c0", _UNITS, state="c"),
        Operand("n0", _UNITS, state="n"),
        Operand("m0", _UNITS, state="m"),
        Operand(
            "R_scale", ("H", 4, "D"), optional=True
        ),  # int8 R = integers · R_scale, TensorRT's plugin only
    ),
    outputs=(
        Operand("y", ("B", "S", "H", "D"), "io"),
        Operand("y_n", _UNITS, state="y"),
        Operand("c_n", _UNITS, state="c"),
        Operand("n_n", _UNITS, state="n"),
        Operand("m_n", _UNITS, state="m"),
    ),
    attributes=(
        Attribute("forget_max", math.inf, low=-math.inf, declared=True),
        Attribute("forget_exp", 0.0, flag=True),
        Attribute("normalizer_min", 0.0, high=1.0),
    ),
)

OPERATORS: Mapping[str, Operator] = MappingProxyType({op.name: op for op in (MLSTM, SLSTM)})
