"""Proof of identity: what a run folder holds is, bit by bit, what its checkpoint gives when it is made again.

It covers what checks of behaviour cannot: a weight that no input of theirs reaches, a fault at other lengths
or batches, a tokenizer of another model. What it cannot find is a fault in how exports are made; behaviour
finds that.
"""

from __future__ import annotations

import filecmp
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..calibration.scales import SCALES, Scales
from ..checks import Check, Verdict
from ..errors import ExportError, InputError
from ..graph import files
from ..graph.compare import Comparison, compare_graphs
from ..load.loaded import Loaded
from ..load.remembered import key_of_model, recall
from ..options import Context, ExportOptions
from ..quantize import quantize
from ..quantize.recipe import read_recipe
from ..runfolder import MODEL, MODEL_DATA, RunFolder, versions
from ..specs import Json
from ..trace import export as trace
from .verdict import require_verified

State = Literal["proved", "weights", "differs", "not proved"]
# Packages that decide what a graph looks like; with others, the same model may be written in another way.
MAKERS = ("xlstm-export", "torch", "onnx", "onnx-ir", "onnxscript", "xlstm")
DIFFERENCES = "identity: differences"  # name of the check
SHOWN = 20  # most differences that are named


@dataclass(frozen=True)
class Identity:
    """Result of the proof.

    Attributes:
        state: "proved"; "weights" if the graph around them was written by other versions and is not judged;
            "differs"; "not proved" if nothing could be made to compare with.
        against: what the run folder was compared with.
        note: why not everything is proved.
        differences: all that differs, named.
        counts: how many weights, nodes, states and files were compared.
    """

    state: State
    against: str
    note: str = ""
    differences: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> Json:
        shown = self.differences[:SHOWN]
        rest = len(self.differences) - len(shown)
        return {
            "state": self.state,
            "against": self.against,
            "note": self.note,
            "differences": [*shown, *([f"and {rest} more"] if rest else [])],
            "compared": dict(self.counts),
            "sentence": self.sentence(),
        }

    def sentence(self) -> str:
        """The result as one sentence."""
        what = ", ".join(f"{count:,} {name}" for name, count in self.counts.items() if count)
        why = f" ({self.note})" if self.note else ""
        return {
            "proved": f"identity proved: {what} equal {self.against}, bit by bit",
            "weights": f"identity proved for the weights only{why}: {what}; compared with {self.against}",
            "differs": f"identity: {'; '.join(self.differences[:1])}; compared with {self.against}",
            "not proved": f"identity not proved: {self.note}",
        }[self.state]

    def judged(self, verdict: Verdict) -> Verdict:
        """The verdict with this proof; a difference fails it, whatever limits a gate file has."""
        checks = verdict.checks
        if self.state != "not proved":
            detail = {"differences": list(self.differences[:SHOWN])} if self.differences else {}
            checks = (*checks, Check(DIFFERENCES, float(len(self.differences)), 0.0, detail))
        return replace(verdict, checks=checks, identity=self.to_json())


def prove(run: RunFolder, loaded: Loaded, context: Context = Context(), key: str | None = None) -> Identity:
    """Compare a run folder with its manifest, and with the same made again from its checkpoint.

    Args:
        run: run folder.
        loaded: the checkpoint it was exported from.
        context: progress.
        key: of an export of this checkpoint, see `key_of`; if this machine remembers what that wrote, and the
            files are the same, nothing is made again.
    """
    context.progress("identity")
    changed = _changed(run)
    counts = {"files": len(run.files)}
    if not changed and _remembered(run, key):
        counts["states"] = len(run.io.states)
        return Identity("proved", "what this machine made of the same checkpoint before", "", (), counts)
    context.progress("identity: making the graph again")
    try:
        found, against, side = _made_again(run, loaded, context)
    except ExportError as error:
        note = f"the graph cannot be made again: {error.message}"
        if changed:
            return Identity("differs", "the manifest", note, tuple(changed), counts)
        return Identity("not proved", "", note, (), counts)
    counts = {"weights": found.weights, "nodes": found.nodes, "states": len(run.io.states), **counts}
    others = _other_versions(run)
    certain = [x.text for x in found.mismatches if x.kind == "weight" or not others]
    # The graph says where, so it comes before the file that holds it.
    differences = (*certain, *side, *changed)
    if differences:
        return Identity("differs", against, others, differences, counts)
    return Identity("weights" if found.mismatches else "proved", against, others, (), counts)


def key_of(run: RunFolder, loaded: Loaded) -> str | None:
    """The key of an export of `loaded` with the options of `run`.

    To be asked for before anything calls the module, which may keep what it computes.
    """
    return key_of_model(loaded, _export_options(run))


def _export_options(run: RunFolder) -> ExportOptions:
    made = run.options
    return ExportOptions.like(made)


