"""`deploy`, the default pipeline: export, calibrate, quantize, verify, bench, bundle; and its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bench.result import BenchReport
from ..checks import Verdict
from ..errors import InputError, UsageError
from ..load.loaded import Loaded
from ..options import (
    BASES,
    BenchOptions,
    BundleOptions,
    CalibrateOptions,
    Context,
    DeployOptions,
    ExportOptions,
    How,
    Options,
    QuantizeOptions,
    VerifyOptions,
)
from ..quantize.recipe import Recipe
from ..runfolder import MODEL, MODEL_DATA, VERDICT
from ..specs import Json
from ..targets import require_target
from .data_check import check_data
from .plan import Pipeline, Step, deployed
from .runner import Outcome, run_pipeline
from .table import BUNDLE

FP32 = "fp32"
ARTIFACTS = (
    *("model.onnx", "model.onnx.data", "io.json", "manifest.json", "recipe.yaml", "scales.json"),
    *("verify/report.json", "verify/drift.csv", "verify/drift.svg", "bench/bench.json", "report.html"),
)


@dataclass(frozen=True)
class Variant:
    """Results of one precision; `benchmark` is None if verification failed: then nothing is timed."""

    precision: str
    folder: Path
    verification: Verdict
    benchmark: BenchReport | None

    @property
    def model_bytes(self) -> int:
        """Size of graph and weights."""
        return sum((self.folder / name).stat().st_size for name in (MODEL, MODEL_DATA))

    @property
    def written(self) -> list[Path]:
        return [self.folder / name for name in ARTIFACTS if (self.folder / name).is_file()]


@dataclass(frozen=True)
class Deployment:
    """Result of `deploy`.

    Attributes:
        variants: one per verified precision, FP32 first, the requested one last; empty in a dry run.
        bundle: path of the bundle; None without a target, or if the requested precision failed.
        outcomes: state of each step.
    """

    variants: tuple[Variant, ...]
    bundle: Path | None = None
    outcomes: tuple[Outcome, ...] = ()

    @property
    def folder(self) -> Path:
        """The run folder of the requested precision."""
        return self.variants[-1].folder

    @property
    def verification(self) -> Verdict:
        return self.variants[-1].verification

    @property
    def benchmark(self) -> BenchReport | None:
        return self.variants[-1].benchmark

    @property
    def written(self) -> list[Path]:
        """Files of all precisions, and the bundle."""
        bundles = [] if self.bundle is None else [self.bundle]
        return [path for variant in self.variants for path in variant.written] + bundles

    @property
    def passed(self) -> bool:
        """FP32 equals PyTorch, and the requested precision is within its limits."""
        return self.variants[0].verification.passed and self.verification.passed

    def to_json(self) -> Json:
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
    options: DeployOptions = DeployOptions(),
    context: Context = Context(),
    how: How = How(),
) -> Deployment:
    """Export into `out`, verify, and bench if that passed; then the same in the requested precision.

    Args:
        loaded: the model.
        out: run folder of the FP32 export; other precisions become subfolders of it.
        options: precision and data. INT8 and INT4 also make FP16, for comparison.
        context: threads, progress, and the command that manifests record.
        how: resume, start over, dry run; see `options.How`.

    Raises:
        UsageError: activations are to be quantized and there is no calibration data.
    """
    outcomes = run_pipeline(deploy_pipeline(loaded, out, options, context), how, context.progress)
    return deployment(outcomes, how)


def deployment(outcomes: Sequence[Outcome], how: How = How()) -> Deployment:
    """What the steps of a pipeline made and found: one variant per verification that was done."""
    done = [o for o in outcomes if o.state in ("done", "unchanged")]
    verified = [] if how.dry_run else [o for o in done if o.name.startswith("verify")]
    variants = tuple(_variant(outcome, done) for outcome in verified)
    bundled = bool(variants) and any(o.name == "bundle" for o in done)
    bundle = variants[-1].folder / BUNDLE if bundled else None
    return Deployment(variants, bundle, tuple(outcomes))


def _variant(outcome: Outcome, done: list[Outcome]) -> Variant:
    """Results of a verified precision; an unchanged verdict is read from disk, timings are not."""
    verdict = outcome.result
    if not isinstance(verdict, Verdict):
        path = outcome.folder / VERDICT
        try:
            verdict = Verdict.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{path} cannot be read: {error!r}", "verify again") from error
    timed = [o.result for o in done if o.variant == outcome.variant and isinstance(o.result, BenchReport)]
    return Variant(outcome.variant, outcome.folder, verdict, timed[0] if timed else None)


def deploy_pipeline(
    loaded: Loaded, out: Path, options: DeployOptions = DeployOptions(), context: Context = Context()
) -> Pipeline:
    """The steps of `deploy`.

    Raises:
        UsageError: the options contradict each other, or calibration data are missing.
    """
    chosen = deployed(options)
    require_target(options.target)
    if options.sign is not None and options.target is None:
        raise UsageError("--sign without --target: no bundle is made", "give --target, or leave out --sign")
    steps = [Step("export", "export", ExportOptions(), variant=FP32)]
    steps += _judged(FP32, VerifyOptions(data=options.data, calib=options.calib, positions=options.positions))
    if chosen.precision != FP32:
        steps += _quantized(chosen, options)
    if options.target is not None:
        bundled = BundleOptions(
            target=options.target,
            data=options.data,
            calib=options.calib,
            license=options.license,
            sign=options.sign,
        )
        steps.append(Step("bundle", "bundle", bundled, variant=chosen.precision))
    check_data(loaded, steps)
    return Pipeline(
        source=loaded.origin,
        out=out,
        steps=tuple(steps),
        command=context.command,
        threads=context.threads,
        loaded=loaded,
    )


def _quantized(chosen: Recipe, options: DeployOptions) -> list[Step]:
    """Steps of the requested precision, and of FP16 beside a quantized one."""
    steps = []
    if chosen.needs_scales:
        ranges = CalibrateOptions(data=options.calib, random_data=options.random_data, avoid=options.data)
        steps.append(Step("calibrate", "calibrate", ranges, variant=chosen.precision))
    asked = QuantizeOptions(recipe=options.recipe) if options.recipe else None
    asked = asked or QuantizeOptions(precision=chosen.precision, base=options.base)
    both = {} if chosen.precision in BASES else {"fp16": QuantizeOptions(precision="fp16")}
    verified = VerifyOptions(
        data=options.data,
        calib=options.calib,
        positions=options.positions,
        horizon=options.horizon,
        free_horizon=options.free_horizon,
    )
    for precision, how in {**both, chosen.precision: asked}.items():
        steps.append(Step(f"quantize-{precision}", "quantize", how, variant=precision))
        steps += _judged(precision, verified)
    return steps


def _judged(precision: str, options: VerifyOptions) -> list[Step]:
    """Steps that verify a precision, time it if that passed, and write its report."""
    # Without torch.compile, which takes minutes; the command `bench` includes it.
    return [
        Step(f"verify-{precision}", "verify", options, variant=precision, stops=False),
        Step(f"bench-{precision}", "bench", BenchOptions(compile_at="none"), variant=precision),
        Step(f"report-{precision}", "report", Options(), variant=precision),
    ]
