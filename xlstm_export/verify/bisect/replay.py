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
from ...sessions.arrays import numpy_type
from ...sessions.cpu.fused import drop_bodies, library
from ...sessions.cpu.observed_graph import add_outputs, open_graph
from ...sessions.cpu.round_half import HALF
from ...sessions.cpu_graph import OrtObject
from ...specs import IoSpec

FLOATS = frozenset((ir.DataType.FLOAT, *HALF))
# Name suffixes of values that quantization adds; each corresponds to a value of the FP32 graph.
STAND_INS = (".dequantized", ".half", ".float")

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], Arrays]  # one call of a graph: its outputs by name
# Opens a graph with the weights of a folder, on so many threads.
Runner = Callable[[ir.Model, Path, int], Run]


def open_onnxruntime(model: ir.Model, folder: Path, threads: int) -> Run:
    """Open a graph in ONNX Runtime on the CPU; half is rounded, integers are exact, as in `OrtSession`.

    Raises:
        BuildError: the runtime failed.
        InputError: the runtime cannot load the graph.
    """
    return _opened(open_graph(model, folder, threads))


def open_fused(model: ir.Model, folder: Path, threads: int) -> Run:
    """The same with the fused kernels, which have to be built, in place of the function bodies."""
    drop_bodies(model)
    return _opened(open_graph(model, folder, threads, library()))


def _opened(session: OrtObject) -> Run:
    names = [x.name for x in session.get_outputs()]
    wanted = {x.name for x in session.get_inputs()}

    def run(feed: Feed) -> Arrays:
        given = {k: np.asarray(x, order="C") for k, x in feed.items() if k in wanted}
        try:
            return dict(zip(names, session.run(names, given), strict=True))
        except Exception as error:  # the runtime's own exception types derive from nothing else
            raise BuildError(f"ONNX Runtime stopped: {error}", "is the file from this version?") from error

    return run


@dataclass
class Side:
    """One of the two graphs.

    Attributes:
        folder: folder of its graph and weights.
        io: its inputs, outputs and states.
        threads: CPU threads of the runner.
        open: the runner.
        blocks: number of blocks of the stack; 0 if there is no stack: the model is then one block.
        homes: the block that computes each output, by name. A candidate has those of its reference, because a
            wrong graph may compute an output elsewhere.
    """

    folder: Path
    io: IoSpec
    threads: int = 0
    open: Runner = open_onnxruntime
    blocks: int = field(init=False)
    homes: dict[str, int] = field(init=False)
    _opened: dict[int | None, Run] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.blocks = len(graph_cut.boundaries(self.graph()))
        found = graph_cut.homes(self.graph())
        # A state that is wired through depends on no block: it belongs to the others of its cell.
        cells: dict[int, int] = {}
        for s in self.io.states:
            cells[s.block] = max(cells.get(s.block, 0), found.get(s.present, 0))
        self.homes = found | {s.present: cells[s.block] for s in self.io.states if s.present in found}

    def graph(self) -> ir.Model:
        return files.load_graph(self.folder / MODEL)

    def part(self, index: int | None) -> ir.Model:
        """Block `index` as a graph of its own, the head last; the whole graph for None or without a stack."""
        if index is None or not self.blocks:
            return self.graph()
        return graph_cut.segment(self.graph(), index, {n for n, home in self.homes.items() if home == index})

    def expected(self, index: int) -> list[str]:
        """Names of the values that block `index` has to give."""
        names = [name for name, home in self.homes.items() if home == index]
        return [f"{graph_cut.PREFIX}{index}", *names] if index < self.blocks else names

    def whole(self, feed: Feed) -> Arrays:
        """Outputs, present states and block results of one call."""
        if None not in self._opened:
            model = self.graph()
            given_as = add_outputs(model, [value.name or "" for value in graph_cut.boundaries(model)])
            run = self.open(model, self.folder, self.threads)

            def renamed(feed: Feed) -> Arrays:
                found = run(feed)
                return {**found, **{name: found[given] for name, given in given_as.items()}}

            self._opened[None] = renamed
        return self._opened[None](feed)

    def outputs(self, index: int, feed: Feed) -> Arrays:
        """Outputs of a block."""
        if index not in self._opened:
            self._opened[index] = self.open(self.part(index), self.folder, self.threads)
        return self._opened[index](feed)

    def values(self, index: int | None, feed: Feed, names: Sequence[str]) -> Arrays:
        """The named inner values of a block, in FP32.

        One is missing where the runtime makes one of two that are equal, such as an output in half and the
        same as FP32.
        """
        model = self.part(index)
        given_as = add_outputs(model, names)
        found = self.open(model, self.folder, self.threads)(feed)
        return {name: found[given_as[name]] for name in names if given_as[name] in found}

    def fresh(self, rows: int) -> Arrays:
        """The states at the start of a stream."""
        return {s.past: np.zeros((rows, *s.shape), numpy_type(s.dtype)) for s in self.io.states}

    def own_types(self, feed: Feed) -> Arrays:
        """A feed with states in the types that this side stores them in."""
        types = {s.past: numpy_type(s.dtype) for s in self.io.states}
        return {name: x.astype(types[name]) if name in types else x for name, x in feed.items()}


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


def block_errors(found: Arrays, wanted: Arrays, io: IoSpec, *, raw: bool) -> dict[str, float]:
    """Relative L2 of all that a block has to give, by name; infinite where it is missing.

    Args:
        found: what it gives.
        wanted: what it has to give; states as present states.
        io: the states.
        raw: compare states as they are stored; else independently of their stabilizers.
    """
    missing = {name: math.inf for name in wanted if name not in found}
    states = tuple(s for s in io.states if s.present in wanted)
    whole = {s.block for s in states if s.present in missing}
    compared = tuple(s for s in states if s.block not in whole)
    names = [name for name in wanted if raw or name not in {s.present for s in compared}]
    results = missing | {name: error(found[name], wanted[name]) for name in names if name not in missing}
    if raw or not compared:
        return results
    ours, theirs = ({s.past: side[s.present] for s in compared} for side in (found, wanted))
    presents = {s.past: s.present for s in compared}
    far = compare_states(ours, theirs, compared)
    return results | {presents[past]: worst(x.relative_l2) for past, x in far.items()}


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
