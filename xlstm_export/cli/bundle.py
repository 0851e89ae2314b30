"""Commands of bundles: make one, verify one."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ..board.signature import RECORDED, recorded_key
from ..options import BundleOptions, Context
from ..runfolder import RunFolder
from ..targets import require_target
from .common import Source, command_line, json_option, run_argument, source_options, stage_options
from .console import emit, spinner


class _Bundle(click.Group):
    """A group whose default subcommand is `make`, so that `bundle RUN` makes a bundle."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
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
@source_options
@stage_options(BundleOptions)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="folder or .tar.gz to create; default: RUN/bundle"
)
@click.option("--force", is_flag=True, help="replace an existing bundle")
@json_option
def make(
    run: Path, source: Source, options: BundleOptions, out: Path | None, force: bool, as_json: bool
) -> None:
    """Make a bundle of RUN for a board: graph, plugins, recorded streams, deploy.py.

    The streams are recorded on the data of the last verification, unless others are given or --anew is.
    """
    from ..pipeline import recorded, stages

    require_target(options.target)
    opened = RunFolder.open(run)
    given, options = options, recorded.with_data(opened, options)
    if options != given:
        found = ["--calib", str(options.calib)] if options.data is None else ["--data", str(options.data)]
        click.echo(f"as recorded: {shlex.join(found)}", err=True)
    loaded = source.load_for(opened, options)
    with spinner() as progress:
        context = Context(command=command_line(), progress=progress)
        made = stages.bundle(opened, loaded, out, options, context, force=force)
    emit({"bundle": str(made)}, as_json, lambda console: console.print(f"[green]bundle[/] {made}"))


@bundle.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help=f"PEM file of the key that it must be signed with; default: ${RECORDED}",
)
@json_option
def verify(path: Path, public_key: Path | None, as_json: bool) -> None:
    """Compare every file of a bundle, folder or archive, with its manifest, and check its signature."""
    from ..bundle.archive import verify_bundle

    key = public_key or recorded_key()
    manifest = verify_bundle(path, key)
    trust = "its signature was not checked (--public-key)" if key is None else f"signed, as {key} shows"
    about = f"{manifest['model']}, {manifest['precision']}, {len(manifest['files'])} files"
    text = f"[green]intact[/] {about}; {trust}"
    emit(manifest, as_json, lambda console: console.print(text))
