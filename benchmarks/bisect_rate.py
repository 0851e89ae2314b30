"""How often bisect names the place of a planted fault.

    python benchmarks/bisect_rate.py [--seeds 2] [--models lm,…] [--out benchmarks/results/bisect.json]

Faults are made by seed (`tests/mutations.py`, `tests/planted.py`): in exports of small models of each form,
in their adapters, and in the exporter. `verify` judges behaviour alone, without the proof of identity. Where
it fails, bisect searches. Right is a node that has the fault or reads what has it; of a wrong exporter its
block, of a wrong adapter the module.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import called_models  # noqa: E402
import models  # noqa: E402
import own_models  # noqa: E402
import own_recurrences  # noqa: E402
from bisect_faults import tamper  # noqa: E402
from planted import ALL, WrongAdapter, planted, right_places, wrong_exporter  # noqa: E402
from xlstm_export.calibration import observers, sets  # noqa: E402
from xlstm_export.calibration.scales import Scales  # noqa: E402

from xlstm_export.bench.environment import environment  # noqa: E402
from xlstm_export.checks import Verdict  # noqa: E402
from xlstm_export.errors import ExportError  # noqa: E402
from xlstm_export.lift.model import lift_model  # noqa: E402
from xlstm_export.load import checkpoint  # noqa: E402
from xlstm_export.load.loaded import Loaded  # noqa: E402
from xlstm_export.options import CalibrateOptions, Context, ExportOptions, VerifyOptions  # noqa: E402
from xlstm_export.quantize import quantize  # noqa: E402
from xlstm_export.quantize.recipe import preset  # noqa: E402
from xlstm_export.runfolder import RunFolder  # noqa: E402
from xlstm_export.trace import export as trace  # noqa: E402
from xlstm_export.verify import fp32  # noqa: E402
from xlstm_export.verify.bisect.place import Bisection  # noqa: E402
from xlstm_export.verify.bisect.search import bisect  # noqa: E402
from xlstm_export.verify.precision import verify_precision  # noqa: E402

CONTEXT = Context(threads=1)
HORIZON = 600  # positions of the drift of a half or quantized run
EXPORTER_KINDS = (
    "attribute",
    "gate_order",
    "operator",
    "negated",
    "sign",
    "axis",
    "not_carried",
    "constant_part",
)


class Recurrences(nn.Module):
    """Standard recurrences, one after another, without a stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(5, 12, 2, batch_first=True), nn.GRU(12, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x)[0])[0])


def language_model(folder: Path) -> Loaded:
    return checkpoint.load_checkpoint(models.make(folder / "checkpoint", embedding_dim=32, vocab_size=64))


def mixed_stack() -> nn.Module:
    """Blocks of both kinds as a module in memory."""
    config = models.lm_config(embedding_dim=32)
    return models.build({key: x for key, x in config.items() if key not in ("vocab_size",)})


def _own(module: nn.Module, width: int, **options: Any) -> Loaded:
    torch.manual_seed(0)
    return own_models.loaded(module, inputs={"x": torch.randn(2, 9, width)}, **options)


MODELS: dict[str, Callable[[Path], Loaded]] = {
    "lm": language_model,
    "standard recurrences": lambda folder: _own(Recurrences(), 5),
    "loop over cells": lambda folder: _own(own_recurrences.CellLoop(), 5),
    "stack and LSTM": lambda folder: _own(own_models.Beside(), own_models.WIDTH),
    "stack called twice": lambda folder: _own(own_models.Twice(), own_models.WIDTH),
    "float32 forward": lambda folder: checkpoint.load_module("pinned_models:float_cast"),
    "policy": lambda folder: own_models.policy(),
    "steps in a loop": lambda folder: called_models.load(called_models.Loop),
    "channels as rows": lambda folder: called_models.load(called_models.Channels),
    "vision": lambda folder: own_models.vision(),
    "mixed stack": lambda folder: _own(mixed_stack(), 32),
}
PRECISIONS = ("fp16", "int8-wo", "int8", "int4-wo")


