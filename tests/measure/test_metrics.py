"""Task metrics against hand computations and definitions."""

from __future__ import annotations

import numpy as np
import pytest

from xlstm_export.measure.metrics import IGNORED, METRICS, Agreement, Target


def score(name: str, output: np.ndarray, target: Target) -> float:
    return METRICS[name].score(np.asarray(output, np.float32), target)


def test_accuracy_and_perplexity_by_hand() -> None:
    logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]])
    target = Target(np.array([[0, 1, IGNORED]]))
    assert score("accuracy", logits, target) == 0.5
    assert score("perplexity", logits, target) == pytest.approx(np.sqrt(2 * 10), rel=1e-6)
    assert score("bits-per-byte", logits, target) == pytest.approx((1 + np.log2(10)) / 2, rel=1e-6)


def test_auroc_is_the_probability_of_the_right_order() -> None:
    """Against counting all pairs, ties half; two classes and one against the rest."""
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        logits = rng.integers(-2, 3, (60, classes)).astype(np.float64)  # many ties
        labels = rng.integers(0, classes, 60)
        labels[:3] = IGNORED
        areas = []
        for k in (1,) if classes == 2 else range(classes):
            values = (
                logits[:, 1] - logits[:, 0]
                if classes == 2
                else logits[:, k] - np.logaddexp.reduce(logits, -1)
            )
            known = labels != IGNORED
            ours, others = values[known & (labels == k)], values[known & (labels != k)]
            wins = (ours[:, None] > others).mean() + 0.5 * np.isclose(
                ours[:, None], others, rtol=0, atol=1e-12
            ).mean()
            areas.append(wins)
        assert score("auroc", logits, Target(labels)) == pytest.approx(np.mean(areas), rel=1e-2)
    assert np.isnan(score("auroc", np.zeros((3, 2)), Target(np.array([1, 1, 1]))))


def test_quantile_loss() -> None:
    """At the median it is the absolute error; a level of 0.9 makes too low nine times worse than too high."""
    target = Target(np.array([[10.0], [np.nan]]), quantiles=np.array([0.5]))
    assert score("quantile-loss", np.array([[[12.5]], [[0.0]]]), target) == pytest.approx(2.5)
    high = Target(np.array([[10.0]]), quantiles=np.array([0.9]))
    low, above = (score("quantile-loss", np.array([[[x]]]), high) for x in (9.0, 11.0))
    assert low == pytest.approx(9 * above)


def agreement(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    both = Agreement()
    both.add(found, expected)
    return both.kl, both.other_first_choice


def test_agreement() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    divergence, other = agreement(np.log([p, q]), np.log([p, p]))
    assert divergence == pytest.approx((p * np.log(p / q)).sum() / 2, rel=1e-9)
    assert other == 0.5
    assert agreement(np.log([p]) + 7, np.log([p])) == (pytest.approx(0, abs=1e-12), 0.0)


def test_certain_logits_do_not_become_nan() -> None:
    certain = np.array([[1e4, 0.0]])
    assert agreement(certain, certain) == (0.0, 0.0)
    assert score("perplexity", certain, Target(np.array([0]))) == 1.0
