"""Commands of the precision stages: calibrate, quantize, sensitivity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..options import CalibrateOptions, Context, QuantizeOptions, SensitivityOptions
from ..runfolder import RunFolder
from .common import (
    FROM_0,
    RECORDED,
    Source,
    command_line,
    context_options,
    emit_written,
    json_option,
    run_argument,
    source_options,
    stage_options,
)
from .console import emit, progress_bar, spinner


@click.command()
@run_argument
@source_options
@stage_options(CalibrateOptions)
@context_options(seed="seed of the choice of sequences")
@json_option
def calibrate(run: Path, source: Source, options: CalibrateOptions, context: Context, as_json: bool) -> None:
    """Run an FP32 export over data and write the ranges of its activations (scales.json)."""
    opened = RunFolder.open(run)
    loaded = source.load_for(opened, options, context.seed)
    from ..graph.files import load_graph
    from ..graph.sites import activation_names
    from ..pipeline import stages
    from . import tables_precision as tables

    with progress_bar("calibrating") as count:
        scales = stages.calibrate(opened, loaded, options, replace(context, count=count))
    names = activation_names(load_graph(opened.model))
    emit(
        scales.to_json(),
        as_json,
        lambda console: tables.show_scales(console, scales, names),
        line=tables.scales_line(scales),
    )


@click.command()
@run_argument
@stage_options(QuantizeOptions)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="run folder to create; default: RUN/<precision>"
)
@click.option(
    "--force", is_flag=True, help="replace an existing folder; accept a state that drifts, which is recorded"
)
@json_option
def quantize(run: Path, options: QuantizeOptions, out: Path | None, force: bool, as_json: bool) -> None:
    """Make an FP16, BF16, INT8 or INT4 run folder of an FP32 one."""
    from ..pipeline import stages
    from ..quantize.recipe import choose_recipe

    choose_recipe(options)  # wrong options are reported before a missing run folder
    opened = RunFolder.open(run)
    loaded = RECORDED.load_for(opened, options) if options.data is not None else None
    with spinner() as stage:
        context = Context(command=command_line(), progress=stage)
        folder = stages.quantize(opened, loaded, options, context, out=out, force=force)
    emit_written(folder, as_json)


@click.command()
@run_argument
@source_options
@stage_options(SensitivityOptions, required=("data",))
@click.option("--seed", type=FROM_0, default=0, help="seed of the sampled positions")
@json_option
def sensitivity(run: Path, source: Source, options: SensitivityOptions, seed: int, as_json: bool) -> None:
    """Find out which weights can be integers, by task metric and drift; writes recipe.yaml."""
    from ..pipeline import stages
    from . import tables_precision as tables

    opened = RunFolder.open(run)
    loaded = source.load_for(opened, options)
    with progress_bar("candidates") as count:
        result = stages.sensitivity(opened, loaded, options, Context(seed=seed, count=count))
    emit(result.to_json(), as_json, lambda console: tables.show_sensitivity(console, result))