@dataclass(frozen=True)
class Trial:
    """One planted fault: whether verify caught it, and what bisect named."""

    model: str
    kind: str
    seed: int
    caught: bool
    right: bool
    planted: str = ""
    named: str = ""
    sentence: str = ""
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--models", help="names, separated by commas; default: all")
    parser.add_argument("--kinds", help="kinds of faults, separated by commas; default: all")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="results of other models to add")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bisect.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = args.models.split(",") if args.models else [*MODELS, *PRECISIONS, "adapters", "exporter"]
    kinds = args.kinds.split(",") if args.kinds else list(ALL)
    seeds = range(args.first, args.first + args.seeds)
    trials = [Trial(**one) for path in args.add for one in json.loads(path.read_text())["trials"]]
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            for trial in of_model(name, Path(scratch), kinds, seeds):
                trials.append(trial)
                write(args.out, trials)
                mark = "missed" if not trial.caught else "right" if trial.right else "WRONG"
                print(
                    f"{trial.model:22} {trial.kind:20} {trial.seed} {mark:6} {trial.seconds:5.1f} s",
                    flush=True,
                )
                if trial.caught and not trial.right:
                    print(f"    planted {trial.planted}\n    {trial.sentence}", flush=True)


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """A model is traced once: bisect exports it again for each fault, always the same."""
    real, made = trace.trace, dict[str, Any]()

    def once(loaded: Loaded, options: ExportOptions = ExportOptions()) -> Any:
        key = f"{loaded.name} {options}"
        if key not in made:
            made[key] = real(loaded, options)
        model, io = made[key]
        again = model.clone()
        again.meta.update(model.meta)
        return again, io

    trace.trace = once
    try:
        yield
    finally:
        trace.trace = real


def of_model(name: str, folder: Path, kinds: list[str], seeds: range) -> Iterator[Trial]:
    """All faults of one model."""
    if name == "adapters":
        yield from of_adapters(folder)
    elif name == "exporter":
        yield from of_exporter(folder, seeds)
    else:
        loaded = (language_model if name in PRECISIONS else MODELS[name])(folder)
        export = trace.export(loaded, folder / "run")
        if name in PRECISIONS:
            export = quantized(export, name)
        right = onnx.load(export / "model.onnx")
        cases = [
            (kind, seed, wrong) for kind in kinds for seed in seeds if (wrong := planted(right, kind, seed))
        ]
        with traced_once():
            for kind, seed, wrong in cases:
                out = folder / "wrong"
                shutil.rmtree(out, ignore_errors=True)
                yield tried(Trial(name, kind, seed, True, False), (right, wrong), (export, out), loaded)


def quantized(export: Path, precision: str) -> Path:
    tokens = np.random.default_rng(1).integers(0, 64, (2, 700))
    np.savez(export.parent / "calib.npz", tokens=tokens)
    data = sets.load(str(export.parent / "calib.npz"), RunFolder.open(export).io)
    observers.calibrate(export, data, CalibrateOptions(method="max"), CONTEXT)
    return quantize.quantize(
        export, preset(precision), scales=Scales.read(export), out=export.parent / precision
    )


def tried(
    trial: Trial, graphs: tuple[onnx.ModelProto, onnx.ModelProto], folders: tuple[Path, Path], loaded: Loaded
) -> Trial:
    """Verify and bisect one faulty graph."""
    nodes, values = right_places(*graphs)
    tamper(*folders, lambda model: model.CopyFrom(graphs[1]))
    verdict, found, seconds = judged(folders[1], loaded)
    planted_at = ", ".join(sorted(nodes)[:6])
    if found is None:
        return replace(trial, caught=not verdict, right=False, planted=planted_at)
    place = found.place
    named = "" if place is None else f"{place.node} {place.tensor}"
    good = place is not None and (place.node in nodes or place.tensor in values)
    return replace(
        trial, right=good, planted=planted_at, named=named, sentence=found.sentence(), seconds=seconds
    )


