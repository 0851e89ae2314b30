"""The command that builds a TensorRT engine where there is a GPU; on boards deploy.py does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import emit


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--max-length", default=512, show_default=True, help="most positions of a prefill call")
@click.option("--max-batch", default=1, show_default=True, help="most streams of a call")
@click.option("--workspace", type=int, help="memory for the builder, MiB; default: half of the free memory")
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), help="optimization level of TensorRT's builder"
)
@click.option("--function-bodies", is_flag=True, help="build without the plugin")
@click.option("--dry-run", is_flag=True, help="show what would be built; needs neither TensorRT nor a GPU")
@click.option(
    "--for", "version", help="TensorRT version that --dry-run assumes", default="10.3.0", show_default=True
)
@click.option("--emit-script", is_flag=True, help="print the trtexec command of the same build")
@click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")
def build(
    bundle: Path, dry_run: bool, version: str, emit_script: bool, as_json: bool, **options: Any
) -> None:
    """Build the TensorRT engine of BUNDLE for this machine's GPU.

    An engine belongs to one GPU and one TensorRT; on a board, `python3 deploy.py build` does the same.
    """
    from ..bundle import engine

    if dry_run or emit_script:
        plan = engine.dry_run(bundle, version, **options)
        text = plan.command if emit_script else "\n".join(f"{name}: {value}" for name, value in plan.rows())
        emit(plan.to_json(), as_json, lambda console: click.echo(text))
        return
    path = engine.build(bundle, say=lambda line: click.echo(line, err=True), **options)
    emit({"engine": str(path)}, as_json, lambda console: console.print(f"[green]built[/] {path}"))
