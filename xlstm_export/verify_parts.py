"""What verifications share: held-out data and its metric, the gates, how a report ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import data as evaluation
from .checks import Check, Report
from .config import IoSpec
from .data import EvalData
from .errors import UsageError
from .gate import Gate
from .gates import Gates, audit
from .inputs import Arrays, per_position
from .loaded import Loaded
from .metrics import agreement
from .runfolder import write_json

GATE_POSITIONS = 2048  # of one stream, whose gates are looked at


def load_data(path: Path | None, io: IoSpec, loaded: Loaded, metric: str | None) -> EvalData | None:
    """The held-out data, if there are any.

    Raises:
        UsageError: the export cannot stream through them, or a metric without data.
        InputError: they do not fit the model.
    """
    if path is None:
        if metric is not None:
            raise UsageError(f"--metric {metric} needs --data", evaluation.PICTURE)
        return None
    if not io.states:
        raise UsageError("--data needs an export with states", "a stateless one cannot stream through it")
    if not all(map(per_position, io.inputs)):
        raise UsageError("--data needs a model all of whose inputs are (B, S, ...)")
    return evaluation.load(path, io, vocab_size=loaded.vocab_size, metric=metric)


def metric_checks(
    data: EvalData, found: Arrays, expected: Arrays, against: str, limits: Mapping[str, float]
) -> tuple[list[Check], dict[str, Any]]:
    """By how much the task's metric is another, and how far logits agree.

    Args:
        data: of the task.
        found, expected: outputs of candidate and reference.
        against: what the reference is called in the report.
        limits: "metric" (relative), "kl" (nats) and "top1" (share of positions).

    Returns:
        The checks, and the report's `metric`.
    """
    reference, score = data.score(expected), data.score(found)
    change = (score - reference) / max(abs(reference), np.finfo(np.float64).tiny)
    metric: dict[str, Any] = {
        "name": data.metric,
        against: reference,
        "exported": score,
        "drop": -change if data.higher_is_better else change,
        "positions": data.rows * data.length,
    }
    # A difference of infinities, or a metric that is NaN on both sides, proves nothing and fails.
    checks = [Check(f"{data.metric} on held-out data", abs(change), limits["metric"], dict(metric))]
    if data.classes:
        metric["kl"], metric["other_first_choice"] = agreement(found[data.output], expected[data.output])
        checks += [
            Check("KL on held-out data", metric["kl"], limits["kl"]),
            Check("other first choices on held-out data", metric["other_first_choice"], limits["top1"]),
        ]
    return checks, metric


def stretch(data: EvalData | None, make: Callable[[int], Arrays]) -> Arrays:
    """One stream of up to `GATE_POSITIONS` positions: the start of the data, or made-up inputs."""
    if data is None:
        return {name: x[:1] for name, x in make(GATE_POSITIONS).items()}
    return {name: x[:1, :GATE_POSITIONS] for name, x in data.inputs.items()}


def audited(
    folder: Path, inputs: Arrays, threads: int, progress: Callable[[str], None]
) -> tuple[Gates, list[Check]]:
    """The gates of an export along a stream; that all of it are numbers is a check."""
    gates = audit(folder, inputs, threads=threads, progress=progress)
    heads = [head for block in gates.blocks for head in block.heads]
    broken = sum(not np.isfinite([h.m_min, h.m_max, h.smallest_normalizer]).all() for h in heads)
    return gates, [Check("heads whose stabilizer is no number", float(broken), 0.0)] if heads else []


def finish(report: Report, path: Path, gate: Gate | None) -> Report:
    """Judge by the gate file, if there is one, and write the report."""
    if gate is not None:
        report = gate.apply(report)
    write_json(path, report.to_json())
    return report
