"""Comparison of two runs: verdicts, metric, the checks that changed most, drift, latency."""

from __future__ import annotations

import math

from ..measure.drift_result import TEACHER
from ..plot.figures import Line, LinePlot
from .data import RunData
from .document import Document, Fact, Section, Table, Value
from .glossary import glossary
from .headline import busy, model_bytes, precise
from .measured import CONTESTANTS, cell_name, drift_lines

MOST = 40  # most checks that are listed


def comparison(a: RunData, b: RunData) -> Document:
    """The document of `report --compare`; A is the run that B is compared with."""
    facts = tuple(Fact(label, _about(run)) for label, run in (("A", a), ("B", b)))
    words = {True: "passed", False: "failed", None: "is not verified"}
    verdict = f"A {words[a.passed]}, B {words[b.passed]}"
    both = [run.passed for run in (a, b)]
    passed = None if None in both else all(both)
    sections: list[Section] = [_summary(a, b), _checks(a, b), _drift(a, b), _latency(a, b)]
    return Document("Two runs compared", verdict, passed, (), facts, [*sections, glossary(sections)])


def _about(run: RunData) -> str:
    """Which run it is; for one that is not verified, why, and what helps."""
    what = f"{run.folder.path}, {run.precision}"
    if run.evidence is not None:
        return what
    why = "not verified" if run.verification is None else "its files changed after it was verified"
    text = f"{what}: {why}, so only size and speed are compared; "
    return text + f"run `xlstm-export verify {run.folder.path}`"


def _summary(a: RunData, b: RunData) -> Section:
    rows: list[tuple[Value, ...]] = [
        ("model", *(str(run.folder.manifest.get("model")) for run in (a, b))),
        ("precision", a.precision, b.precision),
        ("verdict", a.passed, b.passed),
        ("bytes of weights and graph", model_bytes(a.folder), model_bytes(b.folder)),
    ]
    metrics = [(run.evidence or {}).get("metric") or {} for run in (a, b)]
    if any(metrics):
        name = next(m["name"] for m in metrics if m)
        rows.append((name, *(precise(m.get("exported")) if m else None for m in metrics)))
    return Section("Summary", tables=(Table("Both runs", ("", "A", "B"), tuple(rows)),))


def _checks(a: RunData, b: RunData) -> Section:
    known = [{c["name"]: c for c in (run.evidence or {}).get("checks", [])} for run in (a, b)]
    rows: list[tuple[Value, ...]] = []
    for name in [n for n in known[0] if n in known[1]]:
        x, y = (side[name]["value"] for side in known)
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and (x or y):
            rows.append((name, float(x), float(y), y / x if x else math.inf, bool(known[1][name]["passed"])))
    rows.sort(key=lambda row: -abs(math.log(max(float(row[3] or 0), 1e-300))))
    only = sum(len(set(known[i]) - set(known[1 - i])) for i in (0, 1))
    text = (f"{only} checks are in one of the runs only.",) if only else ()
    columns = ("check", "A", "B", "B ÷ A", "B passes")
    return Section("Checks that moved most", text, tables=(Table("Checks", columns, tuple(rows[:MOST])),))


def _drift(a: RunData, b: RunData) -> Section:
    lines = []
    for label, run in (("A", a), ("B", b)):
        found = ((run.evidence or {}).get("precision") or {}).get("drift")
        for line in drift_lines(found, TEACHER) if found else []:
            if not line.dashed and not line.name.startswith("block"):
                lines.append(Line(f"{label}, {line.name}", line.xs, line.ys, dashed=label == "B"))
    if not lines:
        return Section("Drift", ("Neither run has one.",))
    plot = LinePlot(
        "Drift of outputs, teacher-forced",
        "Errors of both runs against FP32 over the positions of one stream.",
        "positions of one stream",
        "relative L2 error",
        tuple(lines),
        reading="How to read it: lower is better; good is a line of B that is not above that of A.",
    )
    return Section("Drift", plots=(plot,))


def _latency(a: RunData, b: RunData) -> Section:
    if a.bench is None or b.bench is None:
        return Section("Speed", ("Not both runs were timed.",))
    cells = [{cell_name(cell): cell for cell in run.bench["grid"]} for run in (a, b) if run.bench]
    doubts = [
        f"{label} was timed while others used {cores:.1f} cores: so there are no ratios."
        for label, bench in (("A", a.bench), ("B", b.bench))
        if (cores := busy(bench)) is not None
    ]
    rows: list[tuple[Value, ...]] = []
    for label in [name for name in cells[0] if name in cells[1]]:
        sides = [side[label]["contestants"] for side in cells]
        for name in [n for n in sides[0] if n in sides[1]]:
            x, y = (side[name]["p50_ms"] for side in sides)
            rows.append((label, CONTESTANTS.get(name, name), float(x), float(y), None if doubts else y / x))
    columns = ("call", "what", "A p50 ms", "B p50 ms", "B ÷ A")
    return Section("Speed", tuple(doubts), tables=(Table("Medians", columns, tuple(rows)),))
