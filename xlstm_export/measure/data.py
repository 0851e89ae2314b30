"""Evaluation data: held-out inputs, their targets, and the metric they are scored by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, UsageError
from ..inputs import Arrays, cut, length_of, per_position, rolled
from ..inputs import piece as piece_of
from ..options import Context, Progress
from ..sessions import Session
from ..sessions.codec import BYTES
from ..sessions.files import ARRAYS, TABLES, InputFiles
from ..specs import IoSpec, Json, JsonMapping, TensorSpec
from .metrics import IGNORED, METRICS, Agreement, Metric, Tally, Target

PIECE = 512  # positions per call while a metric streams through the data; their outputs are held
LIMIT = 16_384  # positions of each sequence that a metric is computed on, unless more are asked for
UNKNOWN = -100  # the class by which PyTorch marks targets that do not count
PICTURE = "text file for a language model; .npz with the model's inputs (N, S, ...) and `target`"


@dataclass(frozen=True)
class Sequences:
    """Sequences like those that a model is used on.

    Attributes:
        inputs: model inputs by name, in the model's shapes with N rows.
        io: the model's inputs and outputs, all inputs with positions.
    """

    inputs: Arrays
    io: IoSpec

    @property
    def rows(self) -> int:
        return int(next(self.inputs[spec.name].shape[0] for spec in self.io.inputs if spec.batched))

    @property
    def length(self) -> int:
        """Positions of the stream."""
        return length_of(self.inputs, self.io.inputs)

    def sample(self, count: int, length: int, rng: np.random.Generator) -> Arrays:
        """Stretches of `length` positions from random places, (count, length, ...)."""
        starts = rng.integers(0, self.length - length, size=count)
        rows = rng.integers(0, self.rows, size=count)
        return {
            spec.name: self.inputs[spec.name]
            if not spec.batched
            else np.concatenate(
                [
                    piece_of(self.inputs[spec.name][row : row + 1], spec, start, start + length)
                    for row, start in zip(rows.tolist(), starts.tolist(), strict=True)
                ]
            )
            for spec in self.io.inputs
        }

    def streams(self, count: int) -> Arrays:
        """Long streams (count, S, ...): different rows, or one row from different starting positions."""
        chosen = [row % self.rows for row in range(count)]
        shifts = [self.length * (row // self.rows) // count for row in range(count)]
        return {
            spec.name: self.inputs[spec.name]
            if not spec.batched
            else np.concatenate(
                [
                    rolled(self.inputs[spec.name][row : row + 1], spec, shift)
                    for row, shift in zip(chosen, shifts, strict=True)
                ]
            )
            for spec in self.io.inputs
        }


@dataclass(frozen=True)
class EvalData(Sequences):
    """Held-out data of a task.

    Attributes:
        scoring: the task metric.
        target: what the output should be, (N, S, ...).
        source: name of the file.
        whole: there is one output for the whole sequence, which must not be cut into pieces.
        available: positions per row that the file has; more than `length` where they were limited.
    """

    scoring: Metric
    target: Target
    source: str
    whole: bool = False
    available: int = 0

    @property
    def metric(self) -> str:
        """Name of the task metric in reports."""
        return self.scoring.name

    @property
    def classes(self) -> bool:
        """Whether the output that is scored holds logits."""
        return self.scoring.classes

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is better."""
        return self.scoring.higher_is_better

    def score(self, outputs: Arrays) -> float:
        """The metric of the outputs (N, S, ...).

        Raises:
            InputError: they are of another shape than the targets.
        """
        return self.scoring.score(self._scored(outputs, self.target), self.target)

    def loss(self, outputs: Arrays) -> float:
        """The metric as a loss (lower is better): the inverse of a metric for which higher is better."""
        score = self.score(outputs)
        if not self.higher_is_better:
            return score
        return 1.0 / score if score else np.inf

    def run(self, session: Session, piece: int = PIECE) -> Arrays:
        """Outputs of a session of `rows` streams on the data, from a fresh start."""
        return stream(session, self.inputs, self.length if self.whole else piece, self.io.outputs)

    def compare(
        self,
        candidate: tuple[Session, int],
        reference: tuple[Session, int],
        progress: Progress = Context().progress,
    ) -> Comparison:
        """Score two sessions of `rows` streams side by side, from a fresh start. No outputs are kept.

        Args:
            candidate, reference: a session, and how many positions a call of it may have.
            progress: called with the positions that are done.

        Raises:
            InputError: outputs are of another shape than the targets.
        """
        found, expected, agreement = Tally(self.scoring), Tally(self.scoring), Agreement()
        step = self.length if self.whole else PIECE
        for session, _ in (candidate, reference):
            session.reset()
        for start in range(0, self.length, step):
            end = min(start + step, self.length)
            target = self.target if self.whole else self._part(start, end)
            ours, theirs = (
                self._scored(self._called(session, start, end, piece), target)
                for session, piece in (candidate, reference)
            )
            found.add(ours, target)
            expected.add(theirs, target)
            if self.classes:
                agreement.add(ours, theirs)
            progress(f"task metric: {end:,} of {self.length:,} positions")
        return Comparison(found.value, expected.value, agreement if self.classes else None)

    def _part(self, start: int, end: int) -> Target:
        output = _output(self.io)
        steps = output.steps if per_position(output) else 1
        return self.target.part(start * steps, end * steps)

    def _called(self, session: Session, start: int, end: int, piece: int) -> Arrays:
        """Outputs of the positions start … end - 1, which follow those of the call before."""
        inputs = cut(self.inputs, self.io, start, end)
        return _continued(session, inputs, end - start if self.whole else piece, self.io.outputs)

    def _scored(self, outputs: Arrays, target: Target) -> np.ndarray:
        """The output that is scored, positions second; one of another shape than the targets is refused."""
        output = _output(self.io)
        found = _positions_second(outputs[output.name], output)
        more = self.classes or self.scoring is METRICS["quantile-loss"]  # the output has one more axis
        if (found.shape[:-1] if more else found.shape) != target.values.shape:
            raise InputError(
                f"{self.source}: target has shape {target.values.shape}, the model gives {found.shape}"
            )
        return found


