"""From an FP32 run folder, a recipe and calibrated ranges to a run folder of another precision.

The result is a run folder like any other (`model.onnx`, `io.json`, `manifest.json`), by default a subfolder
of the one it was made from, named after the precision. The same inputs and options give the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from .. import atomic, runfolder
from ..calibration.scales import SCALES, Scales
from ..checks import Check
from ..errors import GateError, UsageError
from ..graph import files
from ..graph.element_types import typed_nodes
from ..graph.files import load_graph
from ..graph.sites import find_sites
from ..graph.stored_types import DTYPES, widen_weights
from ..load.remembered import key_of, remember
from ..ops import bodies as functions
from ..options import Context
from ..runfolder import RunFolder
from ..specs import OWN, IoSpec, Json
from .fences import Fences, require_fences
from .half import to_half
from .legality import require_legal
from .qdq import insert_qdq
from .recipe import Choice, Recipe
from .smooth import smooth

RECIPE = "recipe.yaml"
TINY = 1e-30  # used instead of a range of zero, for an activation that was always zero in calibration
# Returns the checks of a candidate's drift; takes the FP32 run folder, the candidate and its recipe.
Judge = Callable[[Path, Path, Recipe], Sequence[Check]]
NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Applied:
    """The result of `apply_recipe`.

    Attributes:
        choices: site name → the choice that was applied.
        smoothed: activations whose range was moved into weights.
        half_products: number of products that compute in half.
        fences: the proof that no value that feeds back is below FP32.
    """

    choices: dict[str, Choice]
    smoothed: tuple[str, ...]
    half_products: int
    fences: Fences


def quantize(
    run: RunFolder | Path,
    recipe: Recipe,
    context: Context = Context(),
    *,
    scales: Scales | None = None,
    out: Path | None = None,
    force: bool = False,
    judge: Judge | None = None,
) -> Path:
    """Write a run folder with the precision of `recipe`.

    Args:
        run: run folder of an FP32 (or `--dtype bf16|fp16`) export.
        recipe: the precision of every weight.
        context: the command in it is recorded in the manifest.
        scales: calibrated ranges; needed where the recipe quantizes activations.
        out: default: a subfolder of the run, named after the precision.
        force: replace an existing one, and write a narrow state that fails the drift gate (recorded).
        judge: compares a state that is stored in half with that of the FP32 run folder, see
            `verify.drift_gate.state_judge`; needed where the recipe has such a state.

    Returns:
        The new run folder.

    Raises:
        UsageError: the run is quantized already, or the recipe names sites that do not exist.
        InputError: the scales do not belong to this graph.
        BuildError: a fence or a rule of TensorRT is violated.
        GateError: the state drifts when it is stored in half, and `force` is not set.
    """
    run, progress = RunFolder.of(run), context.progress
    _require(run, recipe, judge)
    out = run.path / recipe.precision if out is None else Path(out)
    progress("reading the graph")
    base = {name: entry["sha256"] for name, entry in run.hashes().items()}
    model = load_graph(run.model)
    if scales is not None:
        scales.require_graph(run.files[runfolder.MODEL]["sha256"])
    progress("quantizing")
    applied = apply_recipe(model, recipe, scales)
    with atomic.staged(
        out, marker=runfolder.MANIFEST, force=force, bytes_needed=files.stored_bytes(model)
    ) as staging:
        files.save(model, staging, progress)
        kept = require_legal(staging / runfolder.MODEL, base=run.model)
        _write_beside(run, recipe, scales, staging)
        progress("hashing")
        entries = _entries(run, out, recipe, applied, context.command)
        entries["calibration"] = scales.data if scales is not None else None
        if kept:
            entries[runfolder.BROKEN] = kept
        runfolder.write_manifest(staging, entries)
        if judge is not None and recipe.state_dtype != "fp32":
            progress("drift of the state")
            entries["forced"] = _failed(judge(run.path, staging, recipe), recipe, force)
            runfolder.write_manifest(staging, entries)
        remember(key_of_quantized(base, staging), runfolder.read_manifest(staging)["files"])
    return out


def _write_beside(run: RunFolder, recipe: Recipe, scales: Scales | None, staging: Path) -> None:
    """What a quantized graph has beside it: its description, recipe, ranges, and files of the checkpoint."""
    atomic.write_json(staging / runfolder.IO, with_state_dtype(run.io, recipe).to_json())
    recipe.write(staging / RECIPE)
    if scales is not None:
        scales.write(staging)
    for companion in _companions(run):
        shutil.copyfile(companion, staging / companion.name)


def key_of_quantized(base: Mapping[str, str], folder: Path) -> str:
    """All that a quantized run folder depends on, as one hash; see `load.remembered`.

    Args:
        base: name → SHA-256 of the files of the FP32 export.
        folder: the quantized run folder, which has recipe and ranges.
    """
    own = {name: atomic.sha256(folder / name) for name in (RECIPE, SCALES) if (folder / name).is_file()}
    return key_of(dict(base), own)


def _failed(checks: Sequence[Check], recipe: Recipe, force: bool) -> list[str]:
    """The failed checks of the drift gate, as text; empty unless `force` is set.

    Raises:
        GateError: a check fails, and `force` is not set.
    """
    failed = [f"{c.name}: {c.value:.2e} exceeds {c.limit:.1e}" for c in checks if not c.passed]
    if failed and not force:
        raise GateError(
            f"with C stored in {recipe.state_dtype} the state drifts: {failed[0]}",
            "keep it in FP32, or use --force, which is recorded in the report",
        )
    return failed


def apply_recipe(model: ir.Model, recipe: Recipe, scales: Scales | None = None) -> Applied:
    """Turn an FP32 graph into one of another precision, in place, and prove its fences."""
    widen_weights(model)
    common.ShapeInferencePass()(model)
    _describe(model)
    choices = recipe.choices(find_sites(model))
    integers = [name for name, choice in choices.items() if choice == "int8"]
    if integers and scales is None:
        raise UsageError(
            f"{len(integers)} activations are to be quantized, but there are no ranges for them",
            "run `xlstm-export calibrate` first, or choose a weight-only precision",
        )
    amax = {} if scales is None else scales.all_amax()
    smoothed: dict[str, Any] = {}
    if recipe.smooth is not None and integers and scales is not None:
        smoothed = smooth(model, integers, scales.all_channels(), recipe.smooth)
        for name, channels in smoothed.items():
            original = name.removesuffix(".smoothed")
            # The calibration method clips the same fraction of the new largest value.
            clipped = amax[original] / max(float(scales.channels(original).max()), TINY)
            amax[name] = float(channels.max()) * min(clipped, 1.0)
    insert_qdq(model, recipe, amax)
    half_products = to_half(model, recipe.base) if recipe.base != "fp32" else 0
    state_dtype = DTYPES[recipe.state_dtype]
    _store_state(model, state_dtype)
    _finish(model, cast=recipe.base != "fp32" or recipe.state_dtype != "fp32")
    fences = require_fences(model, state_dtype)
    return Applied(choices, tuple(smoothed), half_products, fences)


def _require(run: RunFolder, recipe: Recipe, judge: Judge | None) -> None:
    """Raise UsageError for what cannot be quantized, or not be judged."""
    if recipe.state_dtype != "fp32" and judge is None:
        raise UsageError(
            f"a state in {recipe.state_dtype} must pass the drift gate, which needs data", "give --data"
        )
    if recipe.state_dtype != "fp32" and run.options.recurrence != OWN:
        raise UsageError(
            f"LinearAttention keeps C and n in one state, so C cannot be {recipe.state_dtype}",
            f"leave out the type of the state, or export with --recurrence {OWN}",
        )
    if (precision := run.options.precision) is not None:
        raise UsageError(f"{run.path} is {precision} already", "quantize the FP32 export it was made from")


def _describe(model: ir.Model) -> None:
    """Set the types of values that shape inference could not determine."""
    for value, dtype in typed_nodes(model)[1].items():
        if value.type is None:
            value.type = ir.TensorType(dtype)


def _store_state(model: ir.Model, dtype: ir.DataType) -> None:
    """Store the matrix memory C as `dtype` at inputs and outputs; the recurrence itself computes in FP32."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name.startswith(("past_", "present_")) and name.endswith("_C"):
            value.type = ir.TensorType(dtype)


