"""All stages in a row: export, calibrate, quantize, verify, bench; and a table of what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.bench import bench
from ..bench.result import BenchReport
from ..checks import Verdict
from ..errors import UsageError
from ..load.loaded import Loaded
from ..options import BenchOptions, Context, VerifyOptions
from ..quantize.quantize import quantize
from ..quantize.recipe import BASES, preset, read_recipe
from ..report.write import write_report
from ..runfolder import MODEL, MODEL_DATA
from ..targets import Target
from ..trace import export as trace
from . import stages

Progress = Callable[[str], None]
BUNDLE = "bundle.tar.gz"
ARTIFACTS = (
    *("model.onnx", "model.onnx.data", "io.json", "manifest.json", "recipe.yaml", "scales.json"),
    *("verify/report.json", "verify/drift.csv", "verify/drift.svg", "bench/bench.json", "report.html"),
)


@dataclass(frozen=True)
class Variant:
    """One precision of the model; `benchmark` is None when verification failed: then nothing is timed."""

    precision: str
    folder: Path
    verification: Verdict
    benchmark: BenchReport | None

    @property
    def model_bytes(self) -> int:
        """Graph and weights."""
        return sum((self.folder / name).stat().st_size for name in (MODEL, MODEL_DATA))

    @property
    def written(self) -> list[Path]:
        return [self.folder / name for name in ARTIFACTS if (self.folder / name).is_file()]


@dataclass(frozen=True)
class Deployment:
    """What `deploy` did: FP32 first, what was asked for last; and the bundle, where a target was named."""

    variants: tuple[Variant, ...]
    bundle: Path | None = None

    @property
    def folder(self) -> Path:
        """The run folder of the precision that was asked for."""
        return self.variants[-1].folder

    @property
    def verification(self) -> Verdict:
        return self.variants[-1].verification

    @property
    def benchmark(self) -> BenchReport | None:
        return self.variants[-1].benchmark

    @property
    def written(self) -> list[Path]:
        """Of all precisions."""
        bundles = [] if self.bundle is None else [self.bundle]
        return [path for variant in self.variants for path in variant.written] + bundles

    @property
    def passed(self) -> bool:
        """FP32 equals PyTorch, and the precision that was asked for is within its limits."""
        return self.variants[0].verification.passed and self.verification.passed

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "passed": self.passed,
            "bundle": None if self.bundle is None else str(self.bundle),
            "verification": self.verification.to_json(),
            "benchmark": self.benchmark.to_json() if self.benchmark else None,
            "variants": [
                {
                    "precision": variant.precision,
                    "folder": str(variant.folder),
                    "bytes": variant.model_bytes,
                    "written": [str(path) for path in variant.written],
                    "verification": variant.verification.to_json(),
                    "benchmark": variant.benchmark.to_json() if variant.benchmark else None,
                }
                for variant in self.variants
            ],
        }


def deploy(
    loaded: Loaded,
    out: Path,
    *,
    precision: str = "fp32",
    base: str | None = None,
    recipe: Path | None = None,
    calib: str | None = None,
    random_data: bool = False,
    data: Path | None = None,
    target: Target | None = None,
    licence: str | None = None,
    horizon: int | None = None,
    free_horizon: int | None = None,
    force: bool = False,
    threads: int = 0,
    command: str = "",
    progress: Progress = lambda stage: None,
) -> Deployment:
    """Export into `out`, verify, bench what verified; then the same in the precision asked for.

    Args:
        loaded: the model.
        out: run folder of the FP32 export; other precisions become subfolders of it.
        precision: "int8" also makes "fp16", to be compared with.
        base: of `preset`.
        recipe: recipe.yaml, instead of the preset of `precision`.
        calib: calibration data, see `calibration.sets.load`; needed where activations are quantized.
        random_data: calibrate on made-up data instead, which every report then says.
        data: held-out data for the task metric, and for the streams that are recorded in a bundle.
        target: board to make a bundle for, of what was asked for, if it passed.
        licence: of the weights, told in the bundle.
        horizon, free_horizon: of `verify_precision`.
        force: replace an existing run folder.
        threads: of ONNX Runtime and PyTorch.
        command: recorded in the manifests.
        progress: called with the name of each stage.

    Raises:
        UsageError: activations are to be quantized and there is no calibration data.
    """
    chosen = read_recipe(recipe) if recipe is not None else preset(precision, base)
    if precision not in ("fp32", chosen.precision):
        raise UsageError(f"{recipe} is a recipe for {chosen.precision}, not for {precision}")
    if chosen.needs_scales and calib is None and not random_data:
        raise UsageError(
            f"precision {chosen.precision} quantizes activations and needs calibration data",
            "give --calib DATA (or --random-data, which no report will hide)",
        )
    folder = trace.export(loaded, out, force=force, command=command, progress=progress)
    run = _Stages(loaded, data, calib, threads, command, progress)
    variants = [run.finish("fp32", folder)]
    if chosen.precision == "fp32" or not variants[0].verification.passed:
        return run.bundled(Deployment(tuple(variants)), target, licence)
    scales = None
    if chosen.needs_scales:

        def count(done: int, total: int) -> None:
            progress(f"calibrating, {done:,} of {total:,} positions")

        scales = stages.calibrate(
            folder,
            loaded,
            data=calib,
            random_data=random_data,
            avoid=data,
            threads=threads,
            progress=count,
        )
    recipes = [chosen] if chosen.precision in BASES else [preset("fp16"), chosen]
    for one in recipes:
        progress(f"{one.precision}: quantizing")
        made = quantize(
            folder, one, scales=scales if one.needs_scales else None, command=command, progress=progress
        )
        variants.append(run.finish(one.precision, made, horizon=horizon, free_horizon=free_horizon))
    return run.bundled(Deployment(tuple(variants)), target, licence)


@dataclass(frozen=True)
class _Stages:
    """Verification and bench of one precision after another."""

    loaded: Loaded
    data: Path | None
    calib: str | None
    threads: int
    command: str
    progress: Progress

    def finish(self, precision: str, folder: Path, **horizons: Any) -> Variant:
        """Verify a run folder and time it if it passed."""

        def say(what: str) -> Progress:
            return lambda stage: self.progress(f"{precision}: {what}: {stage}")

        options = VerifyOptions(data=self.data, calib=self.calib, **horizons)
        context = Context(threads=self.threads, progress=say("verify"))
        report = stages.verify(folder, self.loaded, options, context)
        timing = None
        if report.passed:
            # torch.compile takes minutes; `bench` by itself includes it.
            context = Context(threads=self.threads, progress=say("bench"))
            timing = bench(folder, self.loaded, BenchOptions(compile_at="none"), context)
        write_report(folder)
        return Variant(precision, folder, report, timing)

    def bundled(self, made: Deployment, target: Target | None, licence: str | None) -> Deployment:
        """With a bundle of the precision that was asked for, where there is a board for it and it passed."""
        if target is None or not made.passed:
            return made
        path = stages.bundle(
            made.folder,
            self.loaded,
            made.folder / BUNDLE,
            target=target,
            data=self.data,
            calib=self.calib,
            licence=licence,
            force=True,
            threads=self.threads,
            command=self.command,
            progress=lambda stage: self.progress(f"bundle: {stage}"),
        )
        return replace(made, bundle=path)