@dataclass(frozen=True)
class Comparison:
    """A metric of two models on the same data.

    Attributes:
        found, expected: the metric of candidate and reference.
        agreement: of their logits; None where the output holds none.
    """

    found: float
    expected: float
    agreement: Agreement | None


def load(
    path: Path,
    io: IoSpec,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    limit: int | None = LIMIT,
    metric: str | None = None,
) -> EvalData:
    """Read evaluation data for a model.

    Args:
        path: a text file (language models), or an .npz file with the inputs by name and `target`:
            classes (N, S) as integers, -1 or -100 where unknown, or real values (N, S, ...), NaN where
            unknown; without the axis S where the output has none. Optional: `mase_scale`, and `quantiles`,
            the levels of the output's last axis. Of tokens without `target`, each is the target of those
            before it; so they may also be an .npy file.
        io: the model's inputs and outputs.
        vocab_size: vocabulary of a language model.
        tokenizer: tokenizer.json that came with it; without one, text is read as bytes.
        limit: at most this many positions per row are used; None for all.
        metric: one of `METRICS`; the default depends on the targets.

    Raises:
        InputError: the file cannot be read or does not fit the model.
        UsageError: the metric is unknown, or does not fit the targets; text for a model without a tokenizer.
        SetupError: text needs the package `tokenizers`, which cannot be imported.
    """
    if metric is not None and metric not in METRICS:
        raise UsageError(f"no metric {metric}", f"there are {', '.join(METRICS)}")
    text = path.suffix.lower() not in (*ARRAYS, *TABLES)
    if text and metric == "bits-per-byte" and tokenizer is not None:
        raise UsageError(f"--metric {metric}: the model's tokens are not bytes", "perplexity is per token")
    inputs, others = _read(path, InputFiles(io, vocab_size, tokenizer))
    length = length_of(inputs, io.inputs)
    if "target" not in others:
        (spec,) = io.inputs
        tokens = inputs[spec.name][:, : None if limit is None else limit + 1]
        target = Target(tokens[:, 1:])
        name = metric or ("bits-per-byte" if vocab_size == BYTES and tokenizer is None else "perplexity")
        given = {spec.name: np.ascontiguousarray(tokens[:, :-1])}
        return EvalData(given, io, _chosen(name, target), target, str(path), available=length - 1)
    output = _output(io)
    target = _target(path, others, output, limit)
    name = metric or _default_metric(target, output, vocab_size, "mase_scale" in others)
    inputs = {
        x.name: np.ascontiguousarray(piece_of(inputs[x.name], x, 0, limit or length)) for x in io.inputs
    }
    whole = not per_position(output) and output.shape[1:2] != (1,)
    return EvalData(inputs, io, _chosen(name, target), target, str(path), whole, available=length)


def check_source(
    path: Path, inputs: Sequence[TensorSpec], *, vocab_size: int | None = None, tokenizer: Path | None = None
) -> None:
    """Find what is wrong with evaluation data before there is an export to use them on.

    Args:
        path: as in `load`.
        inputs: the model's inputs.
        vocab_size, tokenizer: as in `load`.

    Raises:
        InputError, UsageError, SetupError: see `load`. What depends on the outputs is not checked.
    """
    _read(path, InputFiles(IoSpec(tuple(inputs), (), ()), vocab_size, tokenizer))


