"""Sections of the report of a run; those of measurements are in `measured.py`."""

from __future__ import annotations

import shlex
from typing import Any

from ..checks import pytorch
from ..specs import Json
from .data import RunData, number
from .document import Document, Section, Table, bytes_of, missing, text_of
from .measured import calibration, drift, gates, latency

LARGEST = 12  # most failed checks that are named


def document(run: RunData) -> Document:
    """The whole report."""
    verdict, details = _verdict(run)
    return Document(
        f"{run.folder.manifest.get('model', 'model')}, {run.precision}",
        verdict,
        run.passed,
        details,
        [
            exported(run),
            *([precision(run)] if run.precision != "fp32" else []),
            parity(run),
            drift(run),
            gates(run),
            calibration(run),
            latency(run),
            environment(run),
            reproduce(run),
        ],
    )


def _verdict(run: RunData) -> tuple[str, tuple[str, ...]]:
    if run.verification is None:
        return "not verified yet; run `xlstm-export verify`", ()
    if not run.current:
        return "the files changed since they were verified; run `xlstm-export verify` again", ()
    checks = run.verification.get("checks", [])
    failed = [check for check in checks if not check["passed"]]
    details = [
        f"{c['name']}: {text_of(number(c['value']))} exceeds {text_of(number(c['limit']))}"
        for c in failed[:LARGEST]
    ]
    if len(failed) > LARGEST:
        details.append(f"and {len(failed) - LARGEST} more")
    place = run.verification.get("bisect")
    if place:
        details.append(str(place.get("sentence", "")))
    gate = run.verification.get("gate")
    if gate:
        details.append(f"Limits of the gate file {gate['file']} replace built-in ones.")
    metric = run.verification.get("metric") or {}
    if metric:
        details.append(_metric(metric))
    good = "equal to PyTorch" if run.precision == "fp32" else "within the limits of its precision"
    if failed:
        return f"NOT {good}: {len(failed)} of {len(checks)} checks failed", tuple(details)
    return f"{good}: {len(checks)} checks passed", tuple(details)


def _metric(metric: Json) -> str:
    against = (
        "PyTorch in float64" if "pytorch_float64" in metric else "PyTorch" if "pytorch" in metric else "FP32"
    )
    expected = metric.get("pytorch_float64", metric.get("pytorch", metric.get("fp32")))
    text = f"{metric['name']} on {metric['positions']:,} held-out positions: {against} {_precise(expected)}"
    text += f", exported {_precise(metric['exported'])}"
    drop = metric.get("drop")
    return text + (f" ({drop:+.3%} worse)." if isinstance(drop, float) else ".")


