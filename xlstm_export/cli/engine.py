"""The command that builds a TensorRT engine where there is a GPU; on boards deploy.py does the same."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import BuildOptions
from .common import json_option, stage_options
from .console import emit


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@stage_options(BuildOptions)
@click.option("--dry-run", is_flag=True, help="show what would be built; needs neither TensorRT nor a GPU")
@click.option(
    "--for", "version", help="TensorRT version that --dry-run assumes", default="10.3.0", show_default=True
)
@click.option("--emit-script", is_flag=True, help="print the trtexec command of the same build")
@json_option
def build(
    bundle: Path, options: BuildOptions, dry_run: bool, version: str, emit_script: bool, as_json: bool
) -> None:
    """Build the TensorRT engine of BUNDLE for this machine's GPU.

    An engine belongs to one GPU and one TensorRT; on a board, `python3 deploy.py build` does the same.
    """
    from ..bundle import engine

    if dry_run or emit_script:
        plan = engine.dry_run(bundle, version, options)
        text = plan.command if emit_script else "\n".join(f"{name}: {value}" for name, value in plan.rows())
        emit(plan.to_json(), as_json, lambda console: click.echo(text))
        return
    path = engine.build(bundle, options, say=lambda line: click.echo(line, err=True))
    emit({"engine": str(path)}, as_json, lambda console: console.print(f"[green]built[/] {path}"))
