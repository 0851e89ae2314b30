"""Sections of the report of a run; those of measurements are in `measured.py`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from ..checks import pytorch
from ..runfolder import VERIFICATION, WEAKER
from ..specs import Json, TensorSpec
from ..verify.evidence import arguments
from .data import OTHER_FILES, RunData, number
from .document import Document, Section, Table, Value, bytes_of, missing, text_of
from .glossary import glossary
from .headline import facts
from .measured import calibration, drift, gates, latency

CLOSEST = 6  # checks that are shown without unfolding
LARGEST = 12  # most failed checks that are named


def document(run: RunData) -> Document:
    """The whole report."""
    verdict, details = _verdict(run)
    sections = [
        exported(run),
        parity(run),
        drift(run),
        latency(run),
        *([precision(run)] if run.precision != "fp32" else []),
        gates(run),
        calibration(run),
        tensors(run),
        environment(run),
        reproduce(run),
    ]
    title = f"{run.folder.manifest.get('model', 'model')}, {run.precision}"
    return Document(title, verdict, run.passed, details, facts(run), [*sections, glossary(sections)])


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
    details += [f"{_capital(str(c['advice']))}." for c in failed if c.get("advice")]
    identity = run.verification.get("identity")
    if identity:
        details.append(f"{_capital(str(identity['sentence']))}.")
    place = run.verification.get("bisect")
    if place:
        details.append(str(place.get("sentence", "")))
    beside = run.folder.manifest.get(WEAKER)
    if beside:
        details.append(_beside(beside))
    gate = run.verification.get("gate")
    if gate:
        details.append(f"Limits of the gate file {gate['file']} replace built-in ones.")
    good = "equal to PyTorch" if run.precision == "fp32" else "within the limits of its precision"
    if failed:
        return f"NOT {good}: {len(failed)} of {len(checks)} checks failed", tuple(details)
    return f"{good}: {len(checks)} checks passed", tuple(details)


def _beside(weaker: Json) -> str:
    """A later verification whose verdict does not count."""
    why = "; ".join(map(str, weaker.get("weaker", ())))
    result = "passed" if weaker.get("passed") else "FAILED"
    return f"A later verification that rests on less {result} and does not replace this verdict: {why}."


def exported(run: RunData) -> Section:
    """The model in a few sentences; tables of its interface are in `tensors`."""
    options = run.folder.recorded_options
    io = run.folder.io
    text = [
        f"{run.folder.manifest.get('model')} from {_origin(run)}.",
        f"It reads {_tensors(io.inputs)} and returns {_tensors(io.outputs)}. " + _states(run),
        "Options: " + ", ".join(f"{key} {value}" for key, value in options.items()) + ".",
    ]
    if sites := run.folder.manifest.get("sites", {}):
        text.append("Weights: " + ", ".join(f"{count} in {kind}" for kind, count in sites.items()) + ".")
    if broken := run.folder.broken_rules:
        text.append(f"{broken[0].upper()}{broken[1:]}.")
    return Section("What was exported", tuple(text))


def _tensors(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{x.name} ({', '.join(map(str, x.shape))}) {x.dtype}" for x in specs)


def _states(run: RunData) -> str:
    states = run.folder.io.states
    if not states:
        return "Every call starts fresh; nothing is carried on."
    size = sum(s.elements * (2 if s.dtype in ("float16", "bfloat16") else 4) for s in states)
    blocks = len({s.block for s in states})
    return f"{blocks} recurrent block{'s' * (blocks > 1)} carry {bytes_of(size)} of state per stream."


def tensors(run: RunData) -> Section:
    """Inputs, outputs, states, and the files with their hashes."""
    io = run.folder.io
    found: list[tuple[Any, ...]] = [
        (t.name, kind, t.dtype, str(list(t.shape)))
        for kind, tensors_of_kind in (("input", io.inputs), ("output", io.outputs))
        for t in tensors_of_kind
    ]
    found += [(f"{s.past} → {s.present}", "state", s.dtype, str(["B", *s.shape])) for s in io.states]
    files = [
        (name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in sorted(run.folder.files.items())
    ]
    return Section(
        "Details: tensors and files",
        tables=(
            Table("Inputs, outputs and states", ("tensor", "kind", "type", "shape"), tuple(found)),
            Table("Files", ("file", "bytes", "SHA-256"), tuple(files)),
        ),
    )


def _origin(run: RunData) -> str:
    origin = run.folder.origin
    return str(origin.get("checkpoint") or origin.get("module") or "an unknown source")


def precision(run: RunData) -> Section:
    """The recipe, and what it was compared with."""
    verified = (run.verification or {}).get("precision") or {}
    options = run.folder.recorded_options
    text = [
        f"Base {options.get('base')}, states {options.get('state_dtype')}. "
        f"Compared with: {verified.get('reference', 'not verified yet')}.",
    ]
    calibrated = run.folder.manifest.get("calibration") or {}
    if calibrated.get("random"):
        text.append("The ranges come from made-up data: they do not hold for real inputs.")
    return Section(
        "Details: recipe",
        tuple(text),
        commands=tuple((run.recipe or "").splitlines()),
        language="yaml",
    )


def parity(run: RunData) -> Section:
    """Every check."""
    if run.verification is None:
        return missing(run.folder.path, "Accuracy", "verify")
    rows: list[tuple[Value, ...]] = []
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
    text = [] if run.current else [OTHER_FILES]
    text += _proofs(run.verification)
    if covered := run.verification.get("coverage"):
        text.append(str(covered["sentence"]))
    text += [f"Inputs of the checks: {run.verification.get('inputs')}.", *_reference(run.verification)]
    for name, far in (run.verification.get("upstream_as_it_comes") or {}).items():
        distance, there = (
            ("from_float64", "float64") if "from_float64" in far else ("from_reference", "the reference")
        )
        text.append(
            f"{name}: PyTorch, unmodified (FP32), is {text_of(number(far[distance]))} from {there} and "
            f"{text_of(number(far['from_export']))} from the export."
        )
    tables = (_closest(rows), Table("All checks", columns, tuple(rows)))
    return Section("Accuracy", tuple(text), tables=tables)


def _closest(rows: Sequence[tuple[Value, ...]]) -> Table:
    """The checks that failed, then those that are closest to their limits; of checks alike the first one."""
    judged = [row for row in rows if row[4] is not None or not row[1]]
    judged.sort(key=lambda row: (bool(row[1]), number(row[4]) or 0.0))
    columns = ("check", "verdict", "value", "limit", "headroom ×")
    kinds = {re.sub(r"\d+", "#", str(row[0])): row for row in reversed(judged)}
    first = [row[:5] for row in judged if row in kinds.values()]
    return Table("Closest to their limits", columns, tuple(first[:CLOSEST]))


def _proofs(verification: Json) -> list[str]:
    """Which proof covers what."""
    identity = verification.get("identity")
    if not identity:
        return []
    text = [
        f"{_capital(str(identity['sentence']))}. Identity covers what is in the files, whether or not an "
        "input of the checks reaches it. Behaviour, that is all other checks, covers how the graph computes, "
        "and how it was exported."
    ]
    if identity["differences"]:
        text.append(f"What differs: {'; '.join(identity['differences'])}.")
    return text


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


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
    return Section("Details: environment", tables=tuple(tables))


def reproduce(run: RunData) -> Section:
    """The commands that make this run again."""
    folder = shlex.quote(str(run.folder.path))
    commands = [str(run.folder.manifest.get("command") or "")] if run.folder.manifest.get("command") else []
    text = ["The same checkpoint and options give the same bytes."]
    if run.folder.origin.keys() & {"checkpoint", "module"}:
        rests_on = arguments(run.folder.manifest.get(VERIFICATION, {}))
        commands += [shlex.join(["xlstm-export", "verify", str(run.folder.path), *rests_on])]
        commands += [f"xlstm-export bench {folder}"]
        if rests_on:
            text.append("`verify` without options does the same, wherever these files are now.")
    else:
        text.append(
            "The model was in memory: `verify` and `bench` are methods of the Run that `export` gave."
        )
    commands.append(f"xlstm-export report {folder}")
    return Section("How to reproduce", tuple(text), commands=tuple(commands))
