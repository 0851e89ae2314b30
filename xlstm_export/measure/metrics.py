"""Task metrics, each one number per model and data set; and the agreement of two models' logits.

Outputs and targets are arrays of whole streams. Logits are un-normalized, their last axis holds the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORED = -1  # targets of this class do not count; among real values, NaN

Score = Callable[[np.ndarray, "Target"], float]


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
        score: computes the metric of an output and its target, in float64.
        classes: whether the output holds logits.
        higher_is_better: of accuracy and the like.
    """

    name: str
    score: Score
    classes: bool
    higher_is_better: bool = False


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def _nats(logits: np.ndarray, target: Target) -> float:
    known = target.known
    chosen = np.take_along_axis(log_softmax(logits), np.where(known, target.values, 0)[..., None], -1)[..., 0]
    return float(-chosen[known].mean())


def bits_per_byte(logits: np.ndarray, target: Target) -> float:
    """Mean negative log2 likelihood of the next byte."""
    return _nats(logits, target) / float(np.log(2.0))


def perplexity(logits: np.ndarray, target: Target) -> float:
    """exp of the mean negative log likelihood of the next token."""
    return float(np.exp(_nats(logits, target)))


def accuracy(logits: np.ndarray, target: Target) -> float:
    """Share of the targets that have the largest logit."""
    known = target.known
    return float((logits.argmax(-1) == target.values)[known].mean())


def auroc(logits: np.ndarray, target: Target) -> float:
    """Area under the ROC curve, ties counted half; for more than two classes the mean of one-against-rest.

    The probability that a positive is ranked above a negative (Mann and Whitney). NaN where only one class
    occurs.
    """
    known = target.known
    scores, classes = log_softmax(logits)[known], target.values[known]  # (n, K), (n,)
    if scores.shape[-1] == 2:
        # The probability is monotonic in the difference, which does not round to 1.
        x = logits.astype(np.float64)[known]
        return _rank_area(x[:, 1] - x[:, 0], classes == 1)
    areas = [_rank_area(scores[:, k], classes == k) for k in np.unique(classes)]
    return float(np.mean(areas))


def _rank_area(scores: np.ndarray, positive: np.ndarray) -> float:
    count, total = int(positive.sum()), len(positive)
    if count in (0, total):
        return float("nan")
    _, inverse, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    ranks = (ends - (sizes - 1) / 2)[inverse]  # from 1, ties share the mean of theirs
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (total - count)))


def mean_absolute_error(output: np.ndarray, target: Target) -> float:
    """Mean absolute error, in units of the target or of MASE's scale."""
    known = target.known
    return float(np.abs(output.astype(np.float64) - target.values)[known].mean() / target.scale)


def quantile_loss(output: np.ndarray, target: Target) -> float:
    """Twice the pinball loss, averaged over levels; for the median alone it is the absolute error.

    Args:
        output: (..., h, Q) quantiles, or (..., Q) where the target has no axis h.
        target: (..., h).
    """
    levels = target.quantiles
    assert levels is not None, "chosen only where the data name them"
    error = target.values[..., None] - output.astype(np.float64)
    loss = 2.0 * np.maximum(levels * error, (levels - 1.0) * error)
    return float(loss[target.known].mean())


METRICS: dict[str, Metric] = {
    "bits-per-byte": Metric("bits per byte", bits_per_byte, classes=True),
    "perplexity": Metric("perplexity", perplexity, classes=True),
    "accuracy": Metric("accuracy", accuracy, classes=True, higher_is_better=True),
    "auroc": Metric("AUROC", auroc, classes=True, higher_is_better=True),
    "mae": Metric("MAE", mean_absolute_error, classes=False),
    "mase": Metric("MASE", mean_absolute_error, classes=False),
    "quantile-loss": Metric("quantile loss", quantile_loss, classes=False),
}


def agreement(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Compare logits (..., K): mean KL(expected ‖ found) in nats, and share of different first choices."""
    ours, theirs = log_softmax(found), log_softmax(expected)
    p = np.exp(theirs)
    with np.errstate(invalid="ignore"):
        divergence = np.where(p > 0, p * (theirs - ours), 0.0).sum(-1).mean()
    other = (found.argmax(-1) != expected.argmax(-1)).mean()
    return max(0.0, float(divergence)), float(other)  # not below 0 by rounding
