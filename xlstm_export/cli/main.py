"""The command line. A command parses, calls one library function per stage, and prints the result."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import ExportError, SetupError
from ..options import Context, DeployOptions, ExportOptions, How
from ..specs import Json
from ..targets import TARGETS
from ..version import __version__
from . import bench as cli_bench
from . import bundle as cli_bundle
from . import engine as cli_engine
from . import inference as cli_artifact
from . import plugins as cli_plugins
from . import precision as cli_precision
from . import run as cli_flow
from . import verify as cli_verify
from .common import (
    Source,
    command_line,
    context_options,
    emit,
    force_option,
    json_option,
    out_option,
    require_passed,
    source_options,
    spinner,
    stage_options,
)

INTERRUPTED = 130  # what shells report for Ctrl-C


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="show the traceback of an error")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Put trained xLSTM models on edge devices: streaming ONNX, proven equal to PyTorch.

    Exit codes: 0 pass, 1 gate failed, 2 usage, 3 environment, 4 bad input, 5 build.
    """
    if debug:
        context.with_resource(debug_log())


@cli.command()
@source_options
@json_option
def inspect(source: Source, as_json: bool) -> None:
    """Show blocks, states and the roofline of CHECKPOINT, the tensors of a run folder, or a model.onnx."""
    from .. import runfolder
    from ..graph import info as graph_info
    from . import tables

    path = source.checkpoint
    if path is not None and path.endswith(".onnx"):
        info = graph_info.graph_info(Path(path))
        emit(info.to_json(), as_json, lambda console: tables.show_graph(console, info))
        return
    if path is not None and (Path(path) / runfolder.IO).is_file():
        io = runfolder.RunFolder.open(path).io
        emit(io.to_json(), as_json, lambda console: tables.show_io(console, io))
        return
    from ..lift.model import spec_of

    spec = spec_of(source.load())
    emit(_spec_json(spec), as_json, lambda console: tables.show_model(console, spec))


@cli.command()
@source_options
@out_option
@force_option
@stage_options(ExportOptions)
def export(source: Source, out: Path, force: bool, options: ExportOptions) -> None:
    """Export CHECKPOINT (or --module) to ONNX in a new run folder."""
    from ..pipeline import stages

    with spinner() as stage:
        stage("loading")
        loaded = source.load(options.stateless)
        context = Context(command=command_line(), progress=stage)
        folder = stages.export(loaded, out, options, context, force=force)
    click.echo(f"wrote {folder / 'model.onnx'} (+ model.onnx.data, io.json, manifest.json)", err=True)


@cli.command()
@source_options
@out_option
@stage_options(DeployOptions)
@stage_options(How, leave=("first", "last"), into="how")
@context_options()
@json_option
def deploy(
    source: Source,
    out: Path,
    options: DeployOptions,
    context: Context,
    as_json: bool,
    how: How,
) -> None:
    """Export, calibrate, quantize, verify, bench and bundle CHECKPOINT (or --module) in one run."""
    from ..pipeline.deploy import deploy as deploy_
    from . import tables

    with spinner() as stage:
        stage("loading")
        loaded = source.load()
        result = deploy_(loaded, out, options, replace(context, progress=stage), how)
    if how.dry_run:
        steps = [{"name": o.name, "state": o.state, "folder": str(o.folder)} for o in result.outcomes]
        emit(steps, as_json, lambda console: tables.show_outcomes(console, result.outcomes))
        return
    emit(result.to_json(), as_json, lambda console: tables.show_deploy(console, result))
    require_passed(result.passed, result.folder, options.precision)


cli.add_command(cli_flow.run)
cli.add_command(cli_verify.verify)
cli.add_command(cli_verify.bisect)
cli.add_command(cli_verify.report)
cli.add_command(cli_artifact.generate)
cli.add_command(cli_artifact.forecast)
cli.add_command(cli_bench.bench)
cli.add_command(cli_precision.calibrate)
cli.add_command(cli_precision.quantize)
cli.add_command(cli_precision.sensitivity)
cli.add_command(cli_engine.build)
cli.add_command(cli_bundle.bundle)
cli.add_command(cli_plugins.plugins)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")
def doctor(as_json: bool) -> None:
    """Show what is installed, what is missing, and how to install it."""
    from dataclasses import asdict

    from . import tables
    from .doctor import examine

    findings = examine()
    emit([asdict(f) for f in findings], as_json, lambda console: tables.show_doctor(console, findings))
    if any(f.status == "missing" for f in findings):
        raise SetupError("something needed is missing", "see the last column above")


@contextmanager
def debug_log() -> Iterator[None]:
    """Write the package's log to stderr: errors that were handled, with their tracebacks."""
    log, handler = logging.getLogger("xlstm_export"), logging.StreamHandler()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def main(args: list[str] | None = None) -> None:
    """Entry point: run a command; errors become a message and an exit code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    if args is None:  # own process: SIGTERM must clean up as Ctrl-C does
        signal.signal(signal.SIGTERM, _terminated)
    try:
        cli.main(args=arguments, prog_name="xlstm-export", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ExportError as error:
        if debug:
            traceback.print_exc()
        click.secho(f"error: {error.message}", fg="red", err=True)
        if error.hint:
            click.echo(f"  → {error.hint}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was left under the final name", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        click.secho(f"error: unexpected {type(error).__name__}: {error}", fg="red", err=True)
        click.echo("  → this is a bug in xlstm-export; please report it with the output of --debug", err=True)
        sys.exit(ExportError.exit_code)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)  # an exception, so that every `finally` runs


def _spec_json(spec: Any) -> Json:
    from dataclasses import asdict

    from ..bench import roofline

    floors = {name: roofline.floor(spec, target).milliseconds for name, target in TARGETS.items()}
    return {**asdict(spec), "state_elements": spec.state_elements, "fp16_step_floor_ms": floors}


if __name__ == "__main__":
    main()
