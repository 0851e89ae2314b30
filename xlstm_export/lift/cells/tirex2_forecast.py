"""The forecast of TiRex-2 as one graph; importing this module registers what takes the place of `predict`.

Upstream pads, differences and calibrates in Python, with choices that depend on the values. Here both ways
are computed and each row takes its own, so the graph gives for every series what upstream's `predict` gives
for it. The stack is that of series of one variate: variates are mixed with each other only where a group has
several, and rows are read backwards only where their future is known, so both parts are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import register
from .norms import RmsNorm
from .tirex2 import LiftedTirex2Mlstm, LiftedTirex2Slstm

FEWEST = 4  # known values of a series that may have a trend
FLAT = 1e-12  # standard deviation at which a series is constant
LARGEST = 20.0  # of what sinh is taken of, as upstream clamps it


class Residual(nn.Module):
    """Two layers beside one: upstream's class compiles itself when it is called."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.hidden_layer, self.act = source.hidden_layer, source.act
        self.output_layer, self.residual_layer = source.output_layer, source.residual_layer
        self.norm = t5_norm(source.layer_norm) if source.use_layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.output_layer(self.act(self.hidden_layer(x))) + self.residual_layer(x))


class Block(nn.Module):
    """A block of one variate: recurrence and gated layers, each added to its input."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        mixer = source.time_mixer
        kind = LiftedTirex2Slstm if mixer.cell_type == "slstm" else LiftedTirex2Mlstm
        self.norm_lstm, self.norm_ffn = RmsNorm(mixer.norm_lstm), RmsNorm(mixer.norm_ffn)
        self.cell, self.ffn = kind(mixer.fwd_cell), mixer.ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cell(self.norm_lstm(x))
        return x + self.ffn(self.norm_ffn(x))


class Stack(nn.Module):
    """Scaled patches → scaled quantiles of the next patch.

    Args:
        model: a `TiRex2`, whose own layers are used.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding = Residual(model.input_patch_embedding)
        self.blocks = nn.ModuleList(map(Block, model.stack))
        norm = model.stack_out_norm
        self.norm = t5_norm(norm) if hasattr(norm, "variance_epsilon") else norm
        self.head = Residual(model.output_patch_embedding)
        self.quantiles, self.patch = model.num_quantiles, model.output_patch_size

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """x (B, S, P), NaN where missing → (B, S, Q, P); only the positions from `first` on."""
        missing = torch.isnan(x)
        x = torch.cat([torch.where(missing, 0.0, x), (~missing).to(x.dtype)], dim=-1)
        x = self.before(self.embedding(x))
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(self.behind(x)[:, first:]))
        return x.reshape(*x.shape[:2], self.quantiles, self.patch)

    def before(self, x: Tensor) -> Tensor:
        """What goes into the blocks, of (B, S, D)."""
        return x

    def behind(self, x: Tensor) -> Tensor:
        """What is forecast, of that."""
        return x


def t5_norm(source: nn.Module) -> nn.Module:
    """The norm that upstream calls LayerNorm, which subtracts no mean."""
    given: Any = source
    norm = nn.RMSNorm(given.weight.shape, eps=given.variance_epsilon)
    norm.weight = given.weight
    return norm


Statistics = tuple[Tensor, Tensor, Tensor]  # location, scale, and whether all values are 0 or 1


