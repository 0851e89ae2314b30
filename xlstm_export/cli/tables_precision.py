"""Tables of the precision stages for the terminal: ranges, drift, precisions side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..measure.drift_result import TEACHER
from ..plot.names import shortened_apart
from ..specs import Json

if TYPE_CHECKING:
    from ..calibration.scales import Scales
    from ..checks import Verdict
    from ..sensitivity import Sensitivity
    from ..sensitivity.search import Candidate

ALONE = 16  # weights that are shown, the most harmful first
NAME = 36  # characters of a weight's path in a table
TRENDS = 8  # tensors that are shown, those whose range changes most


def show_scales(console: Console, scales: Scales, names: Mapping[str, str]) -> None:
    """The observed ranges, and the activations whose range changes most along a sequence.

    Args:
        console: where to print.
        scales: ranges by value of the graph.
        names: what these values are to the user; see `graph.sites.activation_names`.
    """
    from ..calibration.scales import trend

    style = "bold red" if scales.data.get("random") else None
    console.print(scales_line(scales), style=style, markup=False, highlight=False)
    rows = trend(scales)[:TRENDS]
    if not rows:
        return
    # A column per bucket does not fit 80 characters; the report has them all.
    table = Table("input of", box=None, padding=(0, 2, 0, 0))
    for column in ("first", "largest", "last", "rms last/first"):
        table.add_column(column, justify="right")
    shown = shortened_apart([names.get(row.name, row.name) for row in rows], NAME)
    for name, row in zip(shown, rows, strict=True):
        largest = max(x for x in scales.tensors[row.name].by_position if x is not None)
        cells = (row.amax_first, largest, row.amax_last)
        table.add_row(name, *(f"{x:.3g}" for x in cells), f"{row.rms_ratio:.2f}")
    console.print("largest magnitudes along a sequence, those first that change most:")
    console.print(table)


def scales_line(scales: Scales) -> str:
    """What was observed, and on what."""
    data = scales.data
    origin = "made-up data" if data.get("random") else data.get("name", "")
    amount = f"{data.get('samples')} sequences, {data.get('positions'):,} positions"
    return f"{len(scales.tensors)} activations, method {scales.method}, {origin}: {amount}"


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
    worst = sorted(found.alone.items(), key=lambda item: -item[1].harm)[:ALONE]
    shown = shortened_apart([name for name, _ in worst], NAME)
    for short, (name, candidate) in zip(shown, worst, strict=True):
        table.add_row(short, *_evidence(candidate), found.choices[name])
    console.print(table)
    summary = Table("recipe", f"{found.metric} drop", "drift", "state", "growth", "bytes")
    rows = {"base type": found.base, "naive": found.general, "preset": found.default, "found": found.found}
    for name, candidate in rows.items():
        summary.add_row(name, *_evidence(candidate), f"{candidate.measured.bytes / 1e6:.2f} MB")
    console.print(summary)
    if found.excluded:
        console.print(f"left in the base type: {', '.join(found.excluded)}")


def _evidence(candidate: Candidate) -> list[str]:
    m = candidate.measured
    return [f"{candidate.drop:+.3%}", f"{m.drift:.1e}", f"{m.state_drift:.1e}", f"{m.growth:.2f}×"]


def _series(drift: Json) -> dict[tuple[str, int | None, str], dict[int, float]]:
    """Outputs in both modes, and the states of each block as their worst tensor, teacher-forced."""
    found: dict[tuple[str, int | None, str], dict[int, float]] = {}
    for row in drift["rows"]:
        if row["block"] is None or row["mode"] == TEACHER:
            key = (row["mode"], row["block"], row["tensor"])
            found.setdefault(key, {})[row["horizon"]] = row["error"]
    return found
