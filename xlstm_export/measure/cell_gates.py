"""Audit of a model's gates along a stream: the range of the stabilizers, and the length of the memory.

The normalizer of an mLSTM has the lower bound exp(−m), where m is the stabilizer; it exceeds the range of
FP16 if m < −11.09. The forget gates determine the length of the memory: if the mean of −logsigmoid(f) is r,
the memory is halved every ln 2 / r positions. An error in f accumulates over that time. So a change of the
half-life shows an error that a single output does not show.

Gates are taken from the graph itself, at the inputs of its recurrence operators; stabilizers and
normalizers are then computed from them in float64, by the recurrence as it is written in `ops/reference.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..checks import Check
from ..graph.files import load_graph
from ..graph.values import recurrence
from ..inputs import Arrays, batch_of, cut, length_of
from ..ops.linear_attention import read_back
from ..ops.operands import MLSTM
from ..ops.reference import LOG_ZERO
from ..options import Context
from ..runfolder import RunFolder
from ..sessions.cpu.observed_graph import ObservedGraph
from ..specs import Json

PIECE = 256
# Range of m in which exp(−m) is a normal number of the type. Denormals do not count: they are often flushed
# to zero.
RANGES = {
    "fp16": (-math.log(65504.0), -math.log(2.0**-14)),
    "bf16": (-math.log(3.3895313892515355e38), -math.log(2.0**-126)),
}


@dataclass(frozen=True)
class HeadGates:
    """Statistics of one head along the stream.

    Attributes:
        m_min, m_max: range of the stabilizer over positions and, in an sLSTM, units.
        fp16_share, bf16_share: share of positions with exp(−m) outside the type's range; None in an sLSTM,
            which does not compute it.
        smallest_normalizer: the smallest denominator: max(|qᵀn|, exp(−m)) in an mLSTM (exp(−m) where it has
            no normalizer), n in an sLSTM.
        half_life: positions after which the forget gates have halved a memory, by the mean of their logarithm
            (the median over an sLSTM's units); infinite if they never close, or on the whole make it grow.
    """

    m_min: float
    m_max: float
    fp16_share: float | None
    bf16_share: float | None
    smallest_normalizer: float
    half_life: float


@dataclass(frozen=True)
class BlockGates:
    """The heads of one recurrent layer; `cell` is "mlstm" or "slstm"."""

    block: int
    cell: str
    heads: tuple[HeadGates, ...]


@dataclass(frozen=True)
class Gates:
    """What `audit` found over `positions` positions of each stream."""

    positions: int
    blocks: tuple[BlockGates, ...]

    def to_json(self, reference: Gates | None = None) -> Json:
        """As JSON; with the reference's half-lives beside the candidate's own if a reference is given."""
        blocks = []
        for number, block in enumerate(self.blocks):
            heads: list[dict[str, Any]] = []
            for head, values in enumerate(block.heads):
                other = reference.blocks[number].heads[head].half_life if reference else None
                heads.append({"head": head, **asdict(values), "reference_half_life": other})
            blocks.append({"block": block.block, "cell": block.cell, "heads": heads})
        return {"positions": self.positions, "blocks": blocks}


def audit(run: RunFolder | Path, inputs: Mapping[str, np.ndarray], context: Context = Context()) -> Gates:
    """Stream inputs through an export and examine its gates.

    Args:
        run: run folder of any precision.
        inputs: by graph input name, each (B, S, ...).
        context: threads and progress.

    Raises:
        InputError: the folder cannot be read.
        BuildError: the runtime failed.
    """
    run = RunFolder.of(run)
    cells = _cells(load_graph(run.model))
    with ObservedGraph(run.path, [name for cell in cells for name in cell.names], context.threads) as graph:
        io = graph.io
        length = length_of(inputs, io.inputs)
        graph.reset(batch_of(inputs, io.inputs))
        # A graph without states carries nothing on, so its sequence cannot be cut into pieces.
        piece = PIECE if io.states else length
        for start in range(0, length, piece):
            context.progress(f"gates: position {start:,} of {length:,}")
            values = graph.run(cut(inputs, io, start, min(start + piece, length)))
            for cell in cells:
                cell.read(values)
    return Gates(length, tuple(cell.result() for cell in cells))


def memory_checks(found: Gates, reference: Gates, limit: float) -> list[Check]:
    """Check per block: the largest |ln ratio| of a head's half-life to that of the reference.

    Args:
        found: gates of the candidate.
        reference: gates of FP32, on the same inputs.
        limit: limit of the precision.
    """
    checks = []
    for ours, theirs in zip(found.blocks, reference.blocks, strict=True):
        pairs = [(a.half_life, b.half_life) for a, b in zip(ours.heads, theirs.heads, strict=True)]
        changes = [_log_ratio(a, b) for a, b in pairs]
        worst = max(range(len(changes)), key=lambda head: _worse(changes[head]))
        detail = {
            "head": worst,
            "half_life": pairs[worst][0],
            "reference_half_life": pairs[worst][1],
            "block": ours.block,
        }
        checks.append(Check(f"memory length: block {ours.block}", changes[worst], limit, detail))
    return checks


def _log_ratio(a: float, b: float) -> float:
    if a == b:
        return 0.0  # also if both half-lives are infinite
    return abs(math.log(a / b)) if 0 < a < math.inf and 0 < b < math.inf else math.inf


def _worse(value: float) -> float:
    return math.inf if math.isnan(value) else value


# --- The recurrences as the audit needs them: gates, m and normalizer, without the memory itself -----


@dataclass
class _Cell:
    """A recurrence operator of the graph, and the statistics collected so far."""

    block: int
    values: dict[str, str]  # operand → name of the value in the graph
    constants: Arrays
    attributes: Mapping[str, float] = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.values.values())

    def operands(self, values: Mapping[str, np.ndarray]) -> Arrays:
        found = {operand: values[name].astype(np.float64) for operand, name in self.values.items()}
        return {**self.constants, **found}

    def log_forget(self, f: np.ndarray) -> np.ndarray:
        """Logarithm of the forget gate of a pre-activation."""
        return f if self.attributes.get("forget_exp", 0.0) else log_sigmoid(f)

    def read(self, values: Mapping[str, np.ndarray]) -> None:
        raise NotImplementedError

    def result(self) -> BlockGates:
        raise NotImplementedError

    def joined(self, name: str) -> np.ndarray:
        return np.concatenate([piece[name] for piece in self.seen])


class _Mlstm(_Cell):
    def read(self, values: Mapping[str, np.ndarray]) -> None:
        x = self.operands(values)
        q, k = x["q"] * self.attributes.get("scale", 1.0), x["k"]  # (B, S, H, Dk)
        i, lf = x["i"], self.log_forget(x["f"])  # (B, S, H)
        if self.attributes.get("input_sigmoid", 0.0):
            i = log_sigmoid(i)
        normalize = self.attributes.get("normalize", 1.0)
        batch, length, heads, dim = k.shape
        m = self.state.get("m", np.zeros((batch, heads)))
        n = self.state.get("n", np.zeros((batch, heads, dim)))
        stabilizers, normalizers = [], []
        for t in range(length):
            m_new = np.maximum(lf[:, t] + m, i[:, t])
            n = np.exp(lf[:, t] + m - m_new)[..., None] * n + np.exp(i[:, t] - m_new)[..., None] * k[:, t]
            m = m_new
            stabilizers.append(m)
            with np.errstate(over="ignore"):
                normalizers.append(np.maximum(normalize * np.abs((q[:, t] * n).sum(-1)), np.exp(-m)))
        self.state = {"m": m, "n": n}
        self.seen.append(
            # (B·S, H)
            {
                "m": np.stack(stabilizers, 1).reshape(-1, heads),
                "normalizer": np.stack(normalizers, 1).reshape(-1, heads),
                "decay": -lf.reshape(-1, heads),
            }
        )

    def result(self) -> BlockGates:
        m, normalizer, decay = (self.joined(name) for name in ("m", "normalizer", "decay"))
        shares = {name: ((m < lowest) | (m > highest)).mean(0) for name, (lowest, highest) in RANGES.items()}
        heads = tuple(
            HeadGates(
                float(m[:, h].min()),
                float(m[:, h].max()),
                float(shares["fp16"][h]),
                float(shares["bf16"][h]),
                float(normalizer[:, h].min()),
                half_life(float(decay[:, h].mean())),
            )
            for h in range(m.shape[1])
        )
        return BlockGates(self.block, "mlstm", heads)


class _Slstm(_Cell):
    def read(self, values: Mapping[str, np.ndarray]) -> None:
        x = self.operands(values)
        y = x["y"]  # (B, S, H, D)
        batch, length, heads, dim = y.shape
        zeros = np.zeros((batch, heads, dim))
        previous = np.concatenate([self.state.get("y", zeros)[:, None], y[:, :-1]], 1)
        recurrent = np.einsum("bshd,hdge->bsghe", previous, x["R"])
        raw = x["x"] + recurrent + x["bias"]  # (B, S, 4, H, D)
        f = np.minimum(raw[:, :, 1], self.attributes.get("forget_max", math.inf))
        i, lf = raw[:, :, 0], self.log_forget(f)
        least = self.attributes.get("normalizer_min", 0.0)
        m, n = self.state.get("m", zeros), self.state.get("n", zeros)
        stabilizers, normalizers = [], []
        for t in range(length):
            m_new = np.maximum(lf[:, t] + np.where(n == 0, LOG_ZERO, m), i[:, t])
            n = np.maximum(np.exp(lf[:, t] + m - m_new) * n + np.exp(i[:, t] - m_new), least)
            m = m_new
            stabilizers.append(m)
            normalizers.append(n)
        self.state = {"y": y[:, -1], "m": m, "n": n}
        self.seen.append(
            # extremes (1, H) over all units; decay (1, H, D) is a mean per unit
            {
                "m_min": np.min(stabilizers, axis=(0, 1, 3))[None],
                "m_max": np.max(stabilizers, axis=(0, 1, 3))[None],
                "normalizer": np.min(normalizers, axis=(0, 1, 3))[None],
                "decay": -lf.sum((0, 1))[None],
                "count": np.array([batch * length]),
            }
        )

    def result(self) -> BlockGates:
        decay = self.joined("decay").sum(0) / self.joined("count").sum()  # (H, D)
        low, high = self.joined("m_min").min(0), self.joined("m_max").max(0)
        normalizer = self.joined("normalizer").min(0)
        heads = tuple(
            HeadGates(
                float(low[h]),
                float(high[h]),
                None,
                None,
                float(normalizer[h]),
                half_life(float(np.median(decay[h]))),
            )
            for h in range(decay.shape[0])
        )
        return BlockGates(self.block, "slstm", heads)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """ln σ(x), exact at both ends."""
    return np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x)))


def half_life(decay: float) -> float:
    """Positions until exp(−decay · positions) is a half."""
    return math.log(2.0) / decay if decay > 0 else math.inf


def _cells(model: ir.Model) -> list[_Cell]:
    """The recurrence operators of a graph, in its order."""
    cells: list[_Cell] = []
    for node in model.graph:
        operator = recurrence(node)
        if operator is None:
            if (made_from := read_back(node)) is not None:
                operands, attributes = made_from
                block = _block(operands.pop("m0"), len(cells))
                names = {operand: value.name or "" for operand, value in operands.items()}
                cells.append(_Mlstm(block, names, {}, attributes))
            continue
        mlstm = operator is MLSTM
        named: dict[str, ir.Value] = {}
        for operand in ("q", "k", "i", "f") if mlstm else ("x", "R", "bias"):
            value = node.inputs[operator.index(operand)]
            assert value is not None, "no operand that is read here is optional"
            named[operand] = value
        if not mlstm:
            named["y"] = node.outputs[operator.output("y")]
        values, constants = {}, {}
        for operand, value in named.items():
            if value.const_value is not None:
                constants[operand] = _array(value.const_value)
            else:
                values[operand] = value.name or ""
        block = _block(node.inputs[operator.index("m0")], len(cells))
        known = {x.name for x in operator.attributes}
        attributes = {name: x.as_float() for name, x in node.attributes.items() if name in known}
        cells.append((_Mlstm if mlstm else _Slstm)(block, values, constants, attributes))
    return cells


def _array(tensor: ir.TensorProtocol) -> np.ndarray:
    """A stored weight in float64; read here, because onnx-ir refuses files that have a second hard link."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy(), np.float64)
    shape = [int(dim) for dim in tensor.shape]
    count = int(np.prod(shape))
    values = np.fromfile(tensor.path, tensor.dtype.numpy(), count, offset=tensor.offset or 0)
    return values.reshape(shape).astype(np.float64)


def _block(past: ir.Value | None, number: int) -> int:
    """Index of the block whose state an operator carries; without states, its number in the graph."""
    match = re.fullmatch(r"past_(\d+)_m", (past.name if past is not None else None) or "")
    return int(match[1]) if match else number
