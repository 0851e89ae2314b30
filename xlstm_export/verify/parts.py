"""What verifications share: held-out data and its metric, gates of cells, how a verdict is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import write_json
from ..checks import Check, Verdict
from ..errors import UsageError
from ..inputs import Arrays, per_position
from ..load.loaded import Loaded
from ..load.made_up import random_inputs
from ..measure import data as evaluation
from ..measure.cell_gates import Gates, audit
from ..measure.data import EvalData, Sequences
from ..measure.metrics import agreement
from ..options import Context
from ..runfolder import RunFolder
from ..specs import IoSpec
from .gate_file import Gate
from .ways import BATCH, RAGGED

GATE_POSITIONS = 2048  # of one stream, whose gates are looked at
HELD_OUT, CALIBRATION, MADE_UP = "held-out data", "calibration data", "made-up inputs"


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


class Source:
    """Where the sequences of a verification come from: held-out data, else given ones, else made up.

    A trained model sees nothing like made-up tokens in its life, so ranges that were calibrated on data do
    not fit them: a quantized model fails on them whatever it is worth.

    Args:
        loaded: the model, whose example inputs made-up ones resemble.
        io: its inputs.
        rng: chooses stretches and makes up inputs.
        data: held-out data.
        calibration: inputs (N, S, ...) of a calibration set; taken where there is no `data`.
    """

    def __init__(
        self,
        loaded: Loaded,
        io: IoSpec,
        rng: np.random.Generator,
        data: EvalData | None,
        calibration: Arrays | None = None,
    ) -> None:
        self._loaded, self._io, self._rng = loaded, io, rng
        self._sequences: Sequences | None = data
        if data is None and calibration is not None and all(map(per_position, io.inputs)):
            self._sequences = Sequences(calibration)
        self.kind = HELD_OUT if data is not None else MADE_UP if self._sequences is None else CALIBRATION

    @property
    def name(self) -> str:
        """What a report of the short checks calls it: they need sequences of some length."""
        real = self._sequences is not None and self._sequences.length > max(RAGGED)
        return self.kind if real else MADE_UP

    def batch(self, length: int) -> Arrays:
        """(BATCH, length, ...): from random places, made up where the sequences are not that long."""
        if self._sequences is not None and self._sequences.length > length:
            return self._sequences.sample(BATCH, length, self._rng)
        return random_inputs(self._loaded, self._io, BATCH, length, self._rng)

    def streams(self, count: int, length: int) -> Arrays:
        """(count, S, ...), one stream each; S is `length` if made up, else what there is."""
        if self._sequences is not None:
            return self._sequences.streams(count)
        return random_inputs(self._loaded, self._io, count, length, self._rng)

    def stretch(self) -> Arrays:
        """The start of one stream, up to `GATE_POSITIONS` positions."""
        if self._sequences is None:
            return {name: x[:1] for name, x in self.batch(GATE_POSITIONS).items()}
        return {name: x[:1, :GATE_POSITIONS] for name, x in self._sequences.inputs.items()}


def audited(run: RunFolder, inputs: Arrays, context: Context) -> tuple[Gates, list[Check]]:
    """The gates of an export along a stream; that all of it are numbers is a check."""
    gates = audit(run, inputs, context)
    heads = [head for block in gates.blocks for head in block.heads]
    broken = sum(not np.isfinite([h.m_min, h.m_max, h.smallest_normalizer]).all() for h in heads)
    return gates, [Check("heads whose stabilizer is no number", float(broken), 0.0)] if heads else []


def finish(verdict: Verdict, path: Path, gate: Gate | None) -> Verdict:
    """Judge by the gate file, if there is one, and write the verdict."""
    if gate is not None:
        verdict = gate.apply(verdict)
    write_json(path, verdict.to_json())
    return verdict
