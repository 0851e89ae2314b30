"""How often the gate is wrong: good models that fail, and planted faults that pass.

    python benchmarks/gate_study.py good --out good.jsonl [--each 5] [--every 2 --start 0]
    python benchmarks/gate_study.py faults --out faults.jsonl [--each 1] [--every 5]
    python benchmarks/gate_study.py rates good.jsonl faults.jsonl --out benchmarks/results/gate.json

Each line of the first two is one verification, so that a run that was stopped is of use. One process, one
thread. What is verified is behaviour alone: the proof of identity finds every fault that changes bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import good_models
import mutations
import numpy as np
import onnx
import onnx_ir as ir
import torch
from xlstm_export.calibration import observers, sets

from xlstm_export.checks import Verdict
from xlstm_export.distance import difference
from xlstm_export.errors import ExportError
from xlstm_export.graph.compare import compare_graphs
from xlstm_export.graph.files import load_graph
from xlstm_export.inputs import Arrays, cut, rows_of
from xlstm_export.load.loaded import Loaded
from xlstm_export.load.made_up import random_inputs
from xlstm_export.options import Context, ExportOptions, VerifyOptions
from xlstm_export.quantize.quantize import apply_recipe, quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.runfolder import MODEL, RunFolder
from xlstm_export.sessions.cpu.observed_graph import open_graph
from xlstm_export.trace import export as trace
from xlstm_export.verify.fp32 import verify
from xlstm_export.verify.precision import verify_precision

LOWER = ("fp16", "int8", "bf16", "int8-wo", "int4-wo")
SHORT = VerifyOptions(horizon=1200, free_horizon=100)
SHORTER = VerifyOptions(horizon=300, free_horizon=30)  # of faults: it can only find fewer


def good(options: argparse.Namespace) -> None:
    """Verify good models in every precision, on calibration data."""
    with options.out.open("a") as out, tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(good_models.zoo(options.seed)):
            if number >= options.models:
                break
            if number % options.every != options.start or number < options.first:
                continue
            folder = Path(scratch) / str(number)
            for row in verified(model, folder, options.seed, number, options.each):
                print(
                    row["model"],
                    row["precision"],
                    row["passed"],
                    row["failed"][:2],
                    f"{row['seconds']:.1f} s",
                )
                out.write(json.dumps(row) + "\n")
                out.flush()


def verified(
    model: good_models.Good, folder: Path, seed: int, number: int, each: int
) -> Iterator[dict[str, Any]]:
    """One row per precision: FP32, and `each` others in turn."""
    start = time.perf_counter()
    loaded = model.load(folder / "model")
    run = trace.export(loaded, folder / "run")
    print(f"  {time.perf_counter() - start:.1f} s to export")
    context = Context(threads=1, seed=seed)
    io = RunFolder.open(run).io
    data = sets.random_set(loaded, io)
    yield row(model.name, "fp32", lambda: verify(run, loaded, context=context, calibration=data.inputs))
    scales = observers.calibrate(run, data)
    for precision in (LOWER[(each * number + i) % len(LOWER)] for i in range(each)):
        yield row(model.name, precision, lambda p=precision: lower(run, loaded, p, scales, data, context))


def lower(run: Path, loaded: Loaded, precision: str, scales: Any, data: Any, context: Context) -> Verdict:
    made = quantize(run, preset(precision), scales=scales)
    return verify_precision(made, loaded, SHORT, context, calibration=data.inputs)


def row(model: str, precision: str, work: Any) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        verdict = work()
    except Exception:  # a study that goes on says what happened
        return {
            "model": model,
            "precision": precision,
            "passed": False,
            "failed": [traceback.format_exc()[-600:]],
            "seconds": time.perf_counter() - start,
        }
    return {
        "model": model,
        "precision": precision,
        "passed": verdict.passed,
        "failed": [[c.name, c.value, c.limit] for c in verdict.checks if not c.passed],
        "checks": [[c.name, c.value, c.limit] for c in verdict.checks],
        "seconds": time.perf_counter() - start,
    }


# --- planted faults ------------------------------------------------------------------------------------

LENGTHS = (*mutations.BORDERS, 199)


def faults(options: argparse.Namespace) -> None:
    """Plant faults in exports, and verify those that move an output."""
    with options.out.open("a") as out, tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(good_models.zoo(options.seed)):
            if number < options.first or number % options.every != options.start:
                continue
            if number >= options.models:
                break
            for row in planted(
                model,
                Path(scratch) / str(number),
                options.seed + number,
                number,
                options.each,
                fp32=not options.lower,
            ):
                caught = {True: "found", False: "MISSED", None: "not moved"}[row["caught"]]
                print(row["model"], row["precision"], row["kind"], caught, f"{row['moved']:.1e}", flush=True)
                out.write(json.dumps(row) + "\n")
                out.flush()


def planted(
    model: good_models.Good, folder: Path, seed: int, number: int, each: int, *, fp32: bool
) -> Iterator[dict[str, Any]]:
    """One row per fault of a model's FP32 export, if asked for, and of `each` lower precisions."""
    loaded = model.load(folder / "model")
    run = trace.export(loaded, folder / "run")
    context = Context(threads=1, seed=seed)
    data = sets.random_set(loaded, RunFolder.open(run).io)
    good_one = verify(run, loaded, context=context, calibration=data.inputs)
    rounding = max(
        c.value
        for c in good_one.checks
        if c.name.startswith(("prefill 199", "step")) and "state" not in c.name
    )
    plain = Planted(model.name, folder, loaded, run, context, data, seed)
    if fp32:
        yield from plain.rows("fp32", run, trace.trace(loaded, ExportOptions())[0], 10 * rounding)
    scales = observers.calibrate(run, data) if each else None
    for precision in (LOWER[(each * number + i) % len(LOWER)] for i in range(each)):
        made = quantize(run, preset(precision), scales=scales)
        again = load_graph(run / MODEL)
        apply_recipe(again, preset(precision), scales)
        yield from plain.rows(precision, made, again, plain.error(made))