def _precise(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else "no number"


def exported(run: RunData) -> Section:
    """Model, interface, states, files."""
    options = run.folder.recorded_options
    io = run.folder.io
    size = sum(s.elements * (2 if s.dtype in ("float16", "bfloat16") else 4) for s in io.states)
    text = [
        f"{run.folder.manifest.get('model')} from {_origin(run)}; options: "
        + ", ".join(f"{key} {value}" for key, value in options.items()),
        f"{len({s.block for s in io.states})} recurrent blocks carry {bytes_of(size)} of state per stream.",
    ]
    tensors: list[tuple[Any, ...]] = [
        (t.name, kind, t.dtype, str(list(t.shape)))
        for kind, tensors_of_kind in (("inputs", io.inputs), ("outputs", io.outputs))
        for t in tensors_of_kind
    ]
    tensors += [(f"{s.past} → {s.present}", "state", s.dtype, str(["B", *s.shape])) for s in io.states]
    files = [
        (name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in sorted(run.folder.files.items())
    ]
    return Section(
        "What was exported",
        tuple(text),
        tables=(
            Table("Inputs, outputs and states", ("tensor", "kind", "type", "shape"), tuple(tensors)),
            Table("Files", ("file", "bytes", "SHA-256"), tuple(files)),
        ),
    )


def _origin(run: RunData) -> str:
    origin = run.folder.origin
    return str(origin.get("checkpoint") or origin.get("module") or "an unknown source")


def precision(run: RunData) -> Section:
    """Recipe, and the precisions of the weights."""
    verified = (run.verification or {}).get("precision") or {}
    sites = run.folder.manifest.get("sites", {})
    options = run.folder.recorded_options
    text = [
        f"Base {options.get('base')}, states {options.get('state_dtype')}. "
        f"Compared with: {verified.get('reference', 'not verified yet')}.",
    ]
    calibrated = run.folder.manifest.get("calibration") or {}
    if calibrated.get("random"):
        text.append("The ranges come from made-up data: they do not hold for real inputs.")
    rows = tuple((kind, int(count)) for kind, count in sites.items())
    return Section(
        "Precision and recipe",
        tuple(text),
        tables=(Table("Weights by precision", ("kind", "weights"), rows),) if rows else (),
        commands=tuple((run.recipe or "").splitlines()),
        language="yaml",
    )


def parity(run: RunData) -> Section:
    """Every check."""
    if run.verification is None:
        return missing(run.folder.path, "Parity", "verify")
    rows = []
    for check in run.verification["checks"]:
        value, limit = number(check["value"]), number(check["limit"])
        headroom = limit / value if value and limit is not None else None
        rows.append(
            (
                check["name"],
                bool(check["passed"]),
                value,
                limit,
                headroom,
                number(check.get("cosine")),
                number(check.get("norm_ratio")),
                number(check.get("max_abs")),
                str(check["at"]) if "at" in check else None,
            )
        )
    columns = (
        "check",
        "verdict",
        "value",
        "limit",
        "headroom ×",
        "cosine",
        "norm ratio",
        "largest error",
        "at",
    )
    text = [f"Inputs of the checks: {run.verification.get('inputs')}.", *_reference(run.verification)]
    for name, far in (run.verification.get("upstream_as_it_comes") or {}).items():
        distance, there = (
            ("from_float64", "float64") if "from_float64" in far else ("from_reference", "the reference")
        )
        text.append(
            f"{name}: PyTorch, unmodified (FP32), is {text_of(number(far[distance]))} from {there} and "
            f"{text_of(number(far['from_export']))} from the export."
        )
    return Section("Parity", tuple(text), tables=(Table("Checks", columns, tuple(rows)),))


def _reference(verification: Json) -> list[str]:
    """What an FP32 export was compared with, and what that means for the limits."""
    reference, reason = verification.get("reference"), verification.get("reference_reason")
    if not reference:
        return []
    if not reason:
        return [f"The reference is {pytorch(reference)}."]
    return [
        f"The reference is {pytorch(reference)}, because {reason}.",
        "So it rounds as well, and the limits are multiples of the error of PyTorch's own FP32 from it.",
    ]


def environment(run: RunData) -> Section:
    """Versions and machine."""
    rows = [(name, str(version)) for name, version in (run.folder.manifest.get("versions") or {}).items()]
    tables = [Table("Versions that exported", ("package", "version"), tuple(rows))]
    machine = (run.bench or {}).get("environment")
    if machine:
        plain = {k: v for k, v in machine.items() if not isinstance(v, dict)}
        shown = tuple(
            (key, ", ".join(map(str, v)) if isinstance(v, list) else "—" if v is None else str(v))
            for key, v in plain.items()
        )
        tables.append(Table("Machine that was timed", ("", "found"), shown))
    return Section("Environment", tables=tuple(tables))


def reproduce(run: RunData) -> Section:
    """The commands that make this run again."""
    folder = shlex.quote(str(run.folder.path))
    commands = [str(run.folder.manifest.get("command") or "")] if run.folder.manifest.get("command") else []
    commands += [
        f"xlstm-export verify {folder}",
        f"xlstm-export bench {folder}",
        f"xlstm-export report {folder}",
    ]
    return Section(
        "How to reproduce",
        ("The same checkpoint and options give the same bytes.",),
        commands=tuple(commands),
    )
