"""Commands of the native kernels: plugins build, list, test."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import GateError
from .common import FROM_0
from .console import emit, progress_bar

json_option = click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")
only_option = click.option(
    "--only", metavar="KIND,…", help="ort-cpu, cuda, tensorrt, tensorrt-register, ort-cuda"
)


@click.group()
def plugins() -> None:
    """Build, list and test the fused kernels of the recurrences, for ONNX Runtime and TensorRT.

    Exports run without them, but slower.
    """


@plugins.command()
@only_option
@click.option("--sm", help="GPUs to build for, as 87,110; default: this machine's, else all targets")
@click.option("--cuda", type=click.Path(path_type=Path), help="CUDA toolkit; default: search for one")
@click.option(
    "--tensorrt", type=click.Path(path_type=Path), help="folder of an unpacked TensorRT; its headers are used"
)
@json_option
def build(only: str | None, sm: str | None, cuda: Path | None, tensorrt: Path | None, as_json: bool) -> None:
    """Compile into the cache the kinds that this machine can build, or those of --only."""
    from ..plugins import build as builder
    from ..plugins.toolchain import parse_sms
    from . import tables_plugins as report_plugins

    sms = parse_sms(sm) if sm is not None else ()
    with progress_bar("compiling") as progress:
        libraries = builder.build(_kinds(only), sms=sms, cuda=cuda, tensorrt=tensorrt, progress=progress)
    data = [library.to_json() for library in libraries]
    emit(data, as_json, lambda console: report_plugins.show_built(console, libraries))


@plugins.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """Show what is built, for which target, whether it is up to date, and whether it loads."""
    from ..plugins.inventory import inventory
    from . import tables_plugins as report_plugins

    entries = inventory()
    data = [entry.to_json() for entry in entries]
    emit(data, as_json, lambda console: report_plugins.show_inventory(console, entries))


@plugins.command()
@only_option
@click.option("--seed", type=FROM_0, default=0, help="seed of the random calls")
@json_option
def test(only: str | None, seed: int, as_json: bool) -> None:
    """Compare the built libraries that can run here with the recurrence in float64."""
    from ..plugins.selftest import selftest
    from . import tables_plugins as report_plugins

    checks = selftest(_kinds(only), seed=seed)
    emit([c.to_json() for c in checks], as_json, lambda console: report_plugins.show_checks(console, checks))
    if any(check.status == "fail" for check in checks):
        raise GateError(
            "a library does not compute the recurrence", "xlstm-export plugins list shows its origin"
        )


def _kinds(only: str | None) -> list[str] | None:
    return None if only is None else [kind.strip() for kind in only.split(",")]
