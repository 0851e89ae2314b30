"""The last screen of `deploy` and `run`: the verdict and what it rests on, in 24 lines of 80 characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.result import DECODE, EXPORTED
from ..checks import scored
from ..runfolder import RunFolder
from ..verify.precision import drift_at
from .tables_bench import NAMES, format_bytes

if TYPE_CHECKING:
    from ..bench.result import BenchReport, Cell
    from ..checks import Verdict
    from ..pipeline.deploy import Deployment, Variant

MARK = {True: "[green]pass[/]", False: "[bold red]FAIL[/]"}
FAILED = 5  # failed checks that are named; the report has all
WIDTH = 80
HORIZON = 4000  # position at which precisions are compared, or the last one measured before it
DASH = "—"


def show_summary(console: Console, result: Deployment) -> None:
    """Precisions side by side, what was compared, speed, machine, files, and the verdict last."""
    last = result.variants[-1]
    console.print(_precisions(result))
    facts = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    facts.add_row("model", escape(str(RunFolder.open(result.folder).manifest.get("model"))))
    facts.add_row("checked", escape(_checked(last.verification)))
    if last.benchmark is not None:
        facts.add_row("speed", escape(_speed(last.benchmark)))
        facts.add_row("ran on", escape(_machine(last.benchmark)))
    console.print(facts)
    _path(console, "report", last.folder / "report.html")
    if result.bundle is not None:
        _path(console, "bundle", result.bundle)
    failed = next((v for v in result.variants if not v.verification.passed), None)
    if failed is not None:
        _show_failed(console, failed)
    console.print(f"\n[bold]verdict  {MARK[result.passed]}[/] {verdict_line(result)}", highlight=False)


def verdict_line(result: Deployment) -> str:
    """The verdict in words: what passed, or which precision did not and what was left out for it."""
    failed = next((v for v in result.variants if not v.verification.passed), None)
    if failed is None:
        last = result.variants[-1]
        return f"{last.precision} is {_within(last)}"
    return f"{failed.precision} is not {_within(failed)}, so it was not timed"


def _within(variant: Variant) -> str:
    return "within its limits" if variant.verification.precision else "equal to PyTorch"


def _precisions(result: Deployment) -> Table:
    first = result.variants[0]
    metric = next((v.verification.metric for v in result.variants if v.verification.metric), {})
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("precision")
    columns = ["size", "of FP32"]
    if metric:
        columns += [str(metric["name"]), "vs FP32"]
    at = _horizon(result)
    for name in (*columns, f"drift at {at:,}" if at else "drift", "decode"):
        table.add_column(name, justify="right")
    table.add_column("")
    for variant in result.variants:
        table.add_row(variant.precision, *_cells(variant, first, at, bool(metric)))
    return table


def _cells(variant: Variant, first: Variant, at: int, metric: bool) -> list[str]:
    found = variant.verification.metric
    scored = [f"{found['exported']:.4f}" if found else DASH, _change(found.get("drop"))] if metric else []
    drift = drift_at(variant.verification, at)
    step = None if variant.benchmark is None else variant.benchmark.step.timings[EXPORTED].percentile(50)
    return [
        format_bytes(variant.model_bytes),
        f"{variant.model_bytes / first.model_bytes:.2f}×",
        *scored,
        DASH if drift is None else f"{drift:.0e}",
        DASH if step is None else f"{step * 1e3:.3g} ms{_mark(variant)}",
        MARK[variant.verification.passed],
    ]


def _mark(variant: Variant) -> str:
    """A question mark behind times of a busy machine."""
    return "" if variant.benchmark is None or variant.benchmark.trustworthy else "?"


def _horizon(result: Deployment) -> int:
    """The largest horizon up to `HORIZON` at which a precision was measured; 0 if there is none."""
    drifts = [v.verification.precision.get("drift") for v in result.variants]
    found = [row["horizon"] for drift in drifts if drift for row in drift["rows"]]
    return max((h for h in found if h <= HORIZON), default=0)


def _change(drop: float | None) -> str:
    return DASH if drop is None else f"{round(drop, 5) + 0.0:+.3%}"  # no -0.000%


def _checked(verdict: Verdict) -> str:
    against = verdict.precision["reference"] if verdict.precision else "PyTorch in float64"
    amount = f", {scored(verdict.metric)} positions scored" if verdict.metric else ""
    weaker = "; weaker than the recorded verification, whose verdict stays" if verdict.weaker else ""
    made_up = "; calibrated on made-up data" if verdict.precision.get("random_calibration") else ""
    return f"{len(verdict.checks)} checks against {against}, {verdict.inputs}{amount}{made_up}{weaker}"


def _speed(report: BenchReport) -> str:
    if report.busy is not None:
        return f"not known: others used {report.busy:.1f} cores meanwhile; bench again on an idle machine"
    cells = [report.step, *(cell for cell in report.grid if cell.mode != DECODE)][:2]
    return "; ".join(map(_faster, cells))


def _faster(cell: Cell) -> str:
    what = cell.mode if cell.mode == DECODE else f"{cell.mode} of {cell.length}"
    ratios = [
        f"{ratio:.1f}× {NAMES[name]}"
        for name in cell.timings
        if name in cell.through and (ratio := cell.speedup(name)) is not None
    ]
    return f"{what} {', '.join([f'{cell.tokens_per_second():,.0f} tok/s', *ratios])}"


def _machine(report: BenchReport) -> str:
    about = report.environment
    cores = f"{report.threads} of {about.get('cores')} cores"
    return f"this machine: {about.get('cpu')}, {cores}; {about.get('recurrences')}"


def _path(console: Console, label: str, path: object) -> None:
    """A path on one line, whatever its length, so that it can be copied."""
    console.print(f"{label:9}{path}", highlight=False, markup=False, soft_wrap=True)


def _show_failed(console: Console, variant: Variant) -> None:
    failed = [check for check in variant.verification.checks if not check.passed]
    for check in failed[:FAILED]:
        console.print(
            f"{variant.precision}: {check.name} {check.value:.2e} exceeds {check.limit:.1e}",
            highlight=False,
            markup=False,
        )
    if len(failed) > FAILED:
        console.print(f"and {len(failed) - FAILED} more checks", highlight=False)
    for check in failed:
        if advice := check.detail.get("advice"):
            console.print(escape(advice), highlight=False)
    if variant.verification.bisect:
        console.print(escape(variant.verification.bisect["sentence"]), highlight=False)
