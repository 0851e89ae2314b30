"""Commands of the precision stages: calibrate, quantize, sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options import Context, SensitivityOptions
from ..quantize.recipe import BASES, PRECISIONS
from .common import (
    checkpoint_argument,
    command_line,
    emit,
    load_for,
    progress_bar,
    run_argument,
    run_options,
    source_options,
    spinner,
)


@click.command()
@run_argument
@checkpoint_argument
@source_options
@click.option(
    "--data", help="calibration data: .npz, folder of .npz, .npy, text, .csv, or package.module:generator"
)
@click.option("--random-data", is_flag=True, help="made-up data, which every report will say")
@click.option("--avoid", type=click.Path(path_type=Path), help="held-out data, which must not overlap")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json for text")
@click.option("--samples", type=int, help="sequences to use; by default up to 32")
@click.option("--length", type=int, help="positions per sequence")
@click.option("--seed", default=0, help="of the choice of sequences")
@click.option("--method", default="max", show_default=True, help="max, percentile, entropy or mse")
@click.option("--percentile", default=99.99, show_default=True, help="for the method of this name")
@click.option("--resume/--restart", default=True, help="go on where an interrupted run stopped")
@run_options
def calibrate(
    run: Path,
    checkpoint: str | None,
    module: str | None,
    weights: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run an FP32 export over data and write the ranges of its activations (scales.json)."""
    from ..pipeline import stages
    from . import tables_precision as report_precision

    loaded = load_for(run, checkpoint, module, weights)
    with progress_bar("calibrating") as progress:
        scales = stages.calibrate(run, loaded, progress=progress, **options)
    emit(scales.to_json(), as_json, lambda console: report_precision.show_scales(console, scales))


@click.command()
@run_argument
@click.option("--precision", type=click.Choice(PRECISIONS), help="what a recipe would say")
@click.option("--recipe", type=click.Path(path_type=Path), help="recipe.yaml, instead of --precision")
@click.option("--base", type=click.Choice(BASES), help="type of what is not quantized; default fp16")
@click.option("--exclude", multiple=True, help="regular expression: weights to keep in the base type")
@click.option("--include", multiple=True, help="regular expression: weights to quantize all the same")
@click.option("--smooth", type=float, help="strength of the migration of ranges into weights, 0 to 1")
@click.option("--state-dtype", type=click.Choice(BASES), help="type the matrix memory C is stored in")
@click.option(
    "--data", type=click.Path(path_type=Path), help="for --state-dtype: what the drift is measured on"
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="default: RUN/<precision>")
@click.option(
    "--force", is_flag=True, help="replace an existing folder; accept a state that drifts (recorded)"
)
def quantize(run: Path, **options: Any) -> None:
    """Make an FP16, BF16, INT8 or INT4 run folder of an FP32 one."""
    from ..pipeline import stages

    loaded = load_for(run, None, None, None) if options["data"] is not None else None
    with spinner() as stage:
        folder = stages.quantize_run(run, loaded, command=command_line(), progress=stage, **options)
    click.echo(
        f"wrote {folder / 'model.onnx'} (+ model.onnx.data, io.json, recipe.yaml, manifest.json)", err=True
    )


@click.command()
@run_argument
@checkpoint_argument
@source_options
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="data with the task's targets, not held-out",
)
@click.option(
    "--precision", type=click.Choice(["int8", "int8-wo", "int4-wo"]), default="int8", show_default=True
)
@click.option("--base", type=click.Choice(BASES), default="fp16", show_default=True, help="type of the rest")
@click.option("--max-drop", default=0.005, show_default=True, help="of the task metric, relative to FP32")
@click.option("--horizon", default=4096, show_default=True, help="positions after which drift is measured")
@click.option("--jobs", default=-1, show_default=True, help="candidates at once; -1: one per core")
@click.option("--dask", help="scheduler of a Dask cluster to measure candidates on, tcp://host:port")
@click.option("--resume/--restart", default=True, help="keep the candidates measured before")
@click.option("--seed", default=0, help="of the sampled positions")
@click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")
def sensitivity(
    run: Path, checkpoint: str | None, module: str | None, weights: str | None, as_json: bool, **options: Any
) -> None:
    """Find out which weights can be integers, by task metric and drift; writes recipe.yaml."""
    from ..pipeline import stages
    from . import tables_precision as report_precision

    loaded = load_for(run, checkpoint, module, weights)
    with progress_bar("candidates") as progress:
        context = Context(seed=options.pop("seed"), count=progress)
        result = stages.find_recipe(run, loaded, SensitivityOptions(**options), context)
    emit(result.to_json(), as_json, lambda console: report_precision.show_sensitivity(console, result))
