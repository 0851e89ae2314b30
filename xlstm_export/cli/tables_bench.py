"""Results of `bench`, and the comparison of two runs, as tables for a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.result import BODIES, COMPILED, DECODE, EAGER, EXPORTED, BenchReport, Cell

if TYPE_CHECKING:
    from ..bench.compare import Comparison

NAMES = {
    EXPORTED: "exported",
    BODIES: "function bodies",
    EAGER: "PyTorch eager",
    COMPILED: "torch.compile",
}


def show_bench(console: Console, report: BenchReport) -> None:
    """Latency of each contestant in each cell, share of the bandwidth roof, rate, memory, the machine."""
    columns = ("min", "p50", "p99", "p99.9", "max")
    table = Table("ms per call", box=None, padding=(0, 1, 0, 0))
    for name in (*columns, "tok/s", "×"):
        table.add_column(name, justify="right")
    doubtful = "" if report.trustworthy else "?"
    for cell in report.grid:
        table.add_row(f"[bold]{_title(cell.mode, cell.batch, cell.length)}[/]")
        for name, timing in cell.timings.items():
            figures = timing.to_json()
            times = [_ms(figures[f"{column}_ms"]) for column in columns]
            rate, ratio = f"{cell.tokens_per_second(name):,.0f}", f"{cell.speedup(name):.2f}{doubtful}"
            table.add_row(f"  {NAMES[name]}", *times, rate, ratio)
    console.print(table)
    for cell in report.grid:
        if cell.mode == DECODE:
            console.print(_roof(cell))
    if report.rate is not None:
        console.print(_rate(report.rate))
    console.print(_memory(report.memory))
    for name, why in report.skipped.items():
        console.print(f"no {NAMES[name]}: {escape(why)}", highlight=False)
    console.print(_machine(report))
    if report.busy is not None:
        console.print(
            f"[bold red]other processes used this machine[/] ({report.busy:.1f} cores): times, and ratios "
            "with a ?, do not count; measure again when it is idle"
        )


def show_comparison(console: Console, made: Comparison) -> None:
    """Ratios per cell and contestant, cells of one run only, and differences between the machines."""
    console.print(f"A {made.before}\nB {made.after}; ratios are B / A, above 1 is slower", highlight=False)
    table = Table("ms per call", box=None, padding=(0, 1, 0, 0))
    for name in ("A p50", "B p50", "ratio", "A p99", "B p99", "ratio"):
        table.add_column(name, justify="right")
    cell = None
    for row in made.rows:
        if row.cell != cell:
            cell = row.cell
            table.add_row(f"[bold]{_title(*cell)}[/]")
        p50, p99 = (
            [_ms(a), _ms(b), f"{b / a:.2f}" if made.trustworthy else "—"]
            for a, b in ((row.p50_a, row.p50_b), (row.p99_a, row.p99_b))
        )
        slower = made.fail_over is not None and row.slower_than(made.fail_over)
        p50[2] = f"[bold red]{p50[2]}[/]" if slower else p50[2]
        table.add_row(f"  {escape(NAMES.get(row.contestant, row.contestant))}", *p50, *p99)
    console.print(table)
    for side, only in (("A", made.only_before), ("B", made.only_after)):
        for mode, batch, length, name in only:
            console.print(
                f"only in {side}: {_title(mode, batch, length)}, {NAMES.get(name, name)}", markup=False
            )
    for side, cores in zip("AB", made.busy, strict=True):
        if cores is not None:
            console.print(
                f"[bold red]others used {cores:.1f} cores while {side} was timed[/]: ratios do not count"
                + ("" if made.trustworthy else "; --allow-busy shows them")
            )
    if not made.differences:
        console.print("the same machine, versions and settings")
        return
    different = Table("differs", "A", "B", box=None, padding=(0, 1, 0, 0))
    for key, (one, other) in made.differences.items():
        different.add_row(escape(key), escape(_text(one)), escape(_text(other)))
    console.print(different)


def format_bytes(count: float) -> str:
    """A size with three digits and a decimal unit (10³ based)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _title(mode: str, batch: int, length: int) -> str:
    return f"{mode}, batch {batch}" if mode == DECODE else f"{mode} {length}, batch {batch}"


def _ms(value: float) -> str:
    """Milliseconds with at least four digits."""
    return f"{value:.{max(0, 4 - len(str(int(value))))}f}"


def _roof(cell: Cell) -> str:
    return (
        f"batch {cell.batch}: a step moves {format_bytes(cell.moved_bytes)} at {cell.achieved_gbs:.1f} GB/s, "
        f"{cell.roof_share:.0%} of the {cell.bandwidth_gbs:.1f} GB/s measured beside it"
    )


def _rate(rate: dict[str, float]) -> str:
    return (
        f"at {rate['hz']:g} Hz: done {_ms(rate['p50_ms'])} ms after due (p50), {_ms(rate['p99_ms'])} (p99), "
        f"{_ms(rate['max_ms'])} (max); jitter {_ms(rate['jitter_ms'])} ms; "
        f"{rate['late']} of {rate['calls']} late"
    )


def _memory(memory: dict[str, int | None]) -> str:
    names = {
        "rss_bytes": "resident",
        "peak_rss_bytes": "at most",
        "weight_bytes": "weights",
        "state_bytes_per_stream": "state per stream",
    }
    parts = [
        f"{text} {format_bytes(size)}"
        for name, text in names.items()
        if (size := memory.get(name)) is not None
    ]
    return f"memory of a process with the export alone: {', '.join(parts)}"


def _machine(report: BenchReport) -> str:
    about = report.environment
    eager = next((cell.through[EAGER] for cell in report.grid if EAGER in cell.through), "—")
    return escape(
        f"{report.threads} threads of {about.get('cores')} cores, {about.get('cpu')}; "
        f"{about.get('recurrences')}; eager through {eager}"
    )


def _text(value: Any) -> str:
    if value is None:
        return "—"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
