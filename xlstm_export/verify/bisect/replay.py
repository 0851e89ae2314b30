"""Replay of the blocks of a graph, each from the reference's inputs and states, with all inner values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...distance import compare_states
from ...errors import BuildError, UsageError
from ...graph import cut as graph_cut
from ...graph import files
from ...graph.element_types import typed_nodes
from ...inputs import Arrays
from ...runfolder import MODEL
from ...sessions.cpu.observed_graph import add_outputs, open_graph
from ...sessions.cpu.round_half import HALF
from ...specs import IoSpec

FLOATS = frozenset((ir.DataType.FLOAT, *HALF))
# Name suffixes of values that quantization adds; each corresponds to a value of the FP32 graph.
STAND_INS = (".dequantized", ".half", ".float")

# Runs a graph with the weights of a folder; returns its outputs by name.
Runner = Callable[[ir.Model, Path, Mapping[str, np.ndarray], int], Arrays]


def run_onnxruntime(model: ir.Model, folder: Path, feed: Mapping[str, np.ndarray], threads: int) -> Arrays:
    """Run a graph in ONNX Runtime on the CPU; half is rounded, integers are exact, as in `OrtSession`.

    Raises:
        BuildError: the runtime failed.
        InputError: the runtime cannot load the graph.
    """
    session = open_graph(model, folder, threads)
    names = [x.name for x in session.get_outputs()]
    wanted = {x.name for x in session.get_inputs()}
    try:
        return dict(
            zip(names, session.run(names, {k: x for k, x in feed.items() if k in wanted}), strict=True)
        )
    except Exception as error:  # the runtime's own exception types derive from nothing else
        raise BuildError(f"ONNX Runtime stopped: {error}", "is the file from this version?") from error


@dataclass
class Side:
    """One of the two graphs.

    Attributes:
        folder: folder of its graph and weights.
        io: its inputs, outputs and states.
        threads: CPU threads of the runner.
        run: the runner.
        blocks: number of blocks of the stack; 0 if there is no stack: the model is then one block.
    """

    folder: Path
    io: IoSpec
    threads: int = 0
    run: Runner = run_onnxruntime
    blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.blocks = len(graph_cut.boundaries(self.graph()))

    def graph(self) -> ir.Model:
        return files.load_graph(self.folder / MODEL)

    def part(self, index: int) -> ir.Model:
        """Block `index` as a graph of its own, the head last; the whole graph if there is no stack."""
        return graph_cut.segment(self.graph(), index) if self.blocks else self.graph()

    def whole(self, feed: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs, present states and block results of one call."""
        model = self.graph()
        given_as = add_outputs(model, [value.name or "" for value in graph_cut.boundaries(model)])
        found = self.run(model, self.folder, feed, self.threads)
        return {**found, **{name: found[given] for name, given in given_as.items()}}

    def outputs(self, index: int, feed: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs of a block."""
        return self.run(self.part(index), self.folder, feed, self.threads)

    def values(self, index: int, feed: Mapping[str, np.ndarray], names: Sequence[str]) -> Arrays:
        """The named inner values of a block, in FP32."""
        model = self.part(index)
        given_as = add_outputs(model, names)
        found = self.run(model, self.folder, feed, self.threads)
        return {name: found[given_as[name]] for name in names}


def float_values(model: ir.Model) -> list[str]:
    """Names of the float results of a graph's nodes, in the order of the nodes."""
    types = typed_nodes(model)[1]
    return [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.name and types.get(value) in FLOATS
    ]


def pairs(candidate: ir.Model, reference: ir.Model) -> Iterator[tuple[str, str]]:
    """Pairs of values that should be equal, in candidate and reference, in the candidate's order.

    A stored weight that comes out of a DequantizeLinear is not paired; its product is.
    """
    known = set(float_values(reference))
    for name in float_values(candidate):
        base = name
        while base not in known and base.endswith(STAND_INS):
            base = base.rpartition(".")[0]
        if base in known:
            yield name, base


def state_errors(found: Arrays, expected: Arrays, io: IoSpec) -> dict[str, float]:
    """Gauge-free relative L2 of present states that both sides have, by present name."""
    blocks = {s.block for s in io.states if s.present in found and s.present in expected}
    states = tuple(
        s
        for s in io.states
        if s.block in blocks and all(t.present in found for t in io.states if t.block == s.block)
    )
    ours, theirs = ({s.past: side[s.present] for s in states} for side in (found, expected))
    names = {s.past: s.present for s in states}
    return {names[past]: worst(x.relative_l2) for past, x in compare_states(ours, theirs, states).items()}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2; infinite if the candidate is not finite where the reference is."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return math.inf
    # Where both are infinite in the same way (a mask) they are equal.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[~same]).all():
        return math.inf
    b_finite = np.where(np.isfinite(b), b, 0.0)
    norm = float(np.linalg.norm(b_finite))
    distance = float(np.linalg.norm(np.where(same, 0.0, a - b)))
    return distance / norm if norm else (math.inf if distance else 0.0)


def worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def require_same_parts(candidate: Side, reference: Side) -> None:
    """Raise UsageError unless both graphs have the same blocks and states."""
    ours, theirs = ({s.past for s in side.io.states} for side in (candidate, reference))
    if candidate.blocks != reference.blocks or ours != theirs:
        raise UsageError(
            f"{candidate.folder} has {candidate.blocks} blocks and {len(ours)} states, "
            f"the model {reference.blocks} and {len(theirs)}",
            "give the checkpoint it was made from",
        )