def judged(run: Path, loaded: Loaded) -> tuple[bool, Bisection | None, float]:
    """Whether the behaviour passes; if not, what bisect finds, and its seconds."""
    opened = RunFolder.open(run)
    options = (
        VerifyOptions(horizon=HORIZON) if opened.options.precision and opened.io.states else VerifyOptions()
    )
    try:
        verdict: Verdict = (verify_precision if opened.options.precision else fp32.verify)(
            opened, loaded, options, CONTEXT
        )
    except ExportError as error:  # such as a shape that the graph cannot compute: not a verdict
        print(f"    no verdict: {error.message[:100]}")
        return True, None, 0.0
    if verdict.passed:
        return True, None, 0.0
    began = time.perf_counter()
    found = bisect(opened, loaded, CONTEXT, failed=[check for check in verdict.checks if not check.passed])
    return False, found, time.perf_counter() - began


def of_adapters(folder: Path) -> Iterator[Trial]:
    """Every cell of some models with a wrong adapter."""
    for name in ("mixed stack", "standard recurrences", "stack and LSTM", "float32 forward"):
        loaded = MODELS[name](folder / name.replace(" ", "_"))
        lifted = lift_model(loaded)
        faults = [WrongAdapter(path) for path in lifted.replaced]
        # The last state of a cell stands for all.
        kept = {lifted.blocks[state.block].path: state.kind for state in lifted.states if state.kind != "m"}
        faults += [WrongAdapter(path, kind) for path, kind in kept.items()]
        for index, fault in enumerate(faults):
            out = folder / f"{name.replace(' ', '_')}.{index}"
            with fault.planted(), traced_once():
                try:
                    export = trace.export(loaded, out)
                except ExportError:  # the check that a model streams finds it
                    continue
                passed, found, seconds = judged(export, loaded)
            kind = f"adapter, {fault.state or 'result'}"
            place = None if found is None else found.place
            owner = max(
                (path for path in lifted.replaced if f"{fault.path}.".startswith(f"{path}.")), key=len
            )
            good = place is not None and place.module == owner
            sentence = "" if found is None else found.sentence()
            named = "" if place is None else place.module
            yield Trial(name, kind, index, not passed, good, fault.path, named, sentence, seconds)


def of_exporter(folder: Path, seeds: range) -> Iterator[Trial]:
    """Faults that the exporter makes each time: the block is what bisect can name."""
    for name in ("lm", "float32 forward"):
        loaded = MODELS[name](folder / name.replace(" ", "_"))
        for kind in EXPORTER_KINDS:
            for seed in seeds:
                out = folder / f"{name.replace(' ', '_')}.{kind}.{seed}"
                with traced_once(), wrong_exporter(kind, seed) as nodes:
                    export = trace.export(loaded, out)
                    if not nodes:
                        continue
                    passed, found, seconds = judged(export, loaded)
                home = block_of(export, nodes)
                place = None if found is None else found.place
                good = place is not None and place.block in home
                sentence = "" if found is None else found.sentence()
                planted_at = f"block {sorted(home)}: {', '.join(nodes[:4])}"
                named = "" if place is None else f"block {place.block}"
                yield Trial(
                    name, f"exporter, {kind}", seed, not passed, good, planted_at, named, sentence, seconds
                )


def block_of(export: Path, nodes: list[str]) -> set[int]:
    """The blocks that nodes are in."""
    from xlstm_export.verify.bisect.replay import Side

    side = Side(export, RunFolder.open(export).io)
    return {i for i in range(side.blocks + 1) if any(n.name in nodes for n in side.part(i).graph)}


def write(path: Path, trials: list[Trial]) -> None:
    """The trials, and how many were right by form of model."""
    caught = [trial for trial in trials if trial.caught]
    times = sorted(trial.seconds for trial in caught if trial.seconds)
    result = {
        "environment": environment(1),
        "planted": len(trials),
        "caught": len(caught),
        "right": sum(trial.right for trial in caught),
        "median_s": times[len(times) // 2] if times else None,
        "largest_s": times[-1] if times else None,
        "models": {
            name: {
                "caught": sum(t.model == name for t in caught),
                "right": sum(t.model == name and t.right for t in caught),
            }
            for name in dict.fromkeys(trial.model for trial in trials)
        },
        "wrong": [asdict(trial) for trial in caught if not trial.right],
        "trials": [asdict(replace(trial, sentence="", planted="", named="")) for trial in trials],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