class Planted:
    """One model, in which faults are planted."""

    def __init__(
        self, name: str, folder: Path, loaded: Loaded, run: Path, context: Context, data: Any, seed: int
    ) -> None:
        self.name, self.folder, self.loaded, self.run = name, folder, loaded, run
        self.context, self.data, self.seed = context, data, seed
        self.io = RunFolder.open(run).io
        rng = np.random.default_rng([seed, 1])
        self.inputs = random_inputs(loaded, self.io, 8, max(LENGTHS), rng)

    def error(self, made: Path) -> float:
        """A precision's own error: the largest distance from FP32 over the calls that faults are seen in."""
        return distance(answers(made, self.inputs), answers(self.run, self.inputs))

    def rows(self, precision: str, run: Path, again: ir.Model, own: float) -> Iterator[dict[str, Any]]:
        """One row per fault: by how much it moves an output, and which proof finds it.

        Behaviour is asked only for what moves an output by more than `own`; identity always, in the graph
        alone, as if the manifest had been changed with it.
        """
        expected = answers(run, self.inputs)
        for kind, where, changed in mutations.mutated(onnx.load(run / MODEL), self.seed):
            shutil.rmtree(self.folder / "bad", ignore_errors=True)
            bad = shutil.copytree(run, self.folder / "bad", ignore=ignored)
            mutations.write(changed, bad)
            moved = distance(answers(bad, self.inputs), expected)
            caught, by = self.caught(precision, bad) if moved > own else (None, [])
            yield {
                "model": self.name,
                "precision": precision,
                "kind": kind,
                "where": where,
                "moved": moved,
                "own": own,
                "caught": caught,
                "by": by,
                "identity": bool(compare_graphs(load_graph(bad / MODEL), again).mismatches),
            }

    def caught(self, precision: str, bad: Path) -> tuple[bool, list[str]]:
        """Whether behaviour alone finds a fault, and by which checks."""
        try:
            if precision == "fp32":
                verdict = verify(bad, self.loaded, context=self.context, calibration=self.data.inputs)
            else:
                manifest = json.loads((bad / "manifest.json").read_text())
                manifest["quantized_from"]["folder"] = os.path.relpath(self.run, bad)
                (bad / "manifest.json").write_text(json.dumps(manifest))
                verdict = verify_precision(
                    bad, self.loaded, SHORTER, self.context, calibration=self.data.inputs
                )
        except ExportError as error:
            return True, [f"refused: {error.message[:80]}"]
        return not verdict.passed, [c.name for c in verdict.checks if not c.passed][:3]


