"""The stages a pipeline file can name, in their order: what each takes, and what it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GateError
from ..options import BenchOptions, SensitivityOptions, VerifyOptions
from ..options import Context as Carried
from ..sensitivity.report import EVIDENCE, FOLDER, RECIPE

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Context:
    """What stages share.

    Attributes:
        load: gives the model, `Loaded`; read once.
        out: run folder of the FP32 export.
        data: held-out data.
        command: recorded in manifests: the pipeline file's, so that resuming changes no byte.
        threads: of ONNX Runtime and PyTorch.
        progress: called with the name of each step.
        recipe: that `sensitivity` finds, where it is a stage.
        calib: data of the stage `calibrate`, to take sequences from where there are no held-out data.
    """

    load: Callable[[], Any]
    out: Path
    data: Path | None
    command: str
    threads: int
    progress: Progress
    recipe: Path | None = None
    calib: str | None = None


Run = Callable[[Context, dict[str, Any], Path], Path]


@dataclass(frozen=True)
class Step:
    """A stage of the flow.

    Attributes:
        keys: option → what it must be, see `KINDS`. run: does it, given the context, the options and the
        run folder so far; gives the run folder from then on. reads_data: whether held-out data are among
        its inputs. writes: what it leaves behind, from the run folder it was given or made. needs: keys
        that must be given.
    """

    keys: Mapping[str, str]
    run: Run
    writes: Callable[[Path], list[Path]]
    reads_data: bool = False
    needs: tuple[str, ...] = ()


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda x: isinstance(x, bool)),
    "int": ("a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool)),
    "number": ("a number", lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)),
    "text": ("text", lambda x: isinstance(x, str) and bool(x)),
    "file": ("the name of a file that exists", lambda x: isinstance(x, str) and Path(x).is_file()),
    "path": ("the name of a file or folder that exists", lambda x: isinstance(x, str) and Path(x).exists()),
    "texts": ("a list of text", lambda x: isinstance(x, list) and all(isinstance(e, str) for e in x)),
    "ints": (
        "a list of whole numbers",
        lambda x: isinstance(x, list) and bool(x) and all(isinstance(e, int) and e > 0 for e in x),
    ),
}
FILES = ("file", "path")


def _export(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from ..trace import export as trace

    return trace.export(
        context.load(), context.out, force=True, command=context.command, progress=context.progress, **options
    )


def _calibrate(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from . import stages

    if "tokenizer" in options:
        options["tokenizer"] = Path(options["tokenizer"])

    def count(done: int, total: int) -> None:
        context.progress(f"calibrating, {done:,} of {total:,} positions")

    stages.calibrate(
        context.out, context.load(), avoid=context.data, threads=context.threads, progress=count, **options
    )
    return folder


def _sensitivity(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from . import stages

    def count(done: int, total: int) -> None:
        context.progress(f"candidate {done} of {total}")

    carried = Carried(seed=options.pop("seed", 0), count=count)
    stages.find_recipe(context.out, context.load(), SensitivityOptions.made_of(options), carried)
    return folder


def _quantize(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from . import stages

    if context.recipe is not None and not {"recipe", "precision"} & options.keys():
        options["recipe"] = context.recipe
    for name in ("recipe", "data"):
        if name in options:
            options[name] = Path(options[name])
    return stages.quantize_run(
        context.out, context.load(), force=True, command=context.command, progress=context.progress, **options
    )


def _verify(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from . import stages

    seed = options.pop("seed", 0)
    carried = Carried(threads=context.threads, seed=seed, progress=context.progress)
    common: dict[str, Any] = {"metric": options["metric"]} if "metric" in options else {}
    # A candidate is held against the FP32 export, which must have been verified itself.
    for run in dict.fromkeys((context.out, folder)):
        given = options if run == folder else common
        chosen = VerifyOptions(data=context.data, calib=context.calib, **given)
        report = stages.verify(run, context.load(), chosen, carried)
        if not report.passed:
            failed = next(check.name for check in report.checks if not check.passed)
            raise GateError(f"{run}: {failed} is beyond its limit", f"details: {run}/verify/report.json")
    return folder


def _bench(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from ..bench.bench import bench

    given = dict(options)
    given["compile_at"] = "first" if given.pop("compile", False) else "none"
    carried = Carried(threads=context.threads, progress=context.progress)
    bench(folder, context.load(), BenchOptions.made_of(given), carried)
    return folder


def _bundle(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from ..targets import TARGETS
    from . import stages

    target = options.pop("target", None)
    stages.bundle(
        folder,
        context.load(),
        folder / "bundle.tar.gz",
        target=TARGETS[target] if target is not None else None,
        data=context.data,
        calib=context.calib,
        licence=options.pop("license", None),
        force=True,
        threads=context.threads,
        command=context.command,
        progress=context.progress,
        **options,
    )
    return folder


def _report(context: Context, options: dict[str, Any], folder: Path) -> Path:
    from ..report.write import write_report

    write_report(folder)
    return folder


def _model(folder: Path) -> list[Path]:
    return [folder / name for name in ("model.onnx", "model.onnx.data", "io.json", "manifest.json")]


STEPS: dict[str, Step] = {
    "export": Step({"stateless": "bool", "last_logits": "bool", "dtype": "text"}, _export, _model),
    "calibrate": Step(
        {
            **{"data": "path", "random_data": "bool", "tokenizer": "file", "samples": "int", "length": "int"},
            **{"seed": "int", "method": "text", "percentile": "number"},
        },
        _calibrate,
        lambda folder: [folder / "scales.json", folder / "channels.safetensors"],
        reads_data=True,
    ),
    "sensitivity": Step(
        {
            **{"data": "file", "precision": "text", "base": "text", "max_drop": "number"},
            **{"horizon": "int", "jobs": "int", "seed": "int"},
        },
        _sensitivity,
        lambda folder: [folder / FOLDER / name for name in (RECIPE, EVIDENCE)],
        needs=("data",),
    ),
    "quantize": Step(
        {
            **{"precision": "text", "recipe": "file", "base": "text", "smooth": "number"},
            **{"exclude": "texts", "include": "texts", "state_dtype": "text", "data": "file"},
        },
        _quantize,
        _model,
    ),
    "verify": Step(
        {
            **{"metric": "text", "gate": "file"},
            **{"seed": "int", "horizon": "int", "free_horizon": "int"},
        },
        _verify,
        lambda folder: [folder / "verify" / "report.json"],
        reads_data=True,
    ),
    "bench": Step(
        {"batch": "ints", "length": "ints", "steps": "int", "hz": "number", "compile": "bool"},
        _bench,
        lambda folder: [folder / "bench" / "bench.json"],
    ),
    "bundle": Step(
        {"target": "text", "license": "text", "horizon": "int"},
        _bundle,
        lambda folder: [folder / "bundle.tar.gz"],
        reads_data=True,
    ),
    "report": Step({}, _report, lambda folder: [folder / "report.html"]),
}
