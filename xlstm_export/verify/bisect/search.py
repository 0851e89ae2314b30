"""Bisection: find the first value of a run folder that differs from its reference. The order is:

1. The candidate against the same thing made again: the checkpoint exported by this version and, for a half or
   quantized candidate, quantized by the candidate's own recipe and ranges. Both run the same operators, so
   equal means equal bits, and a single wrong weight, scale, operand or attribute shows.
2. Where that finds nothing, the fault is in how the candidate is made. A half or quantized one is compared
   with FP32, block by block, at limits of its precision. For an FP32 one, the lifted module is compared with
   the user's own, which shows a wrong adapter, and the export with the lifted module in float64.
3. What differs in the file and in no value of the calls that were replayed is named from the file. A check
   that fails although nothing by itself is wrong is named as that.

What is replayed are the calls of the checks that failed, with their own inputs; without any, made-up ones.
Each block is replayed from the reference's input and states, so that errors of earlier blocks do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...atomic import scratch_folder
from ...calibration.scales import Scales
from ...checks import Check, Replay
from ...errors import ExportError, UsageError, UserCodeError
from ...graph import files
from ...graph.compare import Mismatch, compare_graphs
from ...graph.files import load_graph
from ...inputs import cut, has_positions
from ...lift import lift as cells
from ...lift.model import lift_model
from ...load.loaded import Loaded
from ...load.made_up import explained, random_inputs
from ...options import Context, ExportOptions
from ...quantize import quantize
from ...quantize.recipe import read_recipe
from ...runfolder import MODEL, RunFolder
from ...specs import IoSpec
from ...trace import export as trace
from ...trace.capture import MODULE
from ..coverage import BORDERS
from ..limits import LIMITS
from .graphs import EXACT, GraphSearch, Names
from .modules import ModuleSearch
from .place import Bisection, Place, of_check
from .replay import Runner, Side, open_fused, open_onnxruntime, require_same_parts

WARM = 64  # positions after which states are taken
LENGTH = 32  # positions that are replayed
BATCH = 2
IN_PYTORCH = 4096  # most positions of a call that PyTorch replays
# Limit for a block, or a value in it, from FP32 inputs: about four times the largest of two trained models.
NOISE = {"fp16": 3e-3, "bf16": 0.02, "int8": 0.2, "int8-wo": 0.04, "int4-wo": 0.3}


def bisect(
    run: RunFolder | Path,
    loaded: Loaded,
    context: Context = Context(),
    *,
    failed: Sequence[Check] = (),
    runner: Runner = open_onnxruntime,
) -> Bisection:
    """Find the first block of a run folder, and the first value in it, that differs from the reference.

    Args:
        run: run folder of `export` or `quantize`.
        loaded: the checkpoint it was made from.
        context: shared settings; the seed is for made-up inputs.
        failed: checks of it that failed. Their calls are replayed, the shortest first, and the result always
            has a place. Without them, calls are made up.
        runner: runs the candidate.

    Raises:
        UsageError: the folder was not made from this model.
        InputError, BuildError: it cannot be run.
    """
    run = RunFolder.of(run)
    with scratch_folder(run.path.parent / "bisect") as scratch:
        search = _Search(run, loaded, failed, runner, context, scratch)
        try:
            return search.run()
        except UserCodeError as error:
            raise error if failed else explained(error, loaded, run.io) from error


class _Search:
    """The candidate, and what it is compared with; arguments as of `bisect`.

    Args:
        scratch: folder for the files that are made again.
    """

    def __init__(
        self,
        source: RunFolder,
        loaded: Loaded,
        failed: Sequence[Check],
        runner: Runner,
        context: Context,
        scratch: Path,
    ) -> None:
        self.source, self.scratch, self.context, self.failed = source, scratch, context, failed
        self.candidate = Side(source.path, source.io, context.threads, runner)
        self.loaded = loaded.in_form(source.options.stateless).stored_as(source.options.dtype)
        if [x.name for x in source.io.inputs] != list(loaded.inputs):
            raise UsageError(
                f"{source.path} was not made from this model", "give the checkpoint it was made from"
            )

    def run(self) -> Bisection:
        fresh = self._exported_again()
        require_same_parts(self.candidate, fresh)
        precision = self.source.options.precision
        if precision is None:
            return self._of_fp32(fresh)
        self.context.progress("quantizing it again")
        try:
            again = self._quantized_again(fresh.folder)
        except ExportError as failure:  # the recipe or the ranges themselves are broken
            note = f"it cannot be made again: {failure.message}"
            return self._named(self._against(fresh, "FP32", NOISE[precision], note), None)
        found, wrong = self._made_again(again, "the same made again")
        if found is not None:
            return found
        note = "" if wrong else "the file is what recipe and ranges ask for"
        return self._named(self._against(fresh, "FP32", NOISE[precision], note), wrong)

    def _of_fp32(self, fresh: Side) -> Bisection:
        found, wrong = self._made_again(fresh, "the checkpoint exported again")
        if found is not None:
            return found
        last_only = self.source.last_only
        modules = ModuleSearch(self.loaded, self.candidate, self.names, last_only, self.context.progress)
        replays = [one for one in self.replays if sum(one.pieces) <= IN_PYTORCH] or self.replays[:1]
        for replay in replays:
            upstream = modules.upstream(replay)
            if upstream is not None:
                return upstream
        for replay in replays:
            found = modules.exported(replay)
            if found.place is not None:
                return found
        assert found is not None, "there is at least one call"
        return self._named(found, wrong)

    def _made_again(self, again: Side, against: str) -> tuple[Bisection | None, Place | None]:
        """The first value that differs from the same made again; else what differs in the file."""
        mismatches = compare_graphs(self.candidate.graph(), again.graph()).mismatches
        if not mismatches and self.candidate.open is open_onnxruntime:
            return None, None  # the same file gives the same values
        found = self._against(again, against, EXACT)
        if found.place is not None:
            return found, None
        certain = [x for x in mismatches if self.failed or x.kind == "weight"]
        return None, self._of_mismatch(certain[0], again) if certain else None

    def _against(self, reference: Side, against: str, limit: float, note: str = "") -> Bisection:
        """The first value beyond the limit, in the first call that has one."""
        found: Bisection | None = None
        search = GraphSearch(self.candidate, reference, self.names, against, limit, self.context.progress)
        for replay in [*self.replays, *(self.borders if limit == EXACT else ())]:
            found = search.search(replay, note)
            if found.place is not None:
                return found
        assert found is not None, "there is at least one call"
        return found

    def _named(self, found: Bisection, wrong: Place | None) -> Bisection:
        """The result, with what differs in the file, or with a check that has failed."""
        if found.place is not None:
            return found
        if wrong is not None:
            return replace(found, place=wrong, against="the same made again", note="")
        if not self.failed:
            return found
        kernels = self._of_kernels()
        if kernels is not None:
            return kernels
        check = next((check for check in self.failed if check.replay is not None), self.failed[0])
        near = max(found.blocks, key=lambda one: one.error, default=None)
        return replace(found, place=of_check(check, near), failed=check.name)

    def _of_kernels(self) -> Bisection | None:
        """The first value that the fused kernels compute wrongly, where a check of them has failed."""
        fused = [one.replay for one in self.failed if one.replay and one.name.startswith("fused ")]
        if not fused or self.source.options.precision is not None:
            return None
        with_kernels = Side(self.source.path, self.source.io, self.context.threads, open_fused)
        bodies = Side(self.source.path, self.source.io, self.context.threads)
        against = "the graph without fused kernels"
        search = GraphSearch(
            with_kernels, bodies, self.names, against, LIMITS["state"], self.context.progress
        )
        found = search.search(fused[0], "the file is right, the compiled kernels are not")
        return found if found.place is not None else None

    def _of_mismatch(self, mismatch: Mismatch, again: Side) -> Place:
        """What differs in the file, where no value of a replayed call shows it."""
        model = again.graph()
        weight = model.graph.initializers.get(mismatch.name)
        node = next((n for n in model.graph if n.name and n.name == mismatch.name.split(" ")[-1]), None)
        if weight is not None and weight.uses():
            node = _reader(weight)
        outputs = {value.name: value.producer() for value in model.graph.outputs}
        node = node or outputs.get(mismatch.name.split(" ")[-1])
        why = f"{mismatch.text}; no value of the calls that were replayed shows it"
        if node is None:
            return Place(0, "the whole", "", "graph", mismatch.name, 0.0, 0.0, why)
        parts = range(again.blocks + 1 if again.blocks else 1)
        home = next((i for i in parts if any(n.name == node.name for n in again.part(i).graph)), 0)
        path, value = self.names.block(home, again.blocks), node.outputs[0].name or ""
        place = Place(home, path, node.name or "", node.op_type, value, 0.0, 0.0, why)
        return self.names.place(place, value)

    # --- What both sides run ------------------------------------------------------------------------------

    @cached_property
    def replays(self) -> list[Replay]:
        """The calls to replay, the shortest first."""
        failed = {id(check.replay): check.replay for check in self.failed if check.replay is not None}
        if failed:
            return sorted(failed.values(), key=lambda replay: (len(replay.pieces), sum(replay.pieces)))
        return [self._made_up(BATCH, WARM, LENGTH)]

    @cached_property
    def borders(self) -> list[Replay]:
        """More made-up calls, where no check says which one is wrong: of other lengths and rows."""
        if self.failed or not has_positions(self.source.io) or self.candidate.open is not open_onnxruntime:
            return []
        return [self._made_up(row + 1, length) for row, length in enumerate(BORDERS)]

    def _made_up(self, rows: int, *pieces: int) -> Replay:
        io = self.source.io
        rng = np.random.default_rng(self.context.seed)
        if not has_positions(io):
            pieces = (1,)
        elif not io.states:
            pieces = (min(sum(pieces), self.loaded.context_length or sum(pieces)),)
        inputs = random_inputs(self.loaded, io, rows, sum(pieces), rng)
        return Replay(inputs, pieces, lambda arrays, start, end: cut(arrays, io, start, end))

    # --- The same made again ------------------------------------------------------------------------------

    @cached_property
    def names(self) -> Names:
        blocks = [
            f"{path}.{index}"
            for path, stack in cells.block_stacks(lift_model(self.loaded, values=False).module)
            for index in range(len(stack))
        ]
        return Names(blocks, self._modules)

    def _exported_again(self) -> Side:
        self.context.progress("exporting the checkpoint again")
        made = self.source.options
        options = ExportOptions.like(made)
        model, io = trace.trace(self.loaded, options)
        self._modules = {
            value.name or "": str(node.meta.get(MODULE, "")) for node in model.graph for value in node.outputs
        }
        return self._saved(model, "fresh", io)

    def _quantized_again(self, fresh: Path) -> Side:
        source = self.source.path
        scales = Scales.read(source) if (source / "scales.json").is_file() else None
        model = load_graph(fresh / MODEL)
        quantize.apply_recipe(model, read_recipe(source / quantize.RECIPE), scales)
        return self._saved(model, "again", self.source.io)

    def _saved(self, model: ir.Model, name: str, io: IoSpec) -> Side:
        folder = self.scratch / name
        folder.mkdir()
        files.save(model, folder)
        return Side(folder, io, self.context.threads)


def _reader(weight: ir.Value) -> ir.Node:
    """The node that computes with a weight, behind its DequantizeLinear."""
    node = next(iter(weight.uses())).node
    while node.op_type == "DequantizeLinear" and node.outputs[0].uses():
        node = next(iter(node.outputs[0].uses())).node
    return node