def _read(path: Path, files: InputFiles) -> tuple[Arrays, Json]:
    """Inputs, and what a file holds besides them: its targets, unless the inputs are tokens.

    Raises:
        InputError: the file cannot be read or does not fit the model, or it holds no targets.
    """
    found = files.read(path)
    if "target" in found.others:
        return found.single(path), found.others
    if not files.takes_text():
        held = f"it holds {', '.join(found.others)} besides the inputs; " if found.others else ""
        raise InputError(
            f"{path} lacks `target`, so there is nothing to score",
            f"{held}give an .npz file with the inputs and target; or give inputs alone as --calib",
        )
    (tokens,) = found.parts[0].values()
    if tokens.shape[1] < 2:
        raise InputError(f"{path} is empty but for a token", "a metric needs at least two tokens of text")
    return found.parts[0], {}


def _target(path: Path, arrays: JsonMapping, output: TensorSpec, limit: int | None) -> Target:
    values, scale = arrays["target"], arrays.get("mase_scale", np.float64(1.0))
    positions = per_position(output)
    if values.ndim < 1 + positions or values.dtype.kind not in "biuf":
        axes = "(N, S, ...)" if positions else "(N, ...)"
        raise InputError(f"{path}: target is {values.dtype} of shape {values.shape}, expected {axes}")
    if scale.ndim or scale.dtype.kind not in "biuf" or not 0 < scale < np.inf:
        raise InputError(f"{path}: mase_scale is {scale}, expected one positive number")
    if positions and values.ndim == len(output.shape):
        values = _positions_second(values, output)
    if positions and limit is not None:
        values = values[:, : limit * output.steps]
    # Integer targets of the output's shape are measured values; if the output has one more axis, classes.
    classes = values.dtype.kind in "iu" and values.ndim == len(output.shape) - 1
    quantiles = arrays.get("quantiles")
    if quantiles is not None and not _are_levels(quantiles, output):
        raise InputError(
            f"{path}: quantiles is {quantiles.dtype} of shape {quantiles.shape}",
            f"levels between 0 and 1, one for each of the last axis of {output.name} {list(output.shape)}",
        )
    values = np.where(values == UNKNOWN, IGNORED, values) if classes else values
    target = Target(values.astype(np.int64 if classes else np.float64), float(scale), quantiles)
    if not target.known.any():
        raise InputError(f"{path}: target holds no known value", "NaN marks positions that do not count")
    size = output.shape[-1]
    if classes and isinstance(size, int) and not (values.min() >= -1 and values.max() < size):
        raise InputError(
            f"{path}: target holds classes {values.min()} … {values.max()}", f"{output.name} has {size}"
        )
    return target


def _are_levels(quantiles: np.ndarray, output: TensorSpec) -> bool:
    if quantiles.ndim != 1 or quantiles.dtype.kind != "f" or quantiles.shape != output.shape[-1:]:
        return False
    return bool(((quantiles > 0) & (quantiles < 1)).all())


def _default_metric(target: Target, output: TensorSpec, vocab_size: int | None, scaled: bool) -> str:
    if target.of_classes:
        return "perplexity" if output.shape[-1] == vocab_size else "accuracy"
    if target.quantiles is not None:
        return "quantile-loss"
    return "mase" if scaled else "mae"


def _chosen(name: str, target: Target) -> Metric:
    metric = METRICS[name]
    if metric.classes != target.of_classes:
        fitting = ", ".join(key for key, other in METRICS.items() if other.classes == target.of_classes)
        kind = "classes" if target.of_classes else "real values"
        raise UsageError(f"--metric {name}: the targets are {kind}", f"for these there are {fitting}")
    if name == "quantile-loss" and target.quantiles is None:
        raise UsageError(
            f"--metric {name}: the data hold no `quantiles`", "give the levels of the output's last axis"
        )
    return metric


def _positions_second(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The tensor as (N, S, ...), which the metrics take."""
    return np.moveaxis(values, spec.time_axis or 1, 1) if values.ndim > 1 else values


def _output(io: IoSpec) -> TensorSpec:
    return io.outputs[0]


def stream(
    session: Session, inputs: Arrays, piece: int = PIECE, outputs: Sequence[TensorSpec] = ()
) -> Arrays:
    """Run a session over long inputs from a fresh start, in pieces; outputs joined along the sequence.

    Args:
        session: of as many streams as the inputs have rows.
        inputs: by name.
        piece: positions per call.
        outputs: the model's; by default as the session describes them, else positions are the second axis.
    """
    session.reset()
    return _continued(session, inputs, piece, outputs)


def _continued(session: Session, inputs: Arrays, piece: int, outputs: Sequence[TensorSpec] = ()) -> Arrays:
    """As `stream`, from where the session is."""
    length = length_of(inputs, session.io.inputs)
    parts = [
        session.prefill(cut(inputs, session.io, start, min(start + piece, length)))
        for start in range(0, length, piece)
    ]
    if len(parts) == 1:
        return parts[0]
    axes = {spec.name: spec.time_axis or 1 for spec in outputs or session.io.outputs}
    return {n: np.concatenate([part[n] for part in parts], axis=axes.get(n, 1)) for n in parts[0]}
