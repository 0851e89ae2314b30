"""The command that times an export, or holds two such runs against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import GateError, UsageError
from ..options import BenchOptions, Context
from .common import checkpoint_argument, emit, load_for, run_options, source_options, spinner


def counts(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers from 1 on, such as 1,4")
    return found


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@checkpoint_argument
@source_options
@click.option("--batch", "batch", callback=counts, default="1", show_default=True, help="streams: 1,4")
@click.option(
    "--length", "length", callback=counts, default="512", show_default=True, help="of prefills: 128,512"
)
@click.option(
    "--steps", type=click.IntRange(1), default=200, show_default=True, help="decode calls per contestant"
)
@click.option("--hz", type=click.FloatRange(0, min_open=True), help="also decode at this fixed rate")
@click.option("--no-compile", is_flag=True, help="leave torch.compile out, which takes minutes to compile")
@click.option(
    "--compile-limit", type=click.FloatRange(0), default=240, show_default=True, help="seconds, of all"
)
@click.option("--compile-all", is_flag=True, help="torch.compile at every batch, not only at the first")
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="two runs; A is the baseline"
)
@click.option("--fail-over", type=float, help="of --compare: exit 1 if an exported p50 grew by this factor")
@run_options
def bench(
    run: Path | None,
    checkpoint: str | None,
    module: str | None,
    weights: str | None,
    compare: tuple[Path, Path] | None,
    fail_over: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time a verified run folder against PyTorch (eager, torch.compile) and the memory bandwidth.

    With --compare A B nothing runs: two run folders, or their bench.json, are held against each other.
    """
    if compare is not None:
        if run is not None:
            raise UsageError(f"--compare takes two runs, {run} is a third", "bench --compare A B")
        _compare(*compare, fail_over, as_json)
        return
    if fail_over is not None:
        raise UsageError("--fail-over belongs to --compare", "bench --compare A B --fail-over 1.1")
    if run is None:
        raise UsageError("no run folder is given", "bench RUN, or bench --compare A B")
    from ..bench.bench import bench as bench_
    from ..verify.verdict import require_verified
    from .tables_bench import show_bench

    options["compile_at"] = _compile_at(options.pop("no_compile"), options.pop("compile_all"))
    require_verified(run)
    loaded = load_for(run, checkpoint, module, weights)
    with spinner() as stage:
        threads = options.pop("threads")
        result = bench_(run, loaded, BenchOptions(**options), Context(threads=threads, progress=stage))
    emit(result.to_json(), as_json, lambda console: show_bench(console, result))


def _compile_at(none: bool, all_: bool) -> str:
    if none and all_:
        raise UsageError("--no-compile and --compile-all contradict each other")
    return "none" if none else "all" if all_ else "first"


def _compare(before: Path, after: Path, fail_over: float | None, as_json: bool) -> None:
    from ..bench.compare import compare
    from .tables_bench import show_comparison

    made = compare(before, after, fail_over=fail_over)
    emit(made.to_json(), as_json, lambda console: show_comparison(console, made))
    if not made.passed:
        mode, batch, length = made.slower[0].cell
        raise GateError(
            f"the export is more than {fail_over:g} times slower in {len(made.slower)} cell(s), the first is "
            f"{mode} of {length} at batch {batch}",
            "machines drift: look at PyTorch's ratios beside it, and run both again",
        )
