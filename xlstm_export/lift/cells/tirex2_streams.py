"""TiRex-2 over streams of patches, as it is exported; importing this module registers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import RecurrentCell, register
from .tirex2_forecast import Scaler, Stack

BLOCK = 64  # positions of which the running sums and maxima are taken at once


class Streams(nn.Module):
    """Quantiles after every patch, with statistics that are given or that run.

    Args:
        source: a `load.families.tirex2_streams.Frozen` or `Running`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        model: Any = source.model
        self.stack, self.scaler, self.ahead = Stack(model), Scaler.of(model), Ahead()
        self.settings = model.postprocessor.cfg

    def quantiles(self, x: Tensor, loc: Tensor, scale: Tensor, binary: Tensor) -> Tensor:
        """x (B, S, P), statistics that broadcast to it → (B, S, Q, P)."""
        y = self.stack(self.scaler.scaled(x, loc, scale, binary))
        y = self.scaler.restored(y, loc[..., None], scale[..., None], binary[..., None])
        patch, middle = x.shape[2], y.shape[2] // 2
        first = self.ahead(torch.isnan(x).all(-1).to(x.dtype))[..., None, None] * patch  # (B, S, 1, 1)
        ahead = first + torch.arange(1, patch + 1, dtype=x.dtype, device=x.device)
        median = y[:, :, middle : middle + 1]
        wide = self.settings.raw_band_scale**0.5 * ahead ** (self.settings.raw_band_exponent - 0.5)
        return median + wide * (y - median)


class LiftedFrozen(Streams):
    """What takes the place of `Frozen`."""

    def forward(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """x (B, S, P); loc, scale (B, 1) → (B, S, Q, P)."""
        loc, scale = loc[..., None], scale[..., None]
        binary = scale == 0
        loc, scale = torch.where(binary, 0.0, loc), torch.where(binary, 1.0, scale)
        return self.quantiles(x, loc, scale, binary)


class LiftedRunning(Streams):
    """What takes the place of `Running`."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.statistics = Statistics(self.scaler)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, P) → (B, S, Q, P)."""
        return self.quantiles(x, *self.statistics(x))


class Ahead(RecurrentCell):
    """How many patches without any value end at each position."""

    cell = "ahead"

    def __init__(self) -> None:
        super().__init__(1, 1, {"ahead": (1,)})

    def forward(self, missing: Tensor) -> Tensor:
        """missing (B, S), 1 where a patch has no value → (B, S)."""
        length = missing.shape[1]
        place = torch.arange(length, dtype=missing.dtype, device=missing.device)
        # Before this call the last patch with a value was at -1 - past.
        before = -1 - self.past("ahead")  # (B, 1)
        last = torch.where(missing > 0, before, place)
        count = place - torch.maximum(running(last, _largest), before)
        self.keep("ahead", count[:, -1:])
        return count


class Statistics(RecurrentCell):
    """Location, scale, and whether all values are 0 or 1, of what a stream had until each position.

    States: number of known values, their mean, the sum of squares around it, and 1 once a value was neither
    0 nor 1. Sums of a call are taken around the mean before it, or the first value: a stream that is far from
    zero loses nothing.
    """

    cell = "scaler"

    def __init__(self, scaler: Scaler) -> None:
        super().__init__(1, 1, {kind: (1,) for kind in ("count", "mean", "squares", "varied")})
        self.scaler = scaler

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, P), NaN where missing → location, scale, binary, each (B, S, 1)."""
        known = ~torch.isnan(x)
        seen = self.past("count")
        centre = torch.where(seen > 0, self.past("mean"), first_known(x))  # (B, 1)
        apart = torch.where(known, x - centre[..., None], 0.0)
        count = seen + running(known.to(x.dtype).sum(-1), _total)
        total = running(apart.sum(-1), _total)
        squares = self.past("squares") + running((apart * apart).sum(-1), _total)
        shift = total / count.clamp(min=1)
        squares = (squares - total * shift).clamp(min=0)
        other = (known & (x != 0) & (x != 1)).any(-1).to(x.dtype)
        varied = torch.maximum(running(other, _largest), self.past("varied"))
        loc = torch.where(count > 0, centre + shift, 0.0)
        for kind, value in zip(
            ("count", "mean", "squares", "varied"), (count, loc, squares, varied), strict=True
        ):
            self.keep(kind, value[:, -1:])
        scale = torch.where(count > 0, (squares / count.clamp(min=1)).sqrt(), 1.0).clamp(min=self.scaler.eps)
        binary = (varied == 0) if self.scaler.binary_aware else torch.zeros_like(varied, dtype=torch.bool)
        loc, scale = torch.where(binary, 0.0, loc), torch.where(binary, 1.0, scale)
        return loc[..., None], scale[..., None], binary[..., None]


def first_known(x: Tensor) -> Tensor:
    """The first known value of each stream (B, 1) in x (B, S, P); 0 where there is none."""
    x = x.flatten(1)
    place = torch.arange(x.shape[1], 0, -1, dtype=x.dtype, device=x.device)
    place = torch.where(torch.isnan(x), 0.0, place)
    first = (place == place.amax(-1, keepdim=True)) & (place > 0)
    return torch.where(first, x, 0.0).sum(-1, keepdim=True)


def _total(x: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, x, 0.0).sum(-1)


def _largest(x: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(allowed, x, -torch.finfo(torch.float32).max).amax(-1)


def running(x: Tensor, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum or maximum of x (B, S) until each position, in blocks; engines have no operator for it.

    Args:
        reduce: `_total` or `_largest` of the allowed elements along the last axis.
    """
    batch, length = x.shape
    blocks = nn.functional.pad(x, (0, -length % BLOCK)).reshape(batch, -1, BLOCK)  # (B, N, L)
    place = torch.arange(BLOCK, device=x.device)
    inside = reduce(blocks[..., None, :], place[:, None] >= place)  # (B, N, L)
    number = torch.arange(blocks.shape[1], device=x.device)
    whole = reduce(inside[:, None, :, -1], number[:, None] > number)  # (B, N): of the blocks before
    both = torch.stack([inside, whole[..., None].expand(inside.shape)], -1)
    return (
        reduce(both, torch.ones(2, dtype=torch.bool, device=x.device)).reshape(batch, -1).narrow(1, 0, length)
    )


@register("xlstm_export.load.families.tirex2_streams.Frozen")
def _frozen(source: nn.Module) -> nn.Module:
    return LiftedFrozen(source)


@register("xlstm_export.load.families.tirex2_streams.Running")
def _running(source: nn.Module) -> nn.Module:
    return LiftedRunning(source)