@dataclass(frozen=True)
class Scaler:
    """Scaling of whole series, as upstream's `Scaler`."""

    eps: float
    arcsinh: bool
    binary_aware: bool

    @classmethod
    def of(cls, model: nn.Module) -> Scaler:
        scaler: Any = model.scaler
        return cls(scaler.eps, scaler.use_arcsinh, scaler.binaryaware)

    def statistics(self, x: Tensor) -> Statistics:
        """x (B, S), NaN where missing → location, scale, and whether all values are 0 or 1; (B, 1) each."""
        known = ~torch.isnan(x)
        loc = mean(x, known)
        deviation = torch.where(known, x - loc, 0.0)
        count = known.to(x.dtype).sum(-1, keepdim=True)
        scale = ((deviation * deviation).sum(-1, keepdim=True) / count.clamp(min=1)).sqrt()
        scale = torch.where(count > 0, scale, 1.0).clamp(min=self.eps)
        if not self.binary_aware:
            return loc, scale, torch.zeros_like(loc, dtype=torch.bool)
        binary = (~known | (x == 0) | (x == 1)).all(-1, keepdim=True)
        return torch.where(binary, 0.0, loc), torch.where(binary, 1.0, scale), binary

    def scaled(self, x: Tensor, loc: Tensor, scale: Tensor, binary: Tensor) -> Tensor:
        """Values, with statistics that broadcast to them; NaN stays NaN."""
        x = (x - loc) / scale
        return torch.where(binary, x, torch.asinh(x)) if self.arcsinh else x

    def restored(self, x: Tensor, loc: Tensor, scale: Tensor, binary: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        if self.arcsinh:
            x = torch.where(binary, x, torch.sinh(x.clamp(-LARGEST, LARGEST)))
        return x * scale + loc


def mean(x: Tensor, known: Tensor) -> Tensor:
    """Mean (B, 1) of the known values of x (B, S); 0 where there are none.

    The rounded mean of equal values is not always that value, and the scale of a constant series would be a
    rounding error, which differs between runtimes. The mean of what is left corrects it.
    """
    count = known.to(x.dtype).sum(-1, keepdim=True).clamp(min=1)
    rough = torch.where(known, x, 0.0).sum(-1, keepdim=True) / count
    return rough + torch.where(known, x - rough, 0.0).sum(-1, keepdim=True) / count


class LiftedUnivariate(nn.Module):
    """What takes the place of `Univariate`: the same forecast without choices in Python.

    Args:
        source: a `load.families.tirex2.Univariate`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        model: Any = source.model
        self.stack: nn.Module = Stack(model)
        self.scaler = Scaler.of(model)
        self.settings = model.postprocessor.cfg
        self.rows = model.context_len + model.future_len
        self.patch, self.future = model.output_patch_size, model.future_len
        self.flips, self.differences = bool(model.tta_sign_flip), bool(model.tta_diff)
        self.reversed: list[int] = model._complement_indices().tolist() if self.flips else []

    def forward(self, context: Tensor) -> Tensor:
        """context (B, S), NaN where missing → quantiles (B, Q, future)."""
        if not self.flips:
            return self._one_sign(context)
        both = self._one_sign(torch.cat([context, -context]))
        return self._both_signs(both)

    def _both_signs(self, both: Tensor) -> Tensor:
        """Quantiles of series and of their negatives (2·B, Q, future) → their mean (B, Q, future)."""
        as_given, flipped = both.tensor_split(2)
        return (as_given - flipped[:, self.reversed]) / 2

    def _one_sign(self, context: Tensor) -> Tensor:
        return self._of_targets(context, self._forecast)

    def _of_targets(self, series: Tensor, forecast: Callable[[Tensor], Tensor]) -> Tensor:
        """Quantiles (N, Q, future) of series (N, S), each by its values or by its differences.

        Args:
            forecast: what the model makes of series.
        """
        if not self.differences:
            return self._calibrated(forecast(series))
        trend = has_trend(series, self.settings.trend_threshold, self.settings.trend_min_r2)
        # As upstream, the first difference is 0, also of a missing value.
        steps = torch.cat([torch.zeros_like(series[:, :1]), series[:, 1:] - series[:, :-1]], dim=-1)
        found = forecast(torch.where(trend, steps, series))
        summed = self._summed(found) + last_known(series)[..., None]
        return torch.where(trend[..., None], summed, self._calibrated(found))

    def _forecast(self, series: Tensor) -> Tensor:
        """(B, S) → (B, Q, future)."""
        after = series.new_full((series.shape[0], self.future), torch.nan)
        x, statistics = self._patches(torch.cat([series, after], dim=-1))
        return self._restored(self.stack(x, x.shape[1] - self.future // self.patch - 1), statistics)

    def _patches(self, series: Tensor) -> tuple[Tensor, Statistics]:
        """Series with their future (N, S + future), cut to upstream's length, as scaled patches (N, L, P)."""
        before = series.new_full((series.shape[0], self.rows), torch.nan)
        series = torch.cat([before, series], dim=-1)[:, -self.rows :]
        statistics = self.scaler.statistics(series)
        x = self.scaler.scaled(series, *statistics)
        x = nn.functional.pad(x, (-self.rows % self.patch, 0), value=torch.nan)
        return x.reshape(x.shape[0], -1, self.patch), statistics

    def _restored(self, y: Tensor, statistics: Statistics) -> Tensor:
        """Scaled quantiles after the last patch of the context and later ones, → (N, Q, future)."""
        y = y[:, :-1].transpose(1, 2)  # each patch forecasts the one behind it
        y = y.reshape(y.shape[0], y.shape[1], self.future)
        return self.scaler.restored(y, *(part[..., None] for part in statistics))

    def _calibrated(self, y: Tensor) -> Tensor:
        """Quantiles (B, Q, future) with the distances from the median that fit them."""
        median, apart = self._apart(y)
        return median + self.settings.raw_band_scale**0.5 * self._widening("raw", y) * apart

    def _summed(self, y: Tensor) -> Tensor:
        """Quantiles of differences (B, Q, future) → of the values, without the last one that is known."""
        median, apart = self._apart(y)
        until = torch.ones(self.future, self.future, dtype=y.dtype, device=y.device).triu()
        spread = apart.sum(-1, keepdim=True).sign() * ((apart * apart) @ until).sqrt()
        wide = self.settings.diff_band_scale**0.5 * self._widening("diff", y) * spread
        return median @ until + wide

    def _apart(self, y: Tensor) -> tuple[Tensor, Tensor]:
        middle = y.shape[1] // 2
        median = y[:, middle : middle + 1]
        return median, y - median

    def _widening(self, kind: str, like: Tensor) -> Tensor:
        """Factor of the distances at each row ahead (future)."""
        ahead = torch.arange(1, self.future + 1, dtype=like.dtype, device=like.device)
        return ahead ** (getattr(self.settings, f"{kind}_band_exponent") - 0.5)


def has_trend(x: Tensor, rise: float, explained: float) -> Tensor:
    """Whether a straight line explains a series, (B, 1); upstream's test over all of its rows.

    Args:
        x: (B, S), NaN where missing.
        rise: least slope over all rows, in standard deviations.
        explained: least part of the variance that the line explains.
    """
    known = ~torch.isnan(x)
    size = known.to(x.dtype)
    count = size.sum(-1, keepdim=True)
    time = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape)
    time = torch.where(known, time - mean(time, known), 0.0)
    # In units of the largest deviation, so that no square overflows.
    value = torch.where(known, x - mean(x, known), 0.0)
    largest = value.abs().amax(-1, keepdim=True)
    value = value / torch.where(largest > 0, largest, 1.0)
    both, times, values = (
        (a * b).sum(-1, keepdim=True) for a, b in ((time, value), (time, time), (value, value))
    )
    deviation = largest * (values / (count - 1).clamp(min=1)).sqrt()
    varies = (count >= FEWEST) & (deviation >= FLAT)
    part = both * both / torch.where(varies, times * values, 1.0)
    slope = (part * (count - 1).clamp(min=1) / torch.where(varies, times, 1.0)).sqrt()
    return varies & (slope * x.shape[1] >= rise) & (part >= explained)


def last_known(x: Tensor) -> Tensor:
    """The last known value of each series (B, 1); 0 where there is none."""
    time = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    time = torch.where(torch.isnan(x), 0.0, time)  # (B, S)
    last = (time == time.amax(-1, keepdim=True)) & (time > 0)
    return torch.where(last, x, 0.0).sum(-1, keepdim=True)


@register("xlstm_export.load.families.tirex2.Univariate")
def _univariate(source: nn.Module) -> nn.Module:
    return LiftedUnivariate(source)
