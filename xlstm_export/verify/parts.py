"""Parts that the verifications share: held-out data and metric, gates of cells, writing the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..checks import CALIBRATION, HELD_OUT, MADE_UP, Check, Replay, Verdict
from ..errors import UsageError, UserCodeError
from ..inputs import Arrays, cut, has_positions, length_of, per_position, rows_of
from ..load.loaded import Loaded
from ..load.made_up import explained, random_inputs
from ..measure import data as evaluation
from ..measure.cell_gates import Gates, audit
from ..measure.data import PIECE, Comparison, EvalData, Sequences
from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from ..specs import IoSpec, Json
from .gate_file import Gate
from .ways import BATCH, RAGGED

GATE_POSITIONS = 2048  # positions of one stream at which the gates are examined
Proof = Callable[[Verdict], Verdict]  # adds the proof of identity to a verdict


def load_data(options: VerifyOptions, run: RunFolder, loaded: Loaded) -> EvalData | None:
    """Load the held-out data; None without a path.

    Raises:
        UsageError: the export cannot stream, or a metric is named without data.
        InputError: the data do not fit the model.
    """
    io, path, metric = run.io, options.data, options.metric
    if path is None:
        if metric is not None:
            raise UsageError(f"--metric {metric} needs --data", evaluation.PICTURE)
        return None
    if not io.states:
        raise UsageError(
            "--data needs an export with states", "a stateless export cannot stream through data"
        )
    if not all(map(per_position, io.inputs)):
        raise UsageError("--data needs a model all of whose inputs are (B, S, ...)")
    limit = evaluation.LIMIT if options.positions is None else options.positions or None
    return evaluation.load(
        path, io, vocab_size=loaded.vocab_size, tokenizer=run.tokenizer, limit=limit, metric=metric
    )


def metric_checks(
    data: EvalData, compared: Comparison, against: str, limits: Mapping[str, float]
) -> tuple[list[Check], Json]:
    """Checks of the change of the task's metric and, for logits, of KL divergence and first choices.

    Args:
        data: held-out data of the task.
        compared: candidate and reference on them.
        against: name of the reference in the report.
        limits: "metric" (relative), "kl" (nats) and "top1" (share of positions).

    Returns:
        The checks, and the entry `metric` of the verdict.
    """
    reference, score = compared.expected, compared.found
    change = (score - reference) / max(abs(reference), np.finfo(np.float64).tiny)
    metric: dict[str, Any] = {
        "name": data.metric,
        against: reference,
        "exported": score,
        "drop": -change if data.higher_is_better else change,
        "positions": data.rows * data.length,
        "available": data.rows * data.available,
    }
    # A difference of infinities, or a metric that is NaN on both sides, gives NaN, which fails.
    checks = [Check(f"{data.metric} on held-out data", abs(change), limits["metric"], dict(metric))]
    if compared.agreement is not None:
        metric["kl"] = compared.agreement.kl
        metric["other_first_choice"] = compared.agreement.other_first_choice
        checks += [
            Check("KL on held-out data", metric["kl"], limits["kl"]),
            Check("other first choices on held-out data", metric["other_first_choice"], limits["top1"]),
        ]
    again = streamed(data.inputs, data.io, data.length if data.whole else PIECE)
    return [replace(check, replay=again) for check in checks], metric


def streamed(inputs: Arrays, io: IoSpec, piece: int) -> Replay:
    """One stream in pieces of so many positions, to be repeated."""
    full, rest = divmod(length_of(inputs, io.inputs), piece)
    pieces = (*(piece,) * full, *((rest,) if rest else ()))
    return Replay(inputs, pieces, lambda arrays, start, end: cut(arrays, io, start, end))


class Source:
    """Source of the sequences of a verification: held-out data, else calibration data, else made-up ones.

    Made-up tokens do not resemble the data that a model is trained and calibrated on. The calibrated ranges
    do not fit them, so that even a good quantized model fails on them.

    Args:
        loaded: the model, whose example inputs made-up ones resemble.
        io: its inputs.
        rng: generator that chooses stretches and makes up inputs.
        data: held-out data.
        calibration: inputs (N, S, ...) of a calibration set; used if there is no `data`.
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
        if data is None and calibration is not None and has_positions(io):
            self._sequences = Sequences(calibration, io)
        self._made_up = False
        self.kind = HELD_OUT if data is not None else MADE_UP if self._sequences is None else CALIBRATION

    @property
    def name(self) -> str:
        """Name of the source that the short checks use; short sequences of data cannot serve them."""
        real = self._sequences is not None and self._sequences.length > max(RAGGED)
        return self.kind if real else MADE_UP

    def batch(self, length: int) -> Arrays:
        """Inputs (BATCH, length, ...) from random places; made up if the sequences are shorter."""
        if self._sequences is not None and self._sequences.length > length:
            return self._within(self._sequences.sample(BATCH, length, self._rng), length)
        self._made_up = True
        return random_inputs(self._loaded, self._io, BATCH, length, self._rng)

    def cut(self, inputs: Arrays, start: int, end: int) -> Arrays:
        """Positions start … end - 1, as a call of their own: lengths are at most what is left."""
        return self._within(cut(inputs, self._io, start, end), end - start)

    def _within(self, inputs: Arrays, length: int) -> Arrays:
        """Inputs of `length` positions, in which no length or index is beyond them."""
        for name, known in self._loaded.ranges.items():
            if known.to_length is not None:
                inputs[name] = np.minimum(inputs[name], length + known.to_length)
        return inputs

    def streams(self, count: int, length: int) -> Arrays:
        """Inputs (count, S, ...), one stream each; S is `length` if made up, else the length of the data."""
        if self._sequences is not None:
            return self._sequences.streams(count)
        self._made_up = True
        return random_inputs(self._loaded, self._io, count, length, self._rng)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the user's code in the block says so where inputs were made up."""
        try:
            yield
        except UserCodeError as error:
            if not self._made_up:
                raise
            raise explained(error, self._loaded, self._io) from error

    def stretch(self) -> Arrays:
        """The start of one stream, up to `GATE_POSITIONS` positions."""
        if self._sequences is None:
            return rows_of(self.batch(GATE_POSITIONS), self._io, slice(0, 1))
        return cut(rows_of(self._sequences.inputs, self._io, slice(0, 1)), self._io, 0, GATE_POSITIONS)


def audited(run: RunFolder, inputs: Arrays, context: Context) -> tuple[Gates, list[Check]]:
    """The gates of an export along a stream, and a check that all stabilizers are finite."""
    gates = audit(run, inputs, context)
    heads = [head for block in gates.blocks for head in block.heads]
    broken = sum(not np.isfinite([h.m_min, h.m_max, h.smallest_normalizer]).all() for h in heads)
    again = streamed(inputs, run.io, GATE_POSITIONS)
    check = Check("heads whose stabilizer is no number", float(broken), 0.0, replay=again)
    return gates, [check] if heads else []


def judged(verdict: Verdict, gate: Gate | None, proof: Proof | None = None) -> Verdict:
    """The verdict with the limits of the gate file, if there is one, and then the proof of identity."""
    verdict = verdict if gate is None else gate.apply(verdict)
    return verdict if proof is None else proof(verdict)
