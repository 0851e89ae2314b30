"""The statistics of an observed tensor: histograms of magnitudes, and the largest ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xlstm_export.calibration import methods

from xlstm_export.errors import InputError

BINS = 2048
# Magnitudes below 2^-100 all fall into the first bin; smaller bins would leave the range of FP32.
_LOWEST = -100
_AT_ONCE = 1 << 18  # values that are binned at once, so that they stay in the cache


@dataclass
class Observer:
    """The statistics of one tensor.

    Bins have equal widths, a power of two. When a value is beyond the last, pairs of bins are merged until
    it does not: exact, and the end does not depend on the order in which values came.

    Attributes:
        counts: values seen per bucket, zeros included.
        peaks: largest magnitude per bucket.
        bins: (buckets, BINS) how many magnitudes other than 0 lie in each bin.
        exponent: the bins cover [0, 2^exponent).
        channels: largest magnitude per element of the last axis; None before the first value.
    """

    counts: np.ndarray
    peaks: np.ndarray
    bins: np.ndarray
    exponent: int = _LOWEST
    channels: np.ndarray | None = None

    @staticmethod
    def empty(buckets: int, bins: int = BINS) -> Observer:
        return Observer(
            np.zeros(buckets, np.int64), np.zeros(buckets, np.float32), np.zeros((buckets, bins), np.int64)
        )

    def add(self, values: np.ndarray, bucket: int) -> None:
        """Count float32 values (..., channels) in.

        Raises:
            InputError: one is NaN or Inf, or the number of channels is another than before.
        """
        magnitudes = np.abs(values)
        channels = magnitudes.reshape(-1, values.shape[-1] if values.ndim else 1).max(axis=0)
        peak = channels.max()
        if not np.isfinite(peak):
            raise InputError("NaN or Inf", "")
        if self.channels is not None and self.channels.shape != channels.shape:
            raise InputError(f"a last axis of {len(self.channels)} and of {len(channels)}", "")
        self.channels = channels if self.channels is None else np.maximum(self.channels, channels)
        self.counts[bucket] += values.size
        self.peaks[bucket] = max(self.peaks[bucket], peak)
        self._cover(peak)
        self._bin(magnitudes.reshape(-1), bucket)

    def distribution(self) -> methods.Distribution:
        """The histogram over all buckets, each weighted by 1 / √(number of its values)."""
        seen = self.counts > 0
        per_value = np.where(seen, 1 / np.sqrt(np.maximum(self.counts, 1)), 0.0)
        zeros = self.counts - self.bins.sum(axis=1)
        return methods.Distribution(
            weights=per_value @ self.bins,
            zeros=float(per_value @ zeros),
            width=self.width,
            peak=float(self.peaks.max()),
        )

    def rms(self) -> list[float | None]:
        """Root mean square per bucket, each magnitude taken as the middle of its bin."""
        middles = (np.arange(self.bins.shape[1]) + 0.5) * self.width
        sums = self.bins @ middles**2
        return [
            float(np.sqrt(total / count)) if count else None
            for total, count in zip(sums, self.counts, strict=True)
        ]

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent / self.bins.shape[1]

    def _cover(self, peak: float) -> None:
        needed = int(np.frexp(peak)[1])  # peak < 2^needed
        if peak == 0.0 or needed <= self.exponent:
            return
        buckets, bins = self.bins.shape
        factor = 2 ** min(needed - self.exponent, bins.bit_length() - 1)
        merged = self.bins.reshape(buckets, bins // factor, factor).sum(axis=2)
        self.bins[:] = 0
        self.bins[:, : bins // factor] = merged
        self.exponent = needed

    def _bin(self, magnitudes: np.ndarray, bucket: int) -> None:
        scale = np.float32(1 / self.width)  # a power of two: the product is exact
        bins = self.bins.shape[1]
        for start in range(0, len(magnitudes), _AT_ONCE):
            part = magnitudes[start : start + _AT_ONCE]
            self.bins[bucket] += np.bincount((part * scale).astype(np.intp), minlength=bins)
            self.bins[bucket, 0] -= len(part) - np.count_nonzero(part)
