"""Commands of bundles: bundle, and its verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..targets import TARGETS
from .common import command_line, emit, load_for, run_argument, source_options, spinner

json_option = click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")


class _Bundle(click.Group):
    """`bundle RUN` makes one; other subcommands have a name."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["make", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Bundle, short_help="Make a bundle of RUN for a board, or verify one.")
def bundle() -> None:
    """Make a bundle of a run folder for a board, or verify one.

    \b
    xlstm-export bundle RUN [options]     see `bundle make --help`
    xlstm-export bundle verify PATH
    """


@bundle.command()
@run_argument
@click.argument("checkpoint", required=False)
@source_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="folder or .tar.gz; RUN/bundle by default")
@click.option("--target", type=click.Choice(list(TARGETS)), help="the board it is meant for")
@click.option("--data", type=click.Path(path_type=Path), help="held-out data for the recorded streams")
@click.option("--calib", help="calibration data, to record streams of where there is no --data")
@click.option("--horizon", default=2048, help="positions of the recorded stream")
@click.option("--license", "licence", help="of the weights, as an SPDX identifier")
@click.option("--force", is_flag=True, help="replace an existing bundle")
@json_option
def make(
    run: Path,
    checkpoint: str | None,
    module: str | None,
    weights: str | None,
    out: Path | None,
    target: str | None,
    data: Path | None,
    calib: str | None,
    horizon: int,
    licence: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a bundle of RUN for a board: graph, plugins, recorded streams, deploy.py."""
    from ..pipeline import stages

    loaded = load_for(run, checkpoint, module, weights)
    with spinner() as progress:
        made = stages.bundle(
            run,
            loaded,
            out or run / "bundle",
            target=TARGETS[target] if target else None,
            data=data,
            calib=calib,
            horizon=horizon,
            licence=licence,
            force=force,
            command=command_line(),
            progress=progress,
        )
    emit({"bundle": str(made)}, as_json, lambda console: console.print(f"[green]bundle[/] {made}"))


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Compare every file of a bundle, folder or archive, with its manifest."""
    from ..bundle import make as bundles

    manifest = bundles.verify_bundle(path)
    text = f"[green]intact[/] {manifest['model']}, {manifest['precision']}, {len(manifest['files'])} files"
    emit(manifest, as_json, lambda console: console.print(text))
