"""Plain descriptions of models, states and targets. Data only: nothing here imports a heavy library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from .errors import UsageError

# The content of a JSON file, as it is read and written. Its values are checked where they are read: no static
# type says more of a file than that.
Json: TypeAlias = dict[str, Any]
JsonMapping: TypeAlias = Mapping[str, Any]

OP_DOMAIN = "xlstm"
OP_VERSION = 1
PLUGIN_VERSION = "1"
# Of nodes with an attribute that version 1 does not have: a plugin of then would leave it out without a word.
PLUGIN_VERSION_WITH_FUNCTIONS = "2"
PLUGIN_NAMESPACE = "xlstm"

# What an mLSTM is exported as: our operator; LinearAttention of ONNX from opset 27 on, the convolution before
# it as CausalConvWithState; or the operators of these names in ONNX Runtime's own domain, which older
# versions have too.
OWN, STANDARD, MICROSOFT = "xlstm", "standard", "com.microsoft"
RECURRENCES = (OWN, STANDARD, MICROSOFT)


def require_importable(recurrence: str) -> None:
    """Raise UsageError for a bundle of a graph whose operators no version of TensorRT has."""
    if recurrence != OWN:
        raise UsageError(
            f"a bundle is for TensorRT, which has no LinearAttention, as --recurrence {recurrence} writes it",
            f"export with --recurrence {OWN} for a bundle; for ONNX Runtime copy model.onnx and its .data",
        )


# Longest chunk of the chunkwise mLSTM form, in tokens. 64 balances the quadratic part inside a chunk
# (∝ L) against reading and writing the matrix memory once per chunk (∝ 1/L) on CPUs and GPUs alike.
CHUNK = 64

_STEP = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h|d|w)")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}  # of a unit of `Meaning.step`

# How a stream of TiRex-2 is scaled: by statistics of the context, which the caller gives, where values of 0
# and 1 alone are taken as they are or not; or by those of all values until then, which the graph carries.
FROZEN, FROZEN_BINARY, RUNNING = "frozen", "frozen, binary as it is", "running"
SCALERS = (FROZEN, FROZEN_BINARY, RUNNING)

STATE_KINDS = ("C", "n", "m", "y", "c", "conv", "h", "begun")


@dataclass(frozen=True)
class StateSpec:
    """One recurrent state tensor that becomes a graph input and a graph output.

    Attributes:
        block: index of the recurrent layer, counted in the order of the module tree.
        kind: one of `STATE_KINDS`.
        shape: dimensions after the batch dimension.
        dtype: NumPy name of the element type.
    """

    block: int
    kind: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def past(self) -> str:
        return f"past_{self.block}_{self.kind}"

    @property
    def present(self) -> str:
        return f"present_{self.block}_{self.kind}"

    @property
    def elements(self) -> int:
        """Elements per stream (batch row)."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True)
class BlockSpec:
    """One recurrent layer: its path in the user's module, and its states."""

    index: int
    path: str
    cell: str  # "mlstm", "slstm", "conv", "lstm", "gru", "rnn", or of a user's adapter
    heads: int
    head_dim: int
    states: tuple[StateSpec, ...]


@dataclass(frozen=True)
class ModelSpec:
    """Description of a model: what `inspect` prints, and what the roofline is computed from."""

    name: str
    parameters: int
    # Parameters a decode step reads: all but embedding tables, of which one row is read.
    parameters_read: int
    blocks: tuple[BlockSpec, ...]
    context_length: int | None = None
    vocab_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return tuple(state for block in self.blocks for state in block.states)

    @property
    def state_elements(self) -> int:
        """State elements per stream."""
        return sum(state.elements for state in self.states)


def multiple_of(dim: int | str, letter: str) -> int:
    """The factor of a letter in a dimension: 1 for "S", 4 for "4*S"; 0 for any other dimension."""
    if not isinstance(dim, str):
        return 0
    factor, _, found = dim.rpartition("*")
    if found != letter or not (factor == "" or factor.isdecimal()):
        return 0
    return int(factor or dim == letter)


def steps_of(dim: int | str) -> int:
    """Positions of an axis to a step of the stream: 1 for "S", 4 for "4*S", 0 for any other dimension."""
    return multiple_of(dim, "S")