def _remembered(run: RunFolder, key: str | None) -> bool:
    """Whether all files are what this machine recorded when it made the same."""
    made = recall(key)
    if made is not None and run.options.precision is not None:
        if (run.path / SCALES).is_file() and _ranges(run, Scales.read(run.path)):
            return False
        made = recall(quantize.key_of_quantized(made, run.path))
    now = {name: entry["sha256"] for name, entry in run.hashes().items()}
    return made is not None and now == made


def _changed(run: RunFolder) -> list[str]:
    """The files that are not as the manifest records them."""
    now = run.hashes()
    return [
        f"{name} has other bytes than the manifest records"
        for name, entry in run.files.items()
        if now[name]["sha256"] != entry["sha256"]
    ]


def _made_again(run: RunFolder, loaded: Loaded, context: Context) -> tuple[Comparison, str, list[str]]:
    """The comparison with the same graph made again, its name, and differences of the other files."""
    options = _export_options(run)
    if run.options.precision is None:
        model, spec = trace.trace(loaded, options)
        side = [*_described_differences(run, spec.to_json()), *_companions(run, loaded)]
        return (
            compare_graphs(files.load_graph(run.model), model),
            "the checkpoint exported again",
            side,
        )
    with tempfile.TemporaryDirectory(prefix="xlstm-identity.") as scratch:
        base, name = _base(run), "the FP32 export, which is proved, quantized again"
        if base is None:
            context.progress("identity: exporting again")
            base = RunFolder.open(trace.export(loaded, Path(scratch) / "fresh", options))
            name = "the checkpoint exported and quantized again"
        recipe = read_recipe(run.path / quantize.RECIPE)
        scales = Scales.read(run.path) if (run.path / SCALES).is_file() else None
        model = files.load_graph(base.model)
        quantize.apply_recipe(model, recipe, scales)
        side = [
            *([] if scales is None else _ranges(run, scales)),
            *_described_differences(run, quantize.with_state_dtype(base.io, recipe).to_json()),
            *_companions(run, loaded),
        ]
        return compare_graphs(files.load_graph(run.model), model), name, side


def _base(run: RunFolder) -> RunFolder | None:
    """The FP32 export that `run` was quantized from, if its own identity is proved and it is unchanged."""
    origin = run.manifest.get("quantized_from", {})
    try:
        base = RunFolder.open(run.path / str(origin.get("folder", "")))
        require_verified(base)
        verdict = json.loads(base.verdict.read_text(encoding="utf-8"))
        proved = (verdict.get("identity") or {}).get("state") == "proved"
    except (ExportError, OSError, ValueError, AttributeError):
        return None
    recorded = [origin.get("sha256"), origin.get("graph_sha256")]
    same = [base.files.get(name, {}).get("sha256") for name in (MODEL_DATA, MODEL)] == recorded
    return base if proved and same else None


def _ranges(run: RunFolder, scales: Scales) -> list[str]:
    """Ranges that are not those of the calibration that the run folder records."""
    origin = run.manifest.get("quantized_from", {})
    differences = []
    if scales.data != run.manifest.get("calibration"):
        differences.append(f"{SCALES} comes from other data than the manifest records")
    try:
        scales.require_graph(str(origin.get("graph_sha256", "")))
        first = Scales.read(run.path / str(origin.get("folder", "")))
    except InputError as error:
        # The FP32 export may have been moved away; ranges of another graph may not be used.
        return differences + ([error.message] if "another graph" in error.message else [])
    now, then = scales.to_json(), first.to_json()
    made = [key for key in now if key not in ("tensors", "channels_sha256")]
    if all(now[key] == then[key] for key in made):  # else the FP32 export has been calibrated anew
        differences += [
            f"{SCALES}: the range of {name} is not that of the FP32 export"
            for name in now["tensors"]
            if now["tensors"][name] != then["tensors"].get(name)
        ]
    return differences


def _described_differences(run: RunFolder, expected: Json) -> list[str]:
    """Differences of io.json from what it should say, by entry."""
    found = run.io.to_json()
    return [
        f"io.json: {key} are {found.get(key)}, should be {expected.get(key)}"
        for key in sorted({*found, *expected})
        if json.dumps(found.get(key), sort_keys=True) != json.dumps(expected.get(key), sort_keys=True)
    ]


def _companions(run: RunFolder, loaded: Loaded) -> list[str]:
    """Files beside the graph, such as a tokenizer, that are not those of the checkpoint."""
    differences = []
    for companion in loaded.companions:
        own = run.path / companion.name
        if not own.is_file():
            differences.append(f"{companion.name} of the checkpoint is missing")
        elif not filecmp.cmp(own, companion, shallow=False):
            differences.append(f"{companion.name} is not that of the checkpoint")
    return differences


def _other_versions(run: RunFolder) -> str:
    """The packages whose version is another one than at the export; empty if none."""
    then, now = run.manifest.get("versions") or {}, versions()
    other = [f"{x} {then.get(x)}, here {now.get(x)}" for x in MAKERS if then.get(x) != now.get(x)]
    return f"made by {'; '.join(other)}" if other else ""