def _finish(model: ir.Model, *, cast: bool) -> None:
    """Attach bodies of the right types and opset, sort and name the nodes, and remove inner types."""
    functions.attach(model, cast=cast)
    for graph_pass in (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    ):
        graph_pass(model)
    files.name_nodes(model)


def with_state_dtype(io: IoSpec, recipe: Recipe) -> IoSpec:
    """The description of a graph whose matrix memories are stored as the recipe says."""
    dtype = NUMPY[recipe.state_dtype]
    states = tuple(replace(s, dtype=dtype) if s.kind == "C" else s for s in io.states)
    return replace(io, states=states)


def _companions(run: RunFolder) -> list[Path]:
    """The files that `export` copied from the checkpoint, such as those of a tokenizer."""
    own = {runfolder.MODEL, runfolder.MODEL_DATA, runfolder.IO, runfolder.MANIFEST}
    return [run.path / name for name in run.files if name not in own and "/" not in name]


def _entries(run: RunFolder, out: Path, recipe: Recipe, applied: Applied, command: str) -> Json:
    kinds = list(applied.choices.values())
    return {
        "command": command,
        **{key: run.manifest.get(key) for key in ("model", "origin", "checkpoint_sha256")},
        "origin_absolute": run.manifest.get("origin_absolute", {}),
        "context_length": run.context_length,
        **{name: run.manifest[name] for name in ("vocab_size",) if name in run.manifest},
        "options": {
            **run.recorded_options,
            "precision": recipe.precision,
            "base": recipe.base,
            "state_dtype": recipe.state_dtype,
        },
        "quantized_from": {
            "folder": os.path.relpath(run.path, out),
            "sha256": run.files[runfolder.MODEL_DATA]["sha256"],
            "graph_sha256": run.files[runfolder.MODEL]["sha256"],
        },
        "max_drop": recipe.max_drop,
        "sites": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "fences": {"proven": applied.fences.proven, "integer_gates": list(applied.fences.integer_gates)},
    }
