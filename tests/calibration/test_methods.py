"""Ranges from histograms: against the values themselves, against quantizing them, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import refused
from xlstm_export.calibration import methods
from xlstm_export.calibration.histogram import Observer
from xlstm_export.calibration.methods import Distribution

from xlstm_export.errors import UsageError

RNG = np.random.default_rng(0)
SHAPES = {
    "normal": RNG.standard_normal(200_000),
    "heavy tails": RNG.standard_t(3, 200_000),
    "laplace": RNG.laplace(size=200_000),
    "uniform": RNG.uniform(-3, 3, 200_000),
    "half zeros": RNG.standard_normal(200_000) * (RNG.random(200_000) < 0.5),
    "one outlier": np.append(RNG.standard_normal(200_000), 100.0),
}


def histogram(values: np.ndarray) -> Distribution:
    observer = Observer.empty(1)
    observer.add(values.astype(np.float32)[:, None], 0)
    return observer.distribution()


def quantized_error(values: np.ndarray, amax: float) -> float:
    """By doing it: round to 255 levels, clip, compare."""
    step = amax / 127
    return float(np.mean((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_percentile_is_that_of_the_values(shape: str) -> None:
    values, found = SHAPES[shape], histogram(SHAPES[shape])
    for percentile in (60.0, 90.0, 99.0, 99.9, 99.99, 100.0):
        expected = np.percentile(np.abs(values), percentile, method="inverted_cdf")
        assert methods.amax(found, "percentile", percentile) == pytest.approx(expected, abs=found.width)


def test_percentile_among_zeros_and_in_gaps() -> None:
    """90% zeros, one value of 1, and one of 8."""
    values = np.concatenate([np.zeros(90), np.full(9, 1.0), [8.0]])
    found = histogram(values)
    assert methods.amax(found, "percentile", 50.0) == found.width
    assert methods.amax(found, "percentile", 95.0) == pytest.approx(1.0, abs=found.width)
    assert methods.amax(found, "percentile", 99.0) == pytest.approx(1.0, abs=found.width)
    assert methods.amax(found, "percentile", 99.5) == pytest.approx(8.0, abs=found.width)


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_error_is_the_measured_one(shape: str) -> None:
    values, found = SHAPES[shape], histogram(SHAPES[shape])
    for share in (1.0, 0.7, 0.3, 0.1, 0.03):
        clip = share * found.peak
        assert methods.squared_error(found, clip) == pytest.approx(quantized_error(values, clip), rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_finds_the_best_clip(shape: str) -> None:
    values, found = SHAPES[shape], histogram(SHAPES[shape])
    best = min(quantized_error(values, clip) for clip in np.geomspace(0.01, 1, 400) * found.peak)
    assert quantized_error(values, methods.amax(found, "mse")) <= 1.02 * best


def test_mse_clips_only_where_it_pays() -> None:
    assert methods.amax(histogram(SHAPES["uniform"]), "mse") > 2.9
    assert methods.amax(histogram(SHAPES["normal"]), "mse") < 0.95 * np.abs(SHAPES["normal"]).max()


def test_error_of_two_values_by_hand() -> None:
    """All mass at 0, 1 and 10; a step of 1 holds all three, a step of 0.05 cuts 10 off."""
    weights = np.zeros(2048)
    weights[[128, 1280]] = 1.0  # bins of 1/128: [1, 1 + 1/128) and [10, 10 + 1/128)
    found = Distribution(weights, zeros=2.0, width=1 / 128, peak=10.0)
    narrow = (1 / 128) ** 2
    assert methods.squared_error(found, 127.0) <= narrow
    assert methods.squared_error(found, 6.35) == pytest.approx((10 - 6.35) ** 2 / 4, rel=1e-3)  # zeros count


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "laplace"])
def test_entropy_agrees_with_onnxruntime(shape: str) -> None:
    """On the same histogram; its own is of signed values, and the two smooth differently."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = SHAPES[shape][:20_000]
    peak = float(np.abs(values).max())
    counts, edges = np.histogram(values, bins=1001, range=(-peak, peak))
    collector = HistogramCollector("entropy", True, 1001, 128, 99.99, None)
    _, high = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), peak), 128)[:2]
    magnitudes = counts[501:] + counts[:500][::-1]
    ours = methods.amax(
        Distribution(magnitudes.astype(float), counts[500], edges[1] - edges[0], peak), "entropy"
    )
    assert float(high) == pytest.approx(ours, rel=0.03)
    assert ours < peak


def test_entropy_of_even_values_cuts_nothing_off() -> None:
    found = histogram(SHAPES["uniform"])
    assert methods.amax(found, "entropy") == pytest.approx(found.peak, rel=0.01)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_method_goes_beyond_what_was_seen(shape: str, method: str) -> None:
    found = histogram(SHAPES[shape])
    amax = methods.amax(found, method)
    assert 0 < amax <= found.peak
    assert amax == float(np.float32(amax))
    assert method != "max" or amax == found.peak


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("value", [1.0, 4.0, 3.3, 1e-30, 1e-38, 3e38])
def test_a_tensor_of_one_value(method: str, value: float) -> None:
    """Powers of two start a bin, and the peak is the last bin's lower edge."""
    found = histogram(np.full(1000, value))
    amax = methods.amax(found, method)
    assert 0 < amax <= found.peak
    if method != "percentile" and value > 1e-29:
        assert amax == pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize("method", methods.METHODS)
def test_zeros_only(method: str) -> None:
    assert methods.amax(histogram(np.zeros(100)), method) == 0.0


def test_refusals() -> None:
    with refused(UsageError, "'minmax'", "max, percentile, entropy, mse"):
        methods.check("minmax", 99.0)
    for percentile in (0.0, -1.0, 100.1, float("nan")):
        with refused(UsageError, f"percentile is {percentile}", "at most 100"):
            methods.check("percentile", percentile)
