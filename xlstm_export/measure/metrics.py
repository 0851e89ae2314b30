"""Task metrics, each one number per model and data set; and the agreement of two models' logits.

Outputs and targets are arrays of whole streams. Logits are un-normalized, their last axis holds the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

IGNORED = -1  # targets of this class do not count; among real values, NaN

Terms = Callable[[np.ndarray, "Target"], np.ndarray]


@dataclass(frozen=True)
class Target:
    """Expected values of an output.

    Attributes:
        values: classes (...) as integers, or real values (..., h); unknown ones are `IGNORED` or NaN.
        scale: scale of MASE: the mean absolute error of the naive forecast.
        quantiles: levels of the output's last axis, for the quantile loss.
    """

    values: np.ndarray
    scale: float = 1.0
    quantiles: np.ndarray | None = None

    def part(self, start: int, end: int) -> Target:
        """The target of the positions start … end - 1, which are the second axis."""
        return replace(self, values=self.values[:, start:end])

    @property
    def known(self) -> np.ndarray:
        if self.of_classes:
            return np.asarray(self.values != IGNORED)
        return np.isfinite(self.values)

    @property
    def of_classes(self) -> bool:
        return self.values.dtype.kind in "iu"


@dataclass(frozen=True)
class Metric:
    """A task metric.

    Attributes:
        name: name in reports.
        terms: what each known position adds, of an output and its target, in float64: (n,), or more to each.
        of: the metric of the mean of all terms; of all terms themselves where `ranks` is set.
        classes: whether the output holds logits.
        higher_is_better: of accuracy and the like.
        ranks: the metric compares positions with each other, so their mean does not give it.
    """

    name: str
    terms: Terms
    classes: bool
    of: Callable[[np.ndarray], float] = float
    higher_is_better: bool = False
    ranks: bool = False

    def score(self, output: np.ndarray, target: Target) -> float:
        """The metric of an output and its target."""
        tally = Tally(self)
        tally.add(output, target)
        return tally.value


class Tally:
    """A metric along a stream that is too long to be held: sums are kept, and no outputs."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._sum, self._count = np.float64(0.0), 0
        self._parts: list[np.ndarray] = []

    def add(self, output: np.ndarray, target: Target) -> None:
        """Count in the next piece of the stream."""
        terms = self._metric.terms(output, target)
        if self._metric.ranks:
            self._parts.append(terms)
        else:
            self._sum += terms.sum()
            self._count += terms.size

    @property
    def value(self) -> float:
        """The metric so far; NaN before a target was known."""
        if self._metric.ranks:
            return float(self._metric.of(np.concatenate(self._parts)))
        return float(self._metric.of(self._sum / self._count)) if self._count else float("nan")


class Agreement:
    """How far two models' logits agree along a stream; as in `Tally`, sums are kept.

    Attributes:
        positions: compared so far.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._divergence, self._other = 0.0, 0

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Count in logits (..., K) of the next piece of the stream."""
        ours, theirs = log_softmax(found), log_softmax(expected)
        p = np.exp(theirs)
        with np.errstate(invalid="ignore"):
            self._divergence += float(np.where(p > 0, p * (theirs - ours), 0.0).sum())
        self._other += int((found.argmax(-1) != expected.argmax(-1)).sum())
        self.positions += int(np.prod(found.shape[:-1]))

    @property
    def kl(self) -> float:
        """Mean KL(expected ‖ found) in nats."""
        return max(0.0, self._divergence / self.positions)  # not below 0 by rounding

    @property
    def other_first_choice(self) -> float:
        """Share of positions with another first choice."""
        return self._other / self.positions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def _nats(logits: np.ndarray, target: Target) -> np.ndarray:
    """Negative log likelihood of the next token."""
    known = target.known
    chosen = np.take_along_axis(log_softmax(logits), np.where(known, target.values, 0)[..., None], -1)[..., 0]
    return np.asarray(-chosen[known])


def _bits(nats: np.ndarray) -> float:
    return float(nats / np.log(2.0))


def _perplexity(nats: np.ndarray) -> float:
    return float(np.exp(nats))


def _right(logits: np.ndarray, target: Target) -> np.ndarray:
    """Whether the target has the largest logit."""
    return np.asarray((logits.argmax(-1) == target.values)[target.known], np.float64)


def _ranked(logits: np.ndarray, target: Target) -> np.ndarray:
    """Logits and, after them, the class: (n, K + 1)."""
    known = target.known
    return np.concatenate([logits.astype(np.float64)[known], target.values[known][:, None]], -1)


def _auroc(ranked: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half; for more than two classes the mean of one-against-rest.

    The probability that a positive is ranked above a negative (Mann and Whitney). NaN where only one class
    occurs.
    """
    logits, classes = ranked[:, :-1], ranked[:, -1]
    if logits.shape[-1] == 2:
        # The probability is monotonic in the difference, which does not round to 1.
        return _rank_area(logits[:, 1] - logits[:, 0], classes == 1)
    scores = log_softmax(logits)
    areas = [_rank_area(scores[:, int(k)], classes == k) for k in np.unique(classes)]
    return float(np.mean(areas))


def _rank_area(scores: np.ndarray, positive: np.ndarray) -> float:
    count, total = int(positive.sum()), len(positive)
    if count in (0, total):
        return float("nan")
    _, inverse, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    ranks = (ends - (sizes - 1) / 2)[inverse]  # from 1, ties share the mean of theirs
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (total - count)))


def _errors(output: np.ndarray, target: Target) -> np.ndarray:
    """Absolute errors, in units of the target or of MASE's scale."""
    return np.asarray(np.abs(output.astype(np.float64) - target.values)[target.known] / target.scale)


def _quantile_losses(output: np.ndarray, target: Target) -> np.ndarray:
    """Twice the pinball loss of each level; for the median alone it is the absolute error.

    Args:
        output: (..., h, Q) quantiles, or (..., Q) where the target has no axis h.
        target: (..., h).
    """
    levels = target.quantiles
    assert levels is not None, "chosen only where the data name them"
    error = target.values[..., None] - output.astype(np.float64)
    loss = 2.0 * np.maximum(levels * error, (levels - 1.0) * error)
    return np.asarray(loss[target.known])


METRICS: dict[str, Metric] = {
    "bits-per-byte": Metric("bits per byte", _nats, classes=True, of=_bits),
    "perplexity": Metric("perplexity", _nats, classes=True, of=_perplexity),
    "accuracy": Metric("accuracy", _right, classes=True, higher_is_better=True),
    "auroc": Metric("AUROC", _ranked, classes=True, of=_auroc, higher_is_better=True, ranks=True),
    "mae": Metric("MAE", _errors, classes=False),
    "mase": Metric("MASE", _errors, classes=False),
    "quantile-loss": Metric("quantile loss", _quantile_losses, classes=False),
}