@dataclass(frozen=True)
class Meaning:
    """What the values of an output are, as far as that is known or was declared.

    Attributes:
        quantiles: their levels, ascending, where an axis of the output has quantiles; else empty.
        step: time from one row of a series to the next, such as "1h" or "15min".
        unit: of the values.
        scaler: how a stream is scaled, one of `SCALERS`; empty where it is not told or as TiRex does it.
    """

    quantiles: tuple[float, ...] = ()
    step: str = ""
    unit: str = ""
    scaler: str = ""

    def __post_init__(self) -> None:
        levels = self.quantiles
        if any(not 0 < x < 1 for x in levels) or any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"quantiles {list(levels)} are not ascending numbers between 0 and 1")
        if self.step and _STEP.fullmatch(self.step) is None:
            raise ValueError(f"step {self.step!r} is not written as 1h, 15min, 30s, 1d or 1w")
        if self.scaler and self.scaler not in SCALERS:
            raise ValueError(f"scaler {self.scaler!r} is none of {', '.join(SCALERS)}")

    @property
    def seconds(self) -> float | None:
        """The step in seconds; None where it is not known."""
        parts = _STEP.fullmatch(self.step)
        return None if parts is None else float(parts[1]) * SECONDS[parts[2]]

    def axis(self, shape: Sequence[int | str]) -> int | None:
        """The axis of an output that has the quantiles; None where there is no single one.

        The last axis is meant where several have as many elements.
        """
        axes = [axis for axis, dim in enumerate(shape) if dim == len(self.quantiles) and axis > 0]
        if not self.quantiles or not axes:
            return None
        return axes[0] if len(axes) == 1 else (axes[-1] if axes[-1] == len(shape) - 1 else None)

    def to_json(self) -> Json:
        """The entries of io.json; none for what is not known."""
        entries = {
            "quantiles": list(self.quantiles),
            "step": self.step,
            "unit": self.unit,
            "scaler": self.scaler,
        }
        return {key: value for key, value in entries.items() if value}

    @staticmethod
    def from_json(entry: JsonMapping) -> Meaning:
        """The meaning from an entry of io.json.

        Raises:
            ValueError, TypeError: a value is not what it should be.
        """
        step, unit, scaler = (entry.get(name, "") for name in ("step", "unit", "scaler"))
        if not all(isinstance(text, str) for text in (step, unit, scaler)):
            raise TypeError(f"step {step!r}, unit {unit!r} and scaler {scaler!r} should be text")
        return Meaning(tuple(float(level) for level in entry.get("quantiles", ())), step, unit, scaler)


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output.

    Symbolic dimensions are strings: "B" (batch), "S" (positions of the stream), and "4*S" for an axis with
    four positions of its own to each of the stream; "2*B" for two rows to each stream, in outputs only.

    Attributes:
        signed: integers of which some may be below zero, as offsets and times are, and tokens are not.
        meaning: of an output's values.
        gaps: of an input: NaN is a missing value.
        infinite: of an input: it may hold infinite values, as masks do that are added.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    signed: bool = False
    meaning: Meaning = Meaning()
    gaps: bool = False
    infinite: bool = False

    @property
    def time_axis(self) -> int | None:
        """The axis that has the positions; None where there is none, or no single one."""
        axes = [axis for axis, dim in enumerate(self.shape) if steps_of(dim)]
        return axes[0] if len(axes) == 1 else None

    @property
    def steps(self) -> int:
        """Positions along the time axis to a position of the stream; 1 without a time axis."""
        return 1 if self.time_axis is None else steps_of(self.shape[self.time_axis])

    @property
    def batched(self) -> bool:
        """Whether the first axis is the batch; else all streams share the tensor."""
        return self.shape[:1] == ("B",)

    def sized(self, batch: int, length: int) -> tuple[int, ...]:
        """The shape for `batch` streams and `length` positions of the stream."""
        return tuple(
            d if isinstance(d, int) else multiple_of(d, "B") * batch + steps_of(d) * length
            for d in self.shape
        )


@dataclass(frozen=True)
class IoSpec:
    """Interface of an exported graph: everything a caller needs to run it; stored as `io.json`.

    Attributes:
        inputs, outputs: the model's own tensors, without the states.
        states: past → present pairs, carried from call to call; all zero at the start of a stream.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]

    def to_json(self) -> Json:
        def tensor(spec: TensorSpec) -> Json:
            flags = {name: True for name in ("signed", "gaps", "infinite") if getattr(spec, name)}
            more = {**flags, **spec.meaning.to_json()}
            return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), **more}

        return {
            "schema": 1,
            "inputs": [tensor(spec) for spec in self.inputs],
            "outputs": [tensor(spec) for spec in self.outputs],
            "states": [
                {
                    "past": s.past,
                    "present": s.present,
                    "block": s.block,
                    "kind": s.kind,
                    "dtype": s.dtype,
                    "shape": ["B", *s.shape],
                }
                for s in self.states
            ],
        }

    @staticmethod
    def from_json(data: Json) -> IoSpec:
        def tensor(entry: Json) -> TensorSpec:
            flags = {name: entry.get(name) is True for name in ("signed", "gaps", "infinite")}
            shape = tuple(entry["shape"])
            return TensorSpec(entry["name"], entry["dtype"], shape, meaning=Meaning.from_json(entry), **flags)

        def state(entry: Json) -> StateSpec:
            spec = StateSpec(entry["block"], entry["kind"], tuple(entry["shape"][1:]), entry["dtype"])
            if (entry["past"], entry["present"]) != (spec.past, spec.present):
                raise ValueError(f"{entry['past']} is not carried on by {entry['present']}")
            return spec

        return IoSpec(
            tuple(tensor(entry) for entry in data["inputs"]),
            tuple(tensor(entry) for entry in data["outputs"]),
            tuple(state(entry) for entry in data["states"]),
        )