ignored = shutil.ignore_patterns("verify", *LOWER)  # a run folder's verdicts, and what was quantized from it


def answers(folder: Path, inputs: Arrays) -> list[dict[str, np.ndarray]] | None:
    """Outputs of calls of many lengths and rows, and of steps with their states; None if it does not run."""
    io = RunFolder.open(folder).io
    try:
        session = open_graph(load_graph(folder / MODEL), folder, 1)
        names = [x.name for x in session.get_outputs()]
        found = []
        for number, length in enumerate(LENGTHS):
            count = 1 + number % 8
            given = cut(rows_of(inputs, io, slice(0, count)), io, 0, length)
            state = {s.past: np.zeros((count, *s.shape), s.dtype) for s in io.states}
            found.append(dict(zip(names, session.run(None, given | state), strict=True)))
            for at in range(length, min(length + 3, max(LENGTHS))):
                state = {s.past: found[-1][s.present] for s in io.states}
                step = cut(rows_of(inputs, io, slice(0, count)), io, at, at + 1)
                found.append(dict(zip(names, session.run(None, step | state), strict=True)))
    except Exception as error:  # what ONNX Runtime raises derives from nothing else
        print("does not run:", str(error)[:100])
        return None
    return [{x.name: one[x.name] for x in io.outputs} for one in found]


def distance(found: Any, expected: Any) -> float:
    """The largest relative L2 of an output of a call."""
    if found is None or expected is None:
        return math.inf
    return max(
        difference(one[name], right[name]).relative_l2
        for one, right in zip(found, expected, strict=True)
        for name in right
    )


# --- rates --------------------------------------------------------------------------------------------


def rates(options: argparse.Namespace) -> None:
    """Count over all lines, and write the figures."""
    rows = [json.loads(line) for path in options.lines for line in path.read_text().splitlines()]
    options.out.write_text(json.dumps(counted(rows), indent=1) + "\n")


def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Verifications of good models by precision, and faults by kind.

    An export that gives Inf or NaN, of a model whose activations exceed FP16, is not a good one: it counts as
    overflowed where it was refused.
    """
    good_rows = [row for row in rows if "kind" not in row]
    planted_rows = [row for row in rows if "kind" in row]
    by_precision: dict[str, dict[str, int]] = {}
    for row in good_rows:
        counts = by_precision.setdefault(
            row["precision"], {"verified": 0, "false_alarms": 0, "overflowed": 0}
        )
        counts["verified"] += 1
        if not row["passed"]:
            infinite = any(check[1:] and not math.isfinite(check[1]) for check in row["failed"])
            counts["overflowed" if infinite else "false_alarms"] += 1
    return {
        "models": len({row["model"] for row in good_rows}),
        "by_precision": by_precision,
        "fault_models": len({row["model"] for row in planted_rows}),
        "kinds": len({row["kind"] for row in planted_rows}),
        "identity": [sum(row["identity"] for row in planted_rows), len(planted_rows)],
        "fp32": behaviour([row for row in planted_rows if row["precision"] == "fp32"]),
        "lower": behaviour([row for row in planted_rows if row["precision"] != "fp32"]),
        "lower_by_precision": {
            precision: behaviour([row for row in planted_rows if row["precision"] == precision])
            for precision in LOWER
        },
    }


def behaviour(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Faults that move an output by more than their `own`, and of these those that behaviour finds."""
    moving = [row for row in rows if row["caught"] is not None]
    by_kind: dict[str, list[int]] = {}
    for row in moving:
        counts_of = by_kind.setdefault(row["kind"], [0, 0])
        counts_of[0] += 1
        counts_of[1] += row["caught"]
    return {
        "planted": len(moving),
        "caught": sum(row["caught"] for row in moving),
        "by_kind": by_kind,
        "missed": [
            {key: row[key] for key in ("model", "precision", "kind", "where", "moved", "own")}
            for row in moving
            if not row["caught"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["good", "faults", "rates"])
    parser.add_argument("lines", type=Path, nargs="*", help="files of lines, for rates")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--each", type=int, default=5, help="lower precisions per model, in turn")
    parser.add_argument("--lower", action="store_true", help="faults in half and integers only")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"good": good, "faults": faults, "rates": rates}[options.what](options)


if __name__ == "__main__":
    main()
