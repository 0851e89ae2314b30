"""The command that times an export, or compares two timed runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from ..errors import GateError, UsageError
from ..options import BenchOptions, Context
from ..runfolder import RunFolder
from .common import Command, Source, context_options, json_option, source_options, stage_options
from .console import emit, spinner


def _compile_flags(command: Command) -> Command:
    """Adds the flags that say at which batches torch.compile runs; `compile_at` of the options."""

    @functools.wraps(command)
    def wrapped(*args: Any, compile_first: bool, compile_all: bool, no_compile: bool, **others: Any) -> Any:
        if no_compile and (compile_all or compile_first):
            raise UsageError(
                f"--no-compile and {'--compile-all' if compile_all else '--compile'} contradict each other"
            )
        at = "all" if compile_all else "first" if compile_first else "none"
        return command(*args, compile_at=at, **others)

    every = click.option(
        "--compile-all", is_flag=True, help="time torch.compile at every batch, not only the first"
    )
    first = click.option(
        "--compile",
        "compile_first",
        is_flag=True,
        help="also time torch.compile, which takes minutes to compile",
    )
    none = click.option("--no-compile", is_flag=True, hidden=True)  # the default, once an option
    return first(every(none(wrapped)))


@dataclass(frozen=True)
class _Comparison:
    """Two runs whose times are compared; `before` is the baseline."""

    before: Path
    after: Path
    fail_over: float | None
    allow_busy: bool


def _comparison(command: Command) -> Command:
    """Adds the options of a comparison; the command gets them as `comparison`, None without --compare."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        compare: tuple[Path, Path] | None,
        fail_over: float | None,
        allow_busy: bool,
        **others: Any,
    ) -> Any:
        if compare is None and (fail_over is not None or allow_busy):
            flag = "--allow-busy" if fail_over is None else "--fail-over"
            raise UsageError(f"{flag} belongs to --compare", "bench --compare A B --fail-over 1.1")
        found = None if compare is None else _Comparison(*compare, fail_over, allow_busy)
        return command(*args, comparison=found, **others)

    runs = click.option(
        "--compare",
        nargs=2,
        type=click.Path(path_type=Path),
        metavar="A B",
        help="two runs; A is the baseline",
    )
    fail = click.option(
        "--fail-over",
        type=float,
        help="with --compare: exit 1 if the median of an export grew by more than this factor",
    )
    busy = click.option(
        "--allow-busy",
        is_flag=True,
        help="with --compare: use times although others used the machine meanwhile",
    )
    return runs(fail(busy(wrapped)))


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@source_options
@_compile_flags
@stage_options(BenchOptions, leave=("compile_at",))
@_comparison
@context_options()
@json_option
def bench(
    run: Path | None,
    source: Source,
    options: BenchOptions,
    context: Context,
    comparison: _Comparison | None,
    as_json: bool,
) -> None:
    """Time a verified run folder against PyTorch (eager, torch.compile) and the memory bandwidth.

    With --compare A B nothing is timed: two run folders, or their bench.json, are compared.
    """
    if comparison is not None:
        if run is not None:
            raise UsageError(f"--compare takes two runs, {run} is a third", "bench --compare A B")
        _compare(comparison, as_json)
        return
    if run is None:
        raise UsageError("no run folder is given", "bench RUN, or bench --compare A B")
    from ..pipeline import stages
    from ..verify.verdict import require_verified
    from .tables_bench import show_bench

    opened = RunFolder.open(run)
    require_verified(opened)
    loaded = source.load_for(opened)
    with spinner() as stage:
        result = stages.bench(opened, loaded, options, replace(context, progress=stage))
    emit(result.to_json(), as_json, lambda console: show_bench(console, result))


def _compare(of: _Comparison, as_json: bool) -> None:
    from ..bench.compare import compare
    from .tables_bench import show_comparison

    made = compare(of.before, of.after, fail_over=of.fail_over, allow_busy=of.allow_busy)
    emit(made.to_json(), as_json, lambda console: show_comparison(console, made))
    if not made.passed:
        mode, batch, length = made.slower[0].cell
        raise GateError(
            f"the export is more than {of.fail_over:g} times slower in {len(made.slower)} cell(s), "
            f"the first is {mode} of {length} at batch {batch}",
            "the machine may be slower: compare PyTorch's ratios in the same table, and run both again",
        )
