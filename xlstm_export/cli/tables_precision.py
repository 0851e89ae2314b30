"""Tables of the precision stages for the terminal: ranges, drift, precisions side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..bench.result import EXPORTED
from ..measure.drift_result import TEACHER
from ..specs import Json
from ..verify.precision import drift_at

if TYPE_CHECKING:
    from ..calibration.scales import Scales
    from ..checks import Verdict
    from ..pipeline.deploy import Deployment, Variant
    from ..sensitivity import Sensitivity
    from ..sensitivity.search import Candidate

ALONE = 16  # weights that are shown, the most harmful first
NAME = 28  # characters of a weight's path in a table
TRENDS = 8  # tensors that are shown, those whose range changes most
DRIFT_HORIZON = 4000


def show_scales(console: Console, scales: Scales) -> None:
    """The observed ranges, and the activations whose range changes most along a sequence."""
    from ..calibration.scales import bucket_labels, trend

    data = scales.data
    origin = "[bold red]made-up data[/]" if data.get("random") else data.get("name", "")
    amount = f"{data.get('samples')} sequences, {data.get('positions'):,} positions"
    console.print(f"{len(scales.tensors)} activations, method {scales.method}, {origin}: {amount}")
    rows = trend(scales)[:TRENDS]
    if not rows:
        return
    labels = bucket_labels(scales.borders)
    table = Table("activation", *labels, "rms last/first", title="largest magnitude by position")
    for row in rows:
        by_position = scales.tensors[row.name].by_position
        cells = ["—" if x is None else f"{x:.3g}" for x in by_position]
        table.add_row(row.name, *cells, f"{row.rms_ratio:.2f}")
    console.print(table)


def show_precision(console: Console, report: Verdict) -> None:
    """Precision, base and sites of a half or quantized export, and its drift along one stream."""
    about = report.precision
    sites = ", ".join(f"{count} {kind}" for kind, count in about["sites"].items())
    console.print(f"{about['precision']} on {about['base']} ({sites}) against {about['reference']}")
    if about["random_calibration"]:
        console.print("[bold red]calibrated on made-up data[/]")
    for what in about["forced"]:
        console.print(f"[bold red]forced:[/] {what}")
    drift = about["drift"]
    if not drift:
        return
    horizons = sorted({row["horizon"] for row in drift["rows"]})
    table = Table("relative L2 at position", *(f"{h:,}" for h in horizons), "growth", title="drift from FP32")
    for (mode, block, tensor), errors in _series(drift).items():
        name = tensor if block is None else f"block {block} {tensor}"
        growth = drift["growth"].get(f"{mode}: {name}")
        cells = [f"{errors[h]:.1e}" if errors.get(h) is not None else "—" for h in horizons]
        table.add_row(f"{mode}: {name}", *cells, "—" if growth is None else f"{growth:.2f}×")
    console.print(table)
    if drift["repeated"]:
        console.print(
            f"the data ({drift['positions']:,} positions) were repeated: they are shorter than the horizon"
        )


def show_sensitivity(console: Console, found: Sensitivity) -> None:
    """The harm of each weight alone, largest first, and the recipe beside those that need no search."""
    table = Table("alone", "drop", "drift", "state", "growth", "kept as", title="each weight alone")
    for name, candidate in sorted(found.alone.items(), key=lambda item: -item[1].harm)[:ALONE]:
        table.add_row(_short(name), *_evidence(candidate), found.choices[name])
    console.print(table)
    summary = Table("recipe", f"{found.metric} drop", "drift", "state", "growth", "bytes")
    rows = {"base type": found.base, "naive": found.general, "preset": found.default, "found": found.found}
    for name, candidate in rows.items():
        summary.add_row(name, *_evidence(candidate), f"{candidate.measured.bytes / 1e6:.2f} MB")
    console.print(summary)
    if found.excluded:
        console.print(f"left in the base type: {', '.join(found.excluded)}")


def _short(name: str) -> str:
    """The end of a path, which is what distinguishes it from others."""
    return name if len(name) <= NAME else "…" + name[-NAME + 1 :]


def _evidence(candidate: Candidate) -> list[str]:
    m = candidate.measured
    return [f"{candidate.drop:+.3%}", f"{m.drift:.1e}", f"{m.state_drift:.1e}", f"{m.growth:.2f}×"]


def show_variants(console: Console, result: Deployment) -> None:
    """Precisions side by side: size, task metric, drift, latency."""
    metric = _metric_name(result)
    table = Table("precision", "size", "of FP32", metric, "vs FP32", "drift at 4k", "step p50", "")
    first = result.variants[0]
    for variant in result.variants:
        table.add_row(*_cells(variant, first))
    console.print(table)


def _metric_name(result: Deployment) -> str:
    """Name of the task metric, or "task metric" where there is none."""
    return str(result.variants[0].verification.metric.get("name", "task metric"))


def _cells(variant: Variant, first: Variant) -> list[str]:
    metric, drift = variant.verification.metric, drift_at(variant.verification, DRIFT_HORIZON)
    drop = metric.get("drop")
    step = variant.benchmark.step.timings[EXPORTED].percentile(50) * 1e3 if variant.benchmark else None
    return [
        variant.precision,
        f"{variant.model_bytes / 1e6:.2f} MB",
        f"{variant.model_bytes / first.model_bytes:.2f}×",
        f"{metric['exported']:.4f}" if metric else "—",
        "—" if drop is None else f"{drop:+.3%}",
        "—" if drift is None else f"{drift:.1e}",
        "—" if step is None else f"{step:.2f} ms",
        "[green]pass[/]" if variant.verification.passed else "[bold red]FAIL[/]",
    ]


def _series(drift: Json) -> dict[tuple[str, int | None, str], dict[int, float]]:
    """Outputs in both modes, and the states of each block as their worst tensor, teacher-forced."""
    found: dict[tuple[str, int | None, str], dict[int, float]] = {}
    for row in drift["rows"]:
        if row["block"] is None or row["mode"] == TEACHER:
            key = (row["mode"], row["block"], row["tensor"])
            found.setdefault(key, {})[row["horizon"]] = row["error"]
    return found
