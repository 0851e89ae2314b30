"""The command line. A command parses, calls one library function per stage, and prints the result."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..atomic import of_the_system
from ..errors import ExportError, InputError, SetupError
from ..options import Context, DeployOptions, ExportOptions, How
from ..runfolder import MANIFEST
from ..specs import Json
from ..targets import TARGETS, require_target
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
    emit_written,
    force_option,
    json_option,
    out_option,
    require_passed,
    source_options,
    stage_options,
)
from .console import Commands, emit, keep_on, no_color, open_pipe, prepare_streams, quiet_libraries, spinner

log = logging.getLogger(__name__)

INTERRUPTED = 130  # what shells report for Ctrl-C


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Put trained xLSTM models on edge devices: streaming ONNX, proven equal to PyTorch.

    Exit codes: 0 pass, 1 gate failed, 2 usage, 3 environment, 4 bad input, 5 build.
    """


@click.command()
@source_options
@json_option
def inspect(source: Source, as_json: bool) -> None:
    """Show blocks, states and the roofline of CHECKPOINT, the tensors of a run folder, or a model.onnx."""
    from .. import runfolder

    path = source.checkpoint
    if path is not None and path.endswith(".onnx"):
        if not Path(path).exists():
            raise InputError(f"{path} does not exist", "give the model.onnx of an export")
        from ..graph import info as graph_info
        from . import tables

        info = graph_info.graph_info(Path(path))
        emit(info.to_json(), as_json, lambda console: tables.show_graph(console, info))
        return
    if path is not None and (Path(path) / runfolder.IO).is_file():
        from . import tables

        io = runfolder.RunFolder.open(path).io
        emit(io.to_json(), as_json, lambda console: tables.show_io(console, io))
        return
    source.require()
    from ..lift.model import spec_of
    from . import tables

    spec = spec_of(source.load())
    emit(_spec_json(spec), as_json, lambda console: tables.show_model(console, spec))


@click.command()
@source_options
@out_option
@force_option
@stage_options(ExportOptions)
@json_option
def export(source: Source, out: Path, force: bool, options: ExportOptions, as_json: bool) -> None:
    """Export CHECKPOINT (or --module) to ONNX in a new run folder."""
    from ..atomic import require_free
    from ..pipeline import stages

    source.require()
    require_free(out, MANIFEST, force)

    with spinner() as stage:
        stage("loading")
        loaded = source.load(options.stateless, stage)
        context = Context(command=command_line(), progress=stage)
        folder = stages.export(loaded, out, options, context, force=force)
    emit_written(folder, as_json)


@click.command()
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
    from ..pipeline.plan import require_out

    source.require()
    require_out(out, how)
    require_target(options.target)
    from ..pipeline.deploy import deploy as deploy_
    from . import summary, tables

    with spinner() as stage:
        stage("loading")
        loaded = source.load(progress=stage)
        result = deploy_(loaded, out, options, replace(context, progress=stage), how)
    if how.dry_run:
        steps = [{"name": o.name, "state": o.state, "folder": str(o.folder)} for o in result.outcomes]
        emit(steps, as_json, lambda console: tables.show_outcomes(console, result.outcomes))
        return
    emit(
        result.to_json(),
        as_json,
        lambda console: summary.show_summary(console, result),
        details=lambda console: tables.show_deploy(console, result),
        line=summary.verdict_line(result),
    )
    require_passed(result.passed, result.folder, options.precision)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")
def doctor(as_json: bool) -> None:
    """Show what is installed, what is missing, and how to install it."""
    from dataclasses import asdict

    from . import tables
    from .doctor import examine

    findings = examine()
    emit([asdict(f) for f in findings], as_json, lambda console: tables.show_doctor(console, findings))
    if any(f.status == "missing" for f in findings):
        raise SetupError("something needed is missing", "see the lines marked missing")


cli.add("All stages", deploy, cli_flow.run)
cli.add("Model", inspect, export)
cli.add("Precision", cli_precision.calibrate, cli_precision.sensitivity, cli_precision.quantize)
cli.add("Evidence", cli_verify.verify, cli_verify.bisect, cli_bench.bench, cli_verify.report)
cli.add("Use", cli_artifact.generate, cli_artifact.forecast)
cli.add("Board", cli_bundle.bundle, cli_engine.build, cli_plugins.plugins)
cli.add("This machine", doctor)


def main(args: list[str] | None = None) -> None:
    """Entry point: run a command; errors become a message and an exit code."""
    arguments = sys.argv[1:] if args is None else args
    if args is None:  # own process: SIGTERM must clean up as Ctrl-C does
        signal.signal(signal.SIGTERM, _terminated)
        # Imports and traces make objects that stay: looking through them often takes a sixth of a deploy.
        gc.set_threshold(50_000, 20, 10)
        keep_on()
    prepare_streams()
    quiet_libraries()
    color = no_color()
    try:
        with open_pipe():
            cli.main(args=arguments, prog_name="xlstm-export", standalone_mode=False, color=color)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ExportError as error:
        _show_error(error.message, error.hint, color)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was left under the final name", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        log.debug("not expected", exc_info=True)
        if isinstance(error, OSError) and (found := of_the_system(error)) is not None:
            _show_error(found.message, found.hint, color)
            sys.exit(found.exit_code)
        _show_error(*_unexpected(error), color)
        sys.exit(ExportError.exit_code)


def _unexpected(error: Exception) -> tuple[str, str]:
    """Message and hint of an exception that no stage expected."""
    from ..load.user_code import comes_from_user, described

    if comes_from_user(error):
        return f"your code raised {described(error)}", "--debug shows the traceback"
    hint = "this is a bug in xlstm-export; please report it with the output of --debug"
    return f"unexpected {type(error).__name__}: {error}", hint


def _show_error(message: str, hint: str | None, color: bool | None) -> None:
    click.echo(click.style(f"error: {message}", fg="red"), err=True, color=color)
    if hint:
        click.echo(f"  → {hint}", err=True)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)  # an exception, so that every `finally` runs


def _spec_json(spec: Any) -> Json:
    from dataclasses import asdict

    from ..bench import roofline

    floors = {name: roofline.floor(spec, target).milliseconds for name, target in TARGETS.items()}
    return {**asdict(spec), "state_elements": spec.state_elements, "fp16_step_floor_ms": floors}


if __name__ == "__main__":
    main()
