"""Bisection: find the first value of a run folder that differs from its reference. The order is:

1. The candidate against the same thing made again: the checkpoint exported by this version and, for a half or
   quantized candidate, quantized by the candidate's own recipe and ranges. Both run the same operators, so
   equal means equal bits, and a single wrong weight, scale, operand or attribute shows.
2. Where that finds nothing, the fault is in how the candidate is made. A half or quantized one is compared
   with FP32, block by block, at limits of its precision; an FP32 one with the PyTorch module in float64.

Each block is replayed from the reference's input and the reference's state after some positions, so that
errors of earlier blocks do not count. Inside the first block that differs all values are compared, in the
order they are computed, and the first one that differs is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...atomic import scratch_folder
from ...calibration.scales import Scales
from ...checks import pytorch
from ...errors import ExportError, UsageError, UserCodeError
from ...graph import files
from ...graph.files import load_graph
from ...inputs import Arrays, cut, has_positions
from ...lift import lift as cells
from ...lift.model import lift_model
from ...lift.precise import FLOAT64
from ...load.loaded import Loaded
from ...load.made_up import explained, random_inputs
from ...options import Context, ExportOptions
from ...quantize import quantize
from ...quantize.recipe import read_recipe
from ...runfolder import MODEL, RunFolder
from ...sessions import TorchSession
from ...specs import Json
from ...trace import export as trace
from ..limits import LIMITS, OWN_ERRORS
from ..own_error import roundings
from .replay import Runner, Side, error, pairs, require_same_parts, run_onnxruntime, state_errors
from .why import explain

WARM = 64  # positions after which states are taken
LENGTH = 32  # positions that are replayed
BATCH = 2
EXACT = 1e-6  # the same operators on the same values
# Limit for a block, or a value in it, from FP32 inputs: about four times the largest of two trained models.
NOISE = {"fp16": 3e-3, "bf16": 0.02, "int8": 0.2, "int8-wo": 0.04, "int4-wo": 0.3}
RAW_STATES = ("_C", "_n", "_m", "_c")  # in lower precision these cannot be compared one by one


@dataclass(frozen=True)
class BlockError:
    """Error of a block: relative L2 of its result or its states, whichever is worse; the head is the last."""

    block: int
    path: str
    error: float
    tensor: str


@dataclass(frozen=True)
class Place:
    """The first value of the candidate that differs from the reference.

    Attributes:
        block, path: index of the block, and its path in the module.
        node, op_type: the node that computes the value.
        tensor: name of the value; its `error` (relative L2) exceeds `limit`.
        why: what is wrong with the node, as far as the graphs show it.
    """

    block: int
    path: str
    node: str
    op_type: str
    tensor: str
    error: float
    limit: float
    why: str


@dataclass(frozen=True)
class Bisection:
    """Result of a bisection.

    Attributes:
        place: the first value that differs; None if no block by itself differs.
        against: name of the reference.
        blocks: error of each block by itself, as far as the search went.
        note: a remark about the comparison.
    """

    place: Place | None
    against: str
    blocks: tuple[BlockError, ...]
    note: str = ""

    def to_json(self) -> Json:
        place = asdict(self.place) if self.place is not None else {"block": None}
        blocks = [asdict(block) for block in self.blocks]
        about = {"against": self.against, "note": self.note, "sentence": self.sentence()}
        return {**place, **about, "blocks": blocks}

    def sentence(self) -> str:
        """The result as one sentence."""
        if self.place is None:
            return f"no block by itself differs from {self.against}{'; ' + self.note if self.note else ''}"
        p = self.place
        where = f"block {p.block} ({p.path}), {p.op_type} {p.node} gives {p.tensor}"
        far = f"{p.error:.1e} off, limit {p.limit:.0e}" + (f": {p.why}" if p.why else "")
        return f"first difference from {self.against}: {where}, {far}"


def bisect(
    run: RunFolder | Path,
    loaded: Loaded,
    context: Context = Context(),
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    runner: Runner = run_onnxruntime,
) -> Bisection:
    """Find the first block of a run folder, and the first value in it, that differs from the reference.

    Args:
        run: run folder of `export` or `quantize`.
        loaded: the checkpoint it was made from.
        context: shared settings; the seed is for made-up inputs.
        inputs: each (B, S, ...) with at least `WARM` + `LENGTH` positions; made up by default.
        runner: runs the candidate.

    Raises:
        UsageError: the folder was not made from this model.
        InputError, BuildError: it cannot be run.
    """
    run = RunFolder.of(run)
    with scratch_folder(run.path.parent / "bisect") as scratch:
        candidate = Side(run.path, run.io, context.threads, runner)
        search = _Search(run, loaded, candidate, inputs, context, scratch)
        try:
            return search.run()
        except UserCodeError as error:
            raise error if inputs is not None else explained(error, loaded, run.io) from error


class _Search:
    """The candidate, the inputs that both sides are replayed from, and where they are cut.

    Args:
        source: the candidate's run folder.
        loaded: the checkpoint it was made from.
        candidate: the same folder as a `Side`.
        inputs, context: as in `bisect`.
        scratch: folder for the files that are made again.
    """

    def __init__(
        self,
        source: RunFolder,
        loaded: Loaded,
        candidate: Side,
        inputs: Mapping[str, np.ndarray] | None,
        context: Context,
        scratch: Path,
    ) -> None:
        self.source, self.candidate, self.scratch = source, candidate, scratch
        self.loaded = loaded.stored_as(source.options.dtype)
        self.threads, self.progress = context.threads, context.progress
        io = candidate.io
        if [x.name for x in io.inputs] != list(loaded.inputs):
            raise UsageError(
                f"{source.path} was not made from this model", "give the checkpoint it was made from"
            )
        length = WARM + LENGTH if has_positions(io) else 1
        if loaded.context_length and not io.states:
            length = min(length, loaded.context_length)
        if inputs is None:
            inputs = random_inputs(loaded, io, BATCH, length, np.random.default_rng(context.seed))
        self.first = WARM if io.states and has_positions(io) else 0
        self.warm = cut(inputs, io, 0, self.first)
        self.inputs = cut(inputs, io, self.first, length)
        self.paths = [
            f"{path}.{index}"
            for path, blocks in cells.block_stacks(lift_model(loaded, values=False).module)
            for index in range(len(blocks))
        ]

    def run(self) -> Bisection:
        self.progress("exporting the checkpoint again")
        made = self.source.options
        options = ExportOptions(stateless=made.stateless, last_logits=made.last_logits, dtype=made.dtype)
        exported = trace.export(self.loaded, self.scratch / "fresh", options)
        fresh = Side(exported, RunFolder.open(exported).io, self.threads)
        require_same_parts(self.candidate, fresh)
        precision = made.precision
        if precision is None:
            return self._of_fp32(fresh)
        self.progress("quantizing it again")
        try:
            again = self._quantized_again(fresh.folder)
        except ExportError as failure:  # the recipe or the ranges themselves are broken
            return self._search(
                fresh, "FP32", NOISE[precision], f"it cannot be made again: {failure.message}"
            )
        found = self._search(again, "the same made again", EXACT)
        if found.place is not None:
            return found
        return self._search(fresh, "FP32", NOISE[precision], "the file is what recipe and ranges ask for")

    def _of_fp32(self, fresh: Side) -> Bisection:
        found = self._search(fresh, "the checkpoint exported again", EXACT)
        if found.place is not None or not self.candidate.blocks or len(self.paths) != self.candidate.blocks:
            return found
        self.progress("PyTorch")
        return self._against_pytorch()

    def _quantized_again(self, fresh: Path) -> Side:
        source = self.source.path
        scales = Scales.read(source) if (source / "scales.json").is_file() else None
        model = load_graph(fresh / MODEL)
        quantize.apply_recipe(model, read_recipe(source / quantize.RECIPE), scales)
        again = self.scratch / "again"
        again.mkdir()
        files.save(model, again)
        return Side(again, self.source.io, self.threads)

    def _search(self, reference: Side, against: str, limit: float, note: str = "") -> Bisection:
        """The first block beyond the limit, and the first value in it."""
        exact = limit == EXACT
        past = self._fresh(reference)
        if self.first:
            after = reference.whole({**self.warm, **past})
            past = {s.past: after[s.present] for s in reference.io.states}
        whole = reference.whole({**self.inputs, **past})
        errors: list[BlockError] = []
        for index in range(reference.blocks + 1 if reference.blocks else 1):
            self.progress(f"{self._name(index)}, against {against}")
            feed: Arrays = {**self.inputs, **past}
            if index:
                feed[f"hidden_{index - 1}"] = whole[f"hidden_{index - 1}"]
            # Both sides are cut at the same place: another cut may round differently, which changes integers.
            expected = reference.outputs(index, feed) if exact else whole
            found = self.candidate.outputs(index, self._as_candidate(feed))
            errors.append(self._block_error(index, found, expected, exact))
            if errors[-1].error > limit:
                place = self._first_value(index, feed, reference, limit, errors[-1])
                return Bisection(place, against, tuple(errors), note)
        return Bisection(None, against, tuple(errors), note)

    def _block_error(self, index: int, found: Arrays, expected: Arrays, exact: bool = False) -> BlockError:
        results = {
            name: error(x, expected[name])
            for name, x in found.items()
            if name in expected and (exact or not name.startswith("present_"))
        }
        if not exact:
            results |= state_errors(found, expected, self.candidate.io)
        tensor = max(results, key=lambda name: results[name])
        return BlockError(index, self._name(index), results[tensor], tensor)

    def _first_value(
        self, index: int, feed: Arrays, reference: Side, limit: float, block: BlockError
    ) -> Place:
        ours, theirs = self.candidate.part(index), reference.part(index)
        both = [
            (a, b)
            for a, b in pairs(ours, theirs)
            if limit == EXACT or not (a.startswith("present_") and a.endswith(RAW_STATES))
        ]
        found = self.candidate.values(index, self._as_candidate(feed), [a for a, _ in both])
        expected = reference.values(index, feed, sorted({b for _, b in both}))
        errors = {a: error(found[a], expected[b]) for a, b in both}
        beyond = [(a, b) for a, b in both if errors[a] > limit]
        # Small errors may add up to a large one: then the value with the largest error is named.
        name, base = beyond[0] if beyond else max(both, key=lambda pair: errors[pair[0]])
        producers = {v.name: node for node in ours.graph for v in node.outputs}
        originals = {v.name: node for node in theirs.graph for v in node.outputs}
        node = producers[name]
        stand_in = name != base and name not in originals
        why = explain(
            node,
            None if stand_in else originals[base],
            found[name],
            expected[base],
            lambda weight: self.candidate.values(index, self._as_candidate(feed), [weight])[weight],
            0.0 if limit == EXACT else limit,
        )
        if not beyond:
            why = ": ".join(
                ["no value by itself exceeds the limit, this is the largest", *([why] if why else [])]
            )
        return Place(index, block.path, node.name or "", node.op_type, name, errors[name], limit, why)

    def _against_pytorch(self) -> Bisection:
        """Compare the candidate's blocks with the PyTorch reference, from its inputs and states."""
        with TorchSession(self.loaded, BATCH, "float64") as session:
            if self.first:
                session.prefill(self.warm)
            past = {name: x.astype(np.float32) for name, x in session.state().items()}
            hidden, outputs = session.traced(self.paths, self.inputs)
            presents = {s.present: session.state()[s.past] for s in session.io.states}
            reference = session.reference
        expected = {**{f"hidden_{i}": x for i, x in enumerate(hidden)}, **outputs, **presents}
        limit = LIMITS["state"]
        if reference != FLOAT64:
            limit = max(limit, OWN_ERRORS * self._own_error(past, expected))
        errors: list[BlockError] = []
        place = None
        for index in range(self.candidate.blocks + 1):
            feed: Arrays = {**self.inputs, **past}
            if index:
                feed[f"hidden_{index - 1}"] = hidden[index - 1].astype(np.float32)
            found = self.candidate.outputs(index, feed)
            errors.append(self._block_error(index, found, expected))
            if errors[-1].error > limit:
                why = "the file is what this version exports: the fault is in how it exports this block"
                place = Place(
                    index,
                    self._name(index),
                    "",
                    "block",
                    errors[-1].tensor,
                    errors[-1].error,
                    limit,
                    why,
                )
                break
        return Bisection(place, pytorch(reference), tuple(errors))

    def _own_error(self, past: Arrays, expected: Arrays) -> float:
        """The largest error of PyTorch's own FP32 from the same states, of a block's result or a state."""
        errors = []
        with TorchSession(self.loaded, BATCH, "float32") as plain:
            for mode, most in roundings():
                plain.set_state(past)
                with mode:
                    hidden, outputs = plain.traced(self.paths, self.inputs)
                presents = {s.present: plain.state()[s.past] for s in plain.io.states}
                found = {**{f"hidden_{i}": x for i, x in enumerate(hidden)}, **outputs, **presents}
                errors.append(min(most, self._block_error(0, found, expected).error))
        return max(errors)

    def _fresh(self, side: Side) -> Arrays:
        return {s.past: np.zeros((BATCH, *s.shape), s.dtype) for s in side.io.states}

    def _as_candidate(self, feed: Arrays) -> Arrays:
        """The inputs with states in the type that the candidate stores them in."""
        types = {s.past: s.dtype for s in self.candidate.io.states}
        return {name: x.astype(types[name]) if name in types else x for name, x in feed.items()}

    def _name(self, index: int) -> str:
        if index < len(self.paths):
            return self.paths[index]
        return "head" if self.candidate.blocks else "the whole"
